"""A batch of spans, split into the runs of rows that attend in the same way.

Knows positions and settings. Knows nothing of keys.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvrelay.cache.arrivals import Arrivals
from kvrelay.sparse import SparseAttention


@dataclass(frozen=True, slots=True)
class Span:
    """`length` new tokens of one sequence from position `start`, and the pages that hold the sequence.

    `sparse=None` is dense. Otherwise the rows from position `prompt_end` on attend one by one, as when they
    were generated: a request that starts again after it lost its pages gets the same keys as before.

    Where it `is_watched`, the tiles that the last row reads, or would if it were generated, are noted; where
    there are `arrivals`, those that have not come yet.
    """

    start: int
    length: int
    block_ids: Sequence[int]
    sparse: SparseAttention | None = None
    prompt_end: int = 0
    is_watched: bool = False
    arrivals: Arrivals | None = None

    @property
    def end(self) -> int:
        """Tokens in the cache after this span: the sequence's KV length."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one span that attend alike: positions `start` to `end`, of which `row` is the first's row.

    `one_by_one`: each row is a sequence of its own that ends with it.
    """

    span: int
    row: int
    start: int
    end: int
    one_by_one: bool
    sparse: SparseAttention | None


def runs_of(spans: Sequence[Span]) -> list[Run]:
    """The runs of every span, in order of their rows."""
    found: list[Run] = []
    row = 0
    for index, span in enumerate(spans):
        for start, end, one_by_one, sparse in _cut(span):
            found.append(Run(index, row + start - span.start, start, end, one_by_one, sparse))
        row += span.length
    return found


def _cut(span: Span) -> Iterable[tuple[int, int, bool, SparseAttention | None]]:
    if span.sparse is None:
        yield span.start, span.end, span.length == 1, None
        return
    prompt_end = min(max(span.prompt_end, span.start), span.end)
    for start, end, is_generated in ((span.start, prompt_end, False), (prompt_end, span.end, True)):
        first_sparse = span.sparse.first_sparse_position(is_generated=is_generated)
        first_sparse = min(max(first_sparse, start), end)
        if start < first_sparse:
            yield start, first_sparse, first_sparse - start == 1, None
        if first_sparse < end:
            yield first_sparse, end, is_generated, span.sparse
