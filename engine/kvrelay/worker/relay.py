"""What of a prefill job's KV leaves when: layer by layer as it is computed, and first what decode needs.

A full hand-off ends before decode starts. In a sparse one the statistics of all blocks and what every step
reads overtake the rest, so do the tiles that the prompt's last queries read, and decode starts with those.
"""

import time
from collections.abc import Collection, Mapping

from kvrelay.scheduler.prefill import Posted, PrefillJob
from kvrelay.sparse import SparseAttention
from kvrelay.transport.base import Write, WriteDone
from kvrelay.types import BLOCK_SIZE, num_blocks
from kvrelay.wire import Arrived
from kvrelay.worker.parts import WorkerParts

TILES_PER_WRITE = 128  # an urgent write waits for one of those that are not at most
MAX_TOLD_TILES = 1 << 21  # a message names them; those that wait take up to 64 bytes each, 134 MB


class Relay:
    """Posts the writes of jobs that are not local, and counts them home."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts, self._layout = parts, parts.store.layout
        self._layers = range(parts.store.layout.num_layers)

    def can_tell(self, job: PrefillJob) -> bool:
        """Whether the job's tiles are few enough to be followed one by one."""
        num_tiles = num_blocks(job.num_tokens) * self._layout.num_parts * self._layout.num_layers
        return num_tiles <= MAX_TOLD_TILES

    def send(self, job: PrefillJob, layer: int, pages: range) -> None:
        """Post K and V of those of the pages that decode lacks."""
        pages = range(max(pages.start, job.first_page), pages.stop)
        if not job.is_local and pages:
            self._post(job, layer, pages)

    def send_statistics(self, job: PrefillJob, pages: range) -> None:
        """These pages are computed: post their statistics, which every step reads, before anything else.

        While they are on the link, tiles that decode surely reads can still overtake the rest.
        """
        complete = range(max(pages.start, job.first_page), min(pages.stop, job.num_tokens // BLOCK_SIZE))
        if not complete:
            return
        parts = [self._layout.statistics] * len(complete)
        for layer in self._layers:
            self._post(job, layer, complete, parts, is_urgent=True)

    def hurry_forced(self, job: PrefillJob, sparse: SparseAttention, pages: range) -> None:
        """Let what a decode step surely reads of these pages overtake the rest.

        That is, in layers that select: sink and recent blocks; in dense layers all of them; and everywhere
        the last block, which decode will write to.
        """
        pages = range(max(pages.start, job.first_page), pages.stop)
        recent = min(job.num_tokens // BLOCK_SIZE - sparse.local_blocks, num_blocks(job.num_tokens) - 2)
        forced = [page for page in pages if page < sparse.sink_blocks or page > recent]
        wanted = {layer: pages if layer in sparse.dense_layers else forced for layer in self._layers}
        self.hurry(job, {layer: self._whole(found) for layer, found in wanted.items()})

    def hurry(self, job: PrefillJob, wanted: Mapping[int, Collection[int]]) -> None:
        """Let tiles that still wait to leave overtake the rest; others are here, or on their way."""
        waiting: dict[int, list[Posted]] = {layer: [] for layer, tiles in wanted.items() if tiles}
        for posted in job.outstanding.values():
            if not posted.write.is_urgent and posted.write.layer in waiting:
                waiting[posted.write.layer].append(posted)
        for layer, writes in waiting.items():
            first, withdrawn = set(wanted[layer]), set[int]()
            for posted in writes:
                tiles = self._tiles(posted)
                if not first.isdisjoint(tiles) and self._parts.transport.withdraw(posted.write):
                    del job.outstanding[id(posted.write)]
                    withdrawn |= tiles
            self._post_tiles(job, layer, withdrawn & first, is_urgent=True)
            self._post_tiles(job, layer, withdrawn - first)

    def count(self, job: PrefillJob, event: WriteDone) -> int:
        """A write is complete; the tokens whose last layer has left with it."""
        posted, num_tiles = job.outstanding.pop(id(event.write)), self._layout.statistics
        job.completed_s = job.last_write_s = job.unreported_s = event.end_s
        if job.early is not None:
            job.untold.append(posted)
            job.num_untold_bytes += event.num_bytes
        if event.write.parts is not None and event.write.parts[0] == self._layout.statistics:
            return 0
        job.num_bytes_written += event.num_bytes
        if posted.write.layer < self._layout.num_layers - 1:
            return 0
        before = job.num_last_tiles
        job.num_last_tiles += len(self._tiles(posted))
        return (job.num_last_tiles // num_tiles - before // num_tiles) * BLOCK_SIZE

    def tell(self, job: PrefillJob) -> Arrived | None:
        """What decode is told now of a job in parts: that it may start, or what has come since."""
        if job.early is None or not job.is_computed or not job.untold:
            return None
        may_start = job.holds_until_s is None
        last = num_blocks(job.num_tokens) - 1  # page that decode writes to
        for posted in job.outstanding.values() if may_start else ():
            is_needed = posted.write.layer in job.early.dense_layers or last in posted.pages
            if posted.write.is_urgent or is_needed:  # it may have begun before it could be made urgent
                return None
        if may_start:
            job.holds_until_s = time.monotonic() + self._parts.config.engine.lease_s
        tiles: dict[int, set[int]] = {}
        for posted in job.untold:
            tiles.setdefault(posted.write.layer, set()).update(self._tiles(posted))
        message = Arrived(
            ticket_id=job.ticket.ticket_id,
            layout_fingerprint=self._layout.fingerprint(),
            may_start=may_start,
            tiles={layer: tuple(sorted(found)) for layer, found in tiles.items()},
            num_bytes=job.num_untold_bytes,
            digests=self._digests(job, tiles),
        )
        job.untold, job.num_untold_bytes = [], 0
        return message

    def _digests(self, job: PrefillJob, tiles: Mapping[int, Collection[int]]) -> dict[int, str]:
        if not self._parts.config.engine.verify_kv:
            return {}
        return self._parts.store.tile_digests(tiles, job.block_ids)

    def _whole(self, pages: Collection[int]) -> set[int]:
        """All tiles of K and V of the pages."""
        num_parts = self._layout.num_parts
        return {page * num_parts + part for page in pages for part in range(num_parts - 1)}

    def _tiles(self, posted: Posted) -> set[int]:
        parts = posted.write.parts
        if parts is None:
            return self._whole(posted.pages)
        num_parts = self._layout.num_parts
        return {page * num_parts + part for page, part in zip(posted.pages, parts, strict=True)}

    def _post_tiles(self, job: PrefillJob, layer: int, tiles: set[int], *, is_urgent: bool = False) -> None:
        num_parts, in_order = self._layout.num_parts, sorted(tiles)
        for start in range(0, len(tiles), TILES_PER_WRITE):
            some = in_order[start : start + TILES_PER_WRITE]
            pages, parts = [tile // num_parts for tile in some], [tile % num_parts for tile in some]
            self._post(job, layer, pages, parts, is_urgent=is_urgent)

    def _post(
        self,
        job: PrefillJob,
        layer: int,
        pages: Collection[int],
        parts: list[int] | None = None,
        *,
        is_urgent: bool = False,
    ) -> None:
        job.last_write_s = time.monotonic()
        if not job.outstanding:
            job.unreported_s = job.last_write_s
        first_page = job.first_page
        write = Write(
            ticket_id=job.ticket.ticket_id,
            peer=job.ticket.decode_worker,
            layer=layer,
            source_blocks=[job.block_ids[page] for page in pages],
            target_blocks=[job.ticket.block_ids[page - first_page] for page in pages],
            ready=self._parts.runner.copy_fence(),
            parts=parts,
            is_urgent=is_urgent,
        )
        job.outstanding[id(write)] = Posted(write, tuple(pages))
        self._parts.transport.write(write)
