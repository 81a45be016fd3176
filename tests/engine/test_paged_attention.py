"""PagedAttention against plain dense causal attention in float64, page by page and chunk by chunk."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.store import KVStore
from kvrelay.types import BLOCK_SIZE, KVLayout, num_blocks

HEAD_DIM = 8
NUM_BLOCKS = 24


def store_of(num_kv_heads: int = 2, num_layers: int = 1) -> KVStore:
    layout = KVLayout(
        model="m", dtype="float32", num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM
    )
    buffer = memoryview(bytearray(NUM_BLOCKS * layout.block_bytes))
    return KVStore(layout, NUM_BLOCKS, buffer, torch.device("cpu"))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Row by row in float64. q `[T, Hq, D]` from position `start`; k and v `[start + T, Hkv, D]`."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        end = start + row + 1
        for head in range(q.shape[1]):
            scores = k[:end, head // group] @ q[row, head] / math.sqrt(q.shape[2])
            out[row, head] = scores.softmax(-1) @ v[:end, head // group]
    return out


class Sequences:
    """Random sequences with scattered pages, attended span by span and checked against the reference."""

    def __init__(self, totals: Sequence[int], num_q_heads: int, num_kv_heads: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.store = store_of(num_kv_heads)
        free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(free)
        self.blocks = [[free.pop() for _ in range(num_blocks(total))] for total in totals]
        self.free = free

        def values(total: int, heads: int) -> torch.Tensor:
            return torch.randn(total, heads, HEAD_DIM, generator=generator)

        self.q = [values(total, num_q_heads) for total in totals]
        self.k = [values(total, num_kv_heads) for total in totals]
        self.v = [values(total, num_kv_heads) for total in totals]
        self.done = [0] * len(totals)

    def attend(self, lengths: dict[int, int]) -> None:
        """The next `length` tokens of each sequence, in one batch."""
        spans = [Span(self.done[i], length, self.blocks[i]) for i, length in lengths.items()]

        def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
            pieces = [tensors[i][self.done[i] : self.done[i] + length] for i, length in lengths.items()]
            return torch.cat(pieces)

        out = PagedAttention(self.store, spans)(0, flat(self.q), flat(self.k), flat(self.v))
        first = 0
        for i, length in lengths.items():
            start, end = self.done[i], self.done[i] + length
            expected = reference(self.q[i][start:end], self.k[i][:end], self.v[i][:end], start)
            torch.testing.assert_close(out[first : first + length].double(), expected, atol=2e-5, rtol=2e-5)
            first, self.done[i] = first + length, end


@pytest.mark.parametrize("total", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_whole_prompt_equals_dense(total: int, heads: tuple[int, int]) -> None:
    Sequences([total], *heads).attend({0: total})


@pytest.mark.parametrize("total", [65, 129, 200])
def test_chunks_equal_the_whole(total: int) -> None:
    sequences = Sequences([total], 4, 2)
    while sequences.done[0] < total:
        sequences.attend({0: min(64, total - sequences.done[0])})


def test_mixed_spans_in_one_batch_do_not_see_each_other() -> None:
    sequences = Sequences([130, 64, 70, 1], 4, 2)
    sequences.attend({0: 64, 2: 64})
    sequences.attend({0: 66, 1: 64, 2: 1, 3: 1})
    sequences.attend({2: 5})


@pytest.mark.parametrize("totals", [[2], [65, 64], [129, 2, 65, 66]])
def test_decode_batch_of_unequal_lengths_equals_dense(totals: list[int]) -> None:
    sequences = Sequences(totals, 6, 2)
    for i, total in enumerate(totals):
        sequences.attend({i: total - 1})
    sequences.attend(dict.fromkeys(range(len(totals)), 1))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 140), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 1)]),
    st.integers(0, 1000),
)
def test_any_schedule_equals_dense(totals: list[int], heads: tuple[int, int], seed: int) -> None:
    sequences, chooser = Sequences(totals, *heads, seed), random.Random(seed)
    while any(done < total for done, total in zip(sequences.done, totals, strict=True)):
        rest = {i: total - sequences.done[i] for i, total in enumerate(totals) if sequences.done[i] < total}
        chosen = chooser.sample(sorted(rest), chooser.randint(1, len(rest)))
        one_each = chooser.random() < 0.3
        sequences.attend({i: 1 if one_each else chooser.randint(1, rest[i]) for i in chosen})


@pytest.mark.parametrize("poison", [1e30, float("nan")])
@pytest.mark.parametrize("where", ["foreign pages", "rest of the last page"])
@pytest.mark.parametrize("phase", ["prefill", "chunk", "decode", "decode beside a longer one"])
def test_what_lies_outside_a_sequence_never_shows(poison: float, where: str, phase: str) -> None:
    """A page keeps what its last owner left, NaN included: none of it may reach the next owner."""
    sequences = Sequences([70, 150], 4, 2)
    sequences.attend({1: 149})
    own = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bool)
    if phase != "prefill":
        sequences.attend({0: 64 if phase == "chunk" else 69})
    for blocks, total in zip(sequences.blocks, (70, 150), strict=True):
        for position in range(total):
            own[blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = True
    used = torch.zeros(NUM_BLOCKS, dtype=torch.bool)
    used[[*sequences.blocks[0], *sequences.blocks[1]]] = True
    target = ~own & (used if where == "rest of the last page" else ~used)[:, None]
    for pages in sequences.store.layer(0):
        pages.copy_(torch.where(target[:, None, :, None], poison, pages))
    match phase:
        case "prefill":
            sequences.attend({0: 70})
        case "chunk":
            sequences.attend({0: 6})
        case "decode":
            sequences.attend({0: 1})
        case _:
            sequences.attend({0: 1, 1: 1})


def test_only_the_spans_own_slots_are_written() -> None:
    sequences = Sequences([66, 3], 4, 2)
    before = sequences.store.pages.clone().fill_(7.0)
    sequences.store.pages.fill_(7.0)
    sequences.attend({0: 66, 1: 3})
    for blocks, total in zip(sequences.blocks, (66, 3), strict=True):
        for position in range(total):
            before[0, :, blocks[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = 0.0
            sequences.store.pages[0, :, blocks[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = 0.0
    assert torch.equal(sequences.store.pages, before)


@pytest.mark.parametrize("length", [1, 65])
def test_after_layer_follows_each_layer_once_when_its_pages_are_written(length: int) -> None:
    store, seen = store_of(num_layers=3), list[tuple[int, float]]()
    blocks = [5, 2]

    def after_layer(layer: int) -> None:
        seen.append((layer, float(store.pages[layer, 1, 5, 0, 0, 0])))

    attend = PagedAttention(store, [Span(0, length, blocks)], after_layer)
    for layer in range(3):
        kv = torch.full((length, 2, HEAD_DIM), float(layer + 1))
        attend(layer, torch.ones(length, 4, HEAD_DIM), kv, kv)
    assert seen == [(0, 1.0), (1, 2.0), (2, 3.0)]
