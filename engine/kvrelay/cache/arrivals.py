"""What has yet to come of a sequence's KV while it already runs.

Knows numbers of tiles: `page * num_parts + part`, the page counted from the sequence's beginning, the part as
in `KVMemory`. Knows no tensors, no sockets.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import compress, count

from kvrelay.types import TicketId

Tiles = dict[int, set[int]]  # by layer


@dataclass(frozen=True, slots=True)
class Lacking:
    """The tiles without which a sequence's next token cannot be computed, by layer; more may turn out."""

    tiles: Tiles


class Arrivals:
    """The tiles of one ticket that are on their way, and those of them that the next step waits for."""

    def __init__(self, ticket_id: TicketId, num_layers: int, tiles: Collection[int]) -> None:
        whole = bytearray(max(tiles, default=-1) + 1)
        for tile in tiles:
            whole[tile] = True
        self.ticket_id = ticket_id
        self._missing = [bytearray(whole) for _ in range(num_layers)]  # of each tile, whether it is
        self.lacking: Tiles = {}
        self.stalled_s: float | None = None  # since when it waits

    @property
    def is_stalled(self) -> bool:
        """Whether the next step waits for something."""
        return bool(self.lacking)

    def take(self, arrived: Mapping[int, Collection[int]]) -> bool:
        """These are here now. False, changing nothing, when some of them were not missing."""
        if not arrived.keys() <= set(range(len(self._missing))):
            return False
        if not all(self.missing(layer, tiles).issuperset(tiles) for layer, tiles in arrived.items()):
            return False
        for layer, tiles in arrived.items():
            for tile in tiles:
                self._missing[layer][tile] = False
            if layer in self.lacking:
                self.lacking[layer] -= set(tiles)
                if not self.lacking[layer]:
                    del self.lacking[layer]
        return True

    def missing(self, layer: int, tiles: Iterable[int]) -> set[int]:
        """Those of the tiles that are not here yet."""
        missing = self._missing[layer]
        return {tile for tile in tiles if 0 <= tile < len(missing) and missing[tile]}

    def rest_of(self, layer: int) -> set[int]:
        """All tiles of the layer that are not here yet."""
        return set(compress(count(), self._missing[layer]))

    def rest(self) -> Tiles:
        """All that is not here yet."""
        return {layer: tiles for layer in range(len(self._missing)) if (tiles := self.rest_of(layer))}
