"""Sparse rows of a batch: cut anywhere, in chunks, alone or again, they read the same keys."""

import errno
import fcntl
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kvrelay.attention import PagedAttention, Span, call, crossover
from kvrelay.attention.call import selection_config
from kvrelay.attention.crossover import FILE, NEVER, Place, measured
from kvrelay.attention.spans import Run
from kvrelay.attention.watch import Watch
from kvrelay.cache.arrivals import Arrivals
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.config import EngineConfig
from kvrelay.errors import InvalidConfig
from kvrelay.sparse import SELECTORS, AttentionUse, SparseAttention
from kvrelay.types import BLOCK_SIZE, KVLayout, TicketId, num_blocks
from kvrelay_kernels import KVBlockStats

HEAD_DIM, KV_HEADS, Q_HEADS, NUM_BLOCKS = 8, 2, 4, 24
SMALL = SparseAttention(
    budget_tokens=256,
    sink_blocks=1,
    local_blocks=1,
    dense_layers=(),
    dense_below_tokens=0,
    candidate_tokens=0,
)
TOTAL, PROMPT = 1100, 1000


def empty_store(num_layers: int = 1) -> KVStore:
    layout = KVLayout(
        model="m", dtype="float32", num_layers=num_layers, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    buffer = memoryview(bytearray(memory_bytes(layout, NUM_BLOCKS, keeps_stats=True)))
    store = KVStore(layout, NUM_BLOCKS, buffer, torch.device("cpu"), keeps_stats=True)
    store.pages.fill_(torch.nan)
    return store


@dataclass
class Sequence_:
    """One random sequence; `attend` runs its next tokens and keeps what came out."""

    sparse: SparseAttention | None = SMALL
    num_layers: int = 1
    q: torch.Tensor = field(init=False)
    outs: list[torch.Tensor] = field(default_factory=list)
    use: AttentionUse = field(default_factory=AttentionUse)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.q, self.k, self.v = (
            torch.randn(TOTAL, heads, HEAD_DIM, generator=generator) * 2
            for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
        )
        self.store = empty_store(self.num_layers)
        self.blocks = random.Random(1).sample(range(NUM_BLOCKS), num_blocks(TOTAL))
        self.done = 0

    def attend(self, *lengths: int, prompt_end: int = PROMPT) -> torch.Tensor:
        for length in lengths:
            start, end = self.done, self.done + length
            span = Span(start, length, self.blocks, self.sparse, prompt_end)
            attend = PagedAttention(self.store, [span])
            for layer in range(self.num_layers):
                out = attend(layer, self.q[start:end], self.k[start:end], self.v[start:end])
            self.outs.append(out)
            self.use += attend.uses()[0]
            self.done = end
        return torch.cat(self.outs)


def dense(start: int, end: int) -> torch.Tensor:
    sequence = Sequence_(sparse=None)
    sequence.attend(*([start] if start else []), end - start)
    return sequence.outs[-1]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("selector", SELECTORS)
def test_chunks_of_whole_groups_equal_the_whole_prompt(selector: str, exact: bool) -> None:
    chosen = msgspec.structs.replace(SMALL, selector=selector, exact=exact)
    whole = Sequence_(chosen).attend(PROMPT)
    chunked = Sequence_(chosen).attend(256, 512, PROMPT - 768)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, dense(0, PROMPT), atol=1e-3), "the budget was meant to leave keys out"


@pytest.mark.parametrize(
    "settings", [{}, {"exact": False}, {"decode_budget_tokens": 128}, {"decode_budget_tokens": 1024}]
)
def test_rows_after_the_prompt_equal_those_of_decode(settings: dict[str, Any]) -> None:
    """A request that starts again recomputes generated tokens in chunks, and must find the same keys."""
    chosen = msgspec.structs.replace(SMALL, **settings)
    one_by_one = Sequence_(chosen).attend(PROMPT, *[1] * (TOTAL - PROMPT))
    again = Sequence_(chosen)
    torch.testing.assert_close(again.attend(768, TOTAL - 768), one_by_one, atol=1e-5, rtol=1e-5)
    as_prompt = Sequence_(chosen).attend(768, TOTAL - 768, prompt_end=TOTAL)
    assert not torch.allclose(as_prompt[PROMPT:], one_by_one[PROMPT:], atol=1e-3)


