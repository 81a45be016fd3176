"""Sequences that decode while part of their prompt's KV is still on its way.

Each holds its ticket's blocks beside the ticket book, which keeps them until the writer is done or gone. A
step that reads a tile which has not come is repeated once it has: tokens are those of a full hand-off.
"""

import time
from collections.abc import Mapping

from kvrelay.cache.arrivals import Arrivals, Tiles
from kvrelay.cache.memory import stats_bytes
from kvrelay.scheduler.decode import Admission, DecodeSequence
from kvrelay.types import BLOCK_SIZE, HandOff, TicketId, TransferTicket
from kvrelay.wire import Arrived, Wanted
from kvrelay.worker.parts import WorkerParts


class EarlySequences:
    """The sequences of open tickets that run, or ended before all of their KV had come."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts, self._layout = parts, parts.store.layout
        self._sequences: dict[TicketId, DecodeSequence] = {}
        self._next_renewal_s = 0.0

    def get(self, ticket_id: TicketId) -> DecodeSequence | None:
        """The sequence that started on the ticket's blocks."""
        return self._sequences.get(ticket_id)

    def pop(self, ticket_id: TicketId) -> DecodeSequence | None:
        """The same, forgotten."""
        return self._sequences.pop(ticket_id, None)

    def start(self, ticket: TransferTicket, admission: Admission) -> DecodeSequence:
        """A sequence on the ticket's blocks, all of whose tiles are missing; it has its own hold on them."""
        blocks = list(admission.block_ids)
        self._parts.pool.retain(blocks)
        first = ticket.num_cached_tokens // BLOCK_SIZE
        num_parts = self._layout.num_parts
        tiles = range(first * num_parts, (first + len(ticket.block_ids)) * num_parts)
        without = set(range(tiles.start + self._layout.statistics, tiles.stop, num_parts))
        complete = range(tiles.start, ticket.num_tokens // BLOCK_SIZE * num_parts)
        missing = (set(tiles) - without) | without.intersection(complete)
        arrivals = Arrivals(ticket.ticket_id, self._layout.num_layers, missing)
        request = admission.request
        sequence = DecodeSequence(request, blocks, list(request.token_ids), arrivals=arrivals)
        self._sequences[ticket.ticket_id] = sequence
        return sequence

    def arrive(self, sequence: DecodeSequence, message: Arrived) -> str:
        """Count what has come; what is wrong with it, or nothing. What was told before is ignored."""
        arrivals = sequence.arrivals
        if arrivals is None or not arrivals.take(message.tiles):
            return ""
        store = self._parts.store
        if self._parts.config.engine.verify_kv:
            mine = store.tile_digests(message.tiles, sequence.block_ids, landed=True)
            wrong = sorted(layer for layer in mine if mine[layer] != message.digests.get(layer))
            if wrong:
                return f"the digests of tiles in layers {wrong} differ from the writer's"
        store.land_tiles(message.tiles, sequence.block_ids)
        self._count_bytes(sequence, message.num_bytes)
        self._end_stall(sequence)
        return ""

    def stall(self, sequence: DecodeSequence, lacking: Tiles) -> None:
        """The sequence's step lacked tiles: it waits for them, and they are asked for."""
        arrivals = sequence.arrivals
        assert arrivals is not None
        arrivals.lacking, arrivals.stalled_s = lacking, time.monotonic()
        self._ask(arrivals.ticket_id, lacking)

    def complete(self, ticket_id: TicketId) -> DecodeSequence | None:
        """All has come, what was not told of too. The sequence, if one started."""
        sequence = self._sequences.pop(ticket_id, None)
        if sequence is None or sequence.arrivals is None:
            return sequence
        rest = sequence.arrivals.rest()
        self._parts.store.land_tiles(rest, sequence.block_ids)
        self._count_bytes(sequence, sum(self._tile_bytes(tile) for tiles in rest.values() for tile in tiles))
        sequence.arrivals.lacking = {}
        self._end_stall(sequence)
        sequence.arrivals = None
        return sequence

    def renew(self, now_s: float) -> None:
        """Tell the writers that the rest is still wanted, four times per lease."""
        if now_s < self._next_renewal_s:
            return
        self._next_renewal_s = now_s + self._parts.config.engine.lease_s / 4
        for ticket_id in self._sequences:
            self._ask(ticket_id, {})

    def _ask(self, ticket_id: TicketId, tiles: Mapping[int, set[int]]) -> None:
        sorted_tiles = {layer: tuple(sorted(found)) for layer, found in tiles.items()}
        self._parts.send(Wanted(ticket_id=ticket_id, tiles=sorted_tiles))

    def _end_stall(self, sequence: DecodeSequence) -> None:
        arrivals = sequence.arrivals
        assert arrivals is not None
        if arrivals.stalled_s is None or arrivals.is_stalled:
            return
        stall_s = time.monotonic() - arrivals.stalled_s
        arrivals.stalled_s = None
        sequence.hand_off += HandOff(num_stalls=1, stall_s=stall_s)
        self._parts.counters["kv_stalls"] += 1
        self._parts.counters["kv_stall_us"] += int(stall_s * 1e6)

    def _tile_bytes(self, tile: int) -> int:
        layout = self._layout
        if tile % layout.num_parts == layout.statistics:
            return stats_bytes(layout) // layout.num_layers
        return layout.page_bytes // layout.num_kv_heads

    def _count_bytes(self, sequence: DecodeSequence, num_bytes: int) -> None:
        is_first = len(sequence.token_ids) == sequence.request.num_prompt_tokens
        sequence.hand_off += HandOff(num_bytes if is_first else 0, num_bytes)