def test_a_budget_that_holds_everything_is_dense() -> None:
    everything = msgspec.structs.replace(SMALL, budget_tokens=num_blocks(TOTAL) * BLOCK_SIZE, top_p=1.0)
    sequence = Sequence_(everything)
    out = sequence.attend(PROMPT, *[1] * 30)
    torch.testing.assert_close(out, dense(0, PROMPT + 30), atol=1e-5, rtol=1e-5)
    assert sequence.use.share_of_pairs == 1.0


def test_dense_layers_and_dense_positions_read_everything() -> None:
    chosen = msgspec.structs.replace(SMALL, dense_layers=(1,))
    sequence = Sequence_(chosen, num_layers=2)
    torch.testing.assert_close(sequence.attend(PROMPT, 1), dense(0, PROMPT + 1), atol=1e-5, rtol=1e-5)
    assert 0.5 < sequence.use.share_of_pairs < 0.9
    below = msgspec.structs.replace(SMALL, dense_below_tokens=700)
    first = Sequence_(below).attend(PROMPT)
    torch.testing.assert_close(first[:768], dense(0, 768), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[768:], dense(768, PROMPT), atol=1e-3)


def test_a_dense_layer_lacks_every_tile_that_has_not_come() -> None:
    """Whatever was told: the token of a step that reads less than all would be wrong."""
    sparse, store = msgspec.structs.replace(SMALL, dense_layers=(0,)), empty_store()
    parts, blocks = store.layout.num_parts, range(num_blocks(TOTAL))
    arrivals = Arrivals(TicketId("t"), 1, range(len(blocks) * parts))
    span = Span(TOTAL - 1, 1, blocks, sparse, is_watched=True, arrivals=arrivals)
    q, lacking = torch.zeros(1, Q_HEADS, HEAD_DIM), {3 * parts, 9 * parts + 1}
    assert arrivals.take({0: set(range(len(blocks) * parts)) - lacking})
    watch = Watch(store, span, 0)
    assert watch(0, q)
    assert watch.tiles == {0: lacking}
    assert arrivals.take({0: lacking})
    watch = Watch(store, span, 0)
    assert not watch(0, q)
    assert watch.tiles == {}


def test_the_decode_budget_is_its_own() -> None:
    everything = msgspec.structs.replace(
        SMALL, decode_budget_tokens=num_blocks(TOTAL) * BLOCK_SIZE, top_p=1.0
    )
    sequence = Sequence_(everything)
    sequence.attend(PROMPT, 1)
    torch.testing.assert_close(sequence.outs[-1], dense(PROMPT, PROMPT + 1), atol=1e-5, rtol=1e-5)


def test_a_smaller_decode_budget_holds_where_the_prompt_was_within_its_own() -> None:
    """At position 700 prompt tokens read all 701 keys, generated ones three blocks at most."""
    sequence = Sequence_(msgspec.structs.replace(SMALL, budget_tokens=1024, decode_budget_tokens=192))
    sequence.attend(700, prompt_end=700)
    assert sequence.use.share_of_pairs == 1.0
    before = sequence.use
    sequence.attend(1, prompt_end=700)
    assert sequence.use.attended_pairs - before.attended_pairs == KV_HEADS * (
        2 * BLOCK_SIZE + 701 % BLOCK_SIZE
    )


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_budget_beyond_the_pool_takes_no_memory_and_changes_nothing(
    one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = msgspec.structs.replace(SMALL, budget_tokens=2**31 - 64, sink_blocks=2**24, top_p=0.5)
    config = selection_config(huge, NUM_BLOCKS, one_by_one=one_by_one)
    assert (config.budget, config.sink_blocks) == (NUM_BLOCKS + 1, NUM_BLOCKS)
    wide = msgspec.structs.replace(SMALL, budget_tokens=40 * NUM_BLOCKS * BLOCK_SIZE, top_p=0.5)
    lengths = [PROMPT, 1, 1] if one_by_one else [PROMPT]
    cut, whole = Sequence_(wide), Sequence_(wide)
    cut.attend(*lengths)
    monkeypatch.setattr(call, "selection_config", lambda own, _, **how: selection_config(own, 10**6, **how))
    assert torch.equal(whole.attend(*lengths), torch.cat(cut.outs))
    assert whole.use == cut.use
    assert cut.use.share_of_pairs < 0.9


def test_pairs_are_counted_as_they_are_read() -> None:
    sequence = Sequence_()
    sequence.attend(PROMPT, 1, 1)
    read, causal = 0, 0
    for position in range(PROMPT + 2):
        causal += position + 1
        own, listed = position % BLOCK_SIZE + 1, min(position // BLOCK_SIZE + 1, 4)
        read += position + 1 if position < 256 else own + (listed - 1) * BLOCK_SIZE
    expected = AttentionUse((PROMPT + 2) * KV_HEADS, read * KV_HEADS, causal * KV_HEADS)
    assert sequence.use == expected


def by_hand(sequence: Sequence_, first: int, listed: dict[int, list[int]]) -> torch.Tensor:
    """Rows from `first` on, each query head over its own blocks, causal: `[rows, Q_HEADS, HEAD_DIM]`."""
    rows = torch.arange(first, sequence.done)
    out = torch.empty(len(rows), Q_HEADS, HEAD_DIM)
    for head, blocks in listed.items():
        slots = torch.cat([torch.arange(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE) for b in blocks])
        slots = slots[slots < sequence.done]
        kv_head = head // (Q_HEADS // KV_HEADS)
        scores = sequence.q[rows, head] @ sequence.k[slots, kv_head].T / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(slots[None] > rows[:, None], -torch.inf)
        out[:, head] = scores.softmax(-1) @ sequence.v[slots, kv_head]
    return out


def exact_lists(sequence: Sequence_, first: int, distant: int) -> dict[int, list[int]]:
    """Sink, own and the `distant` blocks to which some row of the head gives most."""
    rows, own = torch.arange(first, sequence.done), first // BLOCK_SIZE
    found = {}
    for head in range(Q_HEADS):
        keys = sequence.k[: sequence.done, head // (Q_HEADS // KV_HEADS)]
        scores = sequence.q[rows, head] @ keys.T / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(torch.arange(sequence.done)[None] > rows[:, None], -torch.inf)
        mass = [block.sum(-1).max() for block in scores.softmax(-1).split(BLOCK_SIZE, dim=-1)]
        ranked = sorted(range(1, own), key=lambda block, mass=mass: -mass[block])
        found[head] = [0, *ranked[:distant], own]
    return found


def test_exact_gives_each_query_head_the_blocks_that_one_of_its_queries_attends_to_most() -> None:
    sequence = Sequence_(msgspec.structs.replace(SMALL, exact=True))
    sequence.attend(512, 64)  # seven blocks to choose from: all are candidates
    listed = exact_lists(sequence, 512, distant=2)
    assert len({tuple(sorted(blocks)) for blocks in listed.values()}) > KV_HEADS, "heads were to differ"
    torch.testing.assert_close(sequence.outs[-1], by_hand(sequence, 512, listed), atol=1e-5, rtol=1e-5)
    sequence.attend(1, prompt_end=576)
    listed = exact_lists(sequence, 576, distant=2)
    torch.testing.assert_close(sequence.outs[-1], by_hand(sequence, 576, listed), atol=1e-5, rtol=1e-5)


def test_exact_lists_count_once_per_kv_head() -> None:
    shared, own = Sequence_(), Sequence_(msgspec.structs.replace(SMALL, exact=True))
    shared.attend(PROMPT, 1, 1)
    own.attend(PROMPT, 1, 1)
    assert own.use == shared.use, "lists of one length, whoever shares them"


def test_mixed_settings_in_one_batch_do_not_disturb_each_other() -> None:
    chosen = [SMALL, None, msgspec.structs.replace(SMALL, selector="quest"), SMALL]
    alone = [Sequence_(sparse).attend(512, 200)[512:] for sparse in chosen]
    store = empty_store()
    generator = random.Random(5)
    # four sequences share one pool of pages: give each its own third of a larger store
    layout = msgspec.structs.replace(store.layout)
    pool = 4 * NUM_BLOCKS
    big = KVStore(
        layout,
        pool,
        memoryview(bytearray(memory_bytes(layout, pool, keeps_stats=True))),
        torch.device("cpu"),
        keeps_stats=True,
    )
    blocks = generator.sample(range(pool), pool)
    tables = [blocks[i * NUM_BLOCKS : (i + 1) * NUM_BLOCKS] for i in range(4)]
    source = Sequence_()
    for start, length in ((0, 512), (512, 200)):
        spans = [
            Span(start, length, table, sparse, PROMPT) for table, sparse in zip(tables, chosen, strict=True)
        ]
        q, k, v = (t[start : start + length].repeat(4, 1, 1) for t in (source.q, source.k, source.v))
        out = PagedAttention(big, spans)(0, q, k, v)
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-5, rtol=1e-5)


def complete(stats: KVBlockStats, blocks: Sequence[int]) -> list[torch.Tensor]:
    return [stats.minimum[blocks], stats.maximum[blocks], stats.mean[blocks]]


def test_statistics_kept_as_tokens_arrive_equal_those_of_received_pages() -> None:
    sequence = Sequence_(num_layers=2)
    sequence.attend(512, 300, *[1] * 100, 188, prompt_end=812)
    received = empty_store(2)
    received.pages.copy_(sequence.store.pages)
    received.refresh_stats(sequence.blocks[: num_blocks(sequence.done)], sequence.done)
    full = sequence.blocks[: sequence.done // BLOCK_SIZE]
    for layer in range(2):
        mine, theirs = sequence.store.stats(layer), received.stats(layer)
        assert mine is not None
        assert theirs is not None
        for a, b in zip(complete(mine, full), complete(theirs, full), strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
        coarse = mine.coarse_minimum[full].isfinite().all((1, 2))
        assert coarse.sum() == 5, "nodes of the tree live in the pages that complete them"
        assert torch.equal(mine.coarse_minimum[full][coarse], theirs.coarse_minimum[full][coarse])


def test_the_crossover_is_measured_once_for_all_workers(tmp_path: Path) -> None:
    auto = SparseAttention(budget_tokens=704, local_blocks=2, dense_layers=())
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    first = measured(auto, place, tmp_path)
    assert first is not None
    assert first.dense_below_tokens != "auto"
    assert first.decode_dense_below_tokens is not None
    assert 704 < first.dense_below_tokens <= NEVER
    assert 704 < first.decode_dense_below_tokens <= NEVER
    path = tmp_path / FILE
    known = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(dict.fromkeys(known, (4096, 8192))))
    torch.set_num_threads((threads := torch.get_num_threads()) + 1)  # another worker may have others
    second = measured(auto, place, tmp_path)
    torch.set_num_threads(threads)
    assert second == auto.with_crossover(4096, 8192)
    own = msgspec.structs.replace(auto, decode_dense_below_tokens=5)
    found = measured(own, place, tmp_path)
    assert found is not None
    assert (found.dense_below_tokens, found.decode_dense_below_tokens) == (4096, 5)
    assert measured(auto, replace(place, workers=[["prefill", None, 2]]), tmp_path) is not None
    assert len(msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int]])) == 2
    path.write_text("not json")
    assert measured(auto, place, tmp_path) is not None
    assert len(msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[int, int]])) == 1
    told = msgspec.structs.replace(auto, dense_below_tokens=5)
    assert measured(told, place, tmp_path) is told
    assert measured(None, place, tmp_path) is None


@pytest.mark.parametrize(
    ("selecting_s", "expected"),
    [((0.9, 2.9), (1536, 4096)), ((2.9, 0.9), (4096, 1536)), ((8.0, 99.0), (NEVER, NEVER))],
)
def test_the_crossover_is_where_reading_and_selecting_are_faster_than_reading_all(
    selecting_s: tuple[float, float], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which 1,024 keys take a second, and selecting for a prompt or a generated token these."""
    now_s = 0.0

    class FakeCall:
        def __init__(self, runs: Sequence[Run], spans: Sequence[Span], _: object) -> None:
            run, span = runs[0], spans[0]
            assert [own.one_by_one for own in runs] == [span.length == 1] * len(runs)
            self.takes_s = span.end / 1024
            if run.sparse is not None:
                self.takes_s = run.sparse.budget(is_generated=run.one_by_one) / 1024
                self.takes_s += selecting_s[run.one_by_one]

        def __call__(self, *_: object) -> None:
            nonlocal now_s
            now_s += self.takes_s

    monkeypatch.setattr(crossover, "Call", FakeCall)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    sparse = SparseAttention(budget_tokens=512, dense_below_tokens=0, dense_layers=(0,))
    assert crossover._measure(sparse, place) == expected


def test_a_crossover_that_cannot_be_measured_or_kept_is_refused(tmp_path: Path) -> None:
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    with pytest.raises(InvalidConfig, match=r"dense_below_tokens='auto': .*budget_tokens=65600"):
        EngineConfig(model="m", attention=SparseAttention(budget_tokens=65600))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"dense_below_tokens='auto': .* cannot be written"):
        measured(SparseAttention(), place, tmp_path / "file")


def fails_with(code: int) -> Callable[..., None]:
    def fail(*_: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_crossover_that_is_known_needs_no_writing_and_one_that_is_not_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    auto = SparseAttention(budget_tokens=704)
    monkeypatch.setattr(crossover, "_measure", lambda *_: (4096, 8192))
    for owner, name, code in ((fcntl, "flock", errno.ENOLCK), (json, "dump", errno.ENOSPC)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails_with(code))
            with pytest.raises(InvalidConfig, match=rf"{FILE} cannot be written \({os.strerror(code)}\)"):
                measured(auto, place, tmp_path)
    found = measured(auto, place, tmp_path)
    for owner, name in ((Path, "mkdir"), (fcntl, "flock"), (json, "dump")):
        monkeypatch.setattr(owner, name, fails_with(errno.EROFS))
    assert measured(auto, place, tmp_path) == found == auto.with_crossover(4096, 8192)


def test_boards_of_different_kinds_share_one_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them a worker runs on, and whoever measures first."""
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    boards, current = ["H200", "L4"], 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(boards))
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda index=None: boards[current if index is None else index]
    )
    first = crossover._key(SparseAttention(), place)
    current = 1
    assert crossover._key(SparseAttention(), place) == first
    boards[1] = "T4"
    assert crossover._key(SparseAttention(), place) != first


def test_other_kernels_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(layout=empty_store().layout, num_q_heads=Q_HEADS, device=torch.device("cpu"))
    keys = []
    for sources in (1, 2):
        library = SimpleNamespace(kvr_sources=lambda sources=sources: sources)
        monkeypatch.setattr(crossover, "instruction_set", lambda: "avx2")
        monkeypatch.setattr(crossover, "library", lambda library=library: library)
        keys.append(crossover._key(SparseAttention(), place))
    assert keys[0] != keys[1]


def test_softmax_scale_is_the_models() -> None:
    """A selection of everything at one position: exact attention by hand."""
    everything = msgspec.structs.replace(SMALL, budget_tokens=num_blocks(TOTAL) * BLOCK_SIZE, top_p=1.0)
    sequence = Sequence_(everything)
    sequence.attend(300, 1, prompt_end=300)
    scores = sequence.k[:301, 0] @ sequence.q[300, 0] / math.sqrt(HEAD_DIM)
    torch.testing.assert_close(sequence.outs[-1][0, 0], scores.softmax(0) @ sequence.v[:301, 0])


def test_lists_ranked_by_every_key_are_the_best_whatever_the_budget() -> None:
    """Of a prompt with no more keys than candidates, statistics leave nothing out: lists are the oracle's."""
    settings, prompt = msgspec.structs.replace(SMALL, top_p=None), 15 * BLOCK_SIZE
    found = {
        way: Sequence_(msgspec.structs.replace(settings, **settings_of_way)).attend(
            prompt, *[1] * (TOTAL - prompt), prompt_end=prompt
        )
        for way, settings_of_way in {
            "ranked": {"candidate_tokens": 8192},
            "oracle": {"selector": "oracle"},
            "few": {},
        }.items()
    }
    torch.testing.assert_close(found["ranked"], found["oracle"], atol=1e-5, rtol=1e-5)
    for rows in (slice(None, prompt), slice(prompt, None)):
        assert not torch.allclose(found["few"][rows], found["oracle"][rows], atol=1e-3)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_candidates_are_twice_the_budget_or_what_was_asked_for(one_by_one: bool) -> None:
    def candidates(**settings: Any) -> int:
        return selection_config(SparseAttention(**settings), 1000, one_by_one=one_by_one).num_candidates

    assert candidates() == candidates(budget_tokens=1024) == candidates(exact=False, budget_tokens=512) == 128
    assert candidates(budget_tokens=1024, candidate_tokens=0) == 32
    assert candidates(budget_tokens=8192) == 256
    assert candidates(candidate_tokens=64_000) == 1000
    assert candidates(candidate_tokens=1_000_000) == 1000, "all that the pool has"
