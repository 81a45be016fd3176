"""A decode step in one C++ call: equal to torch's, the same in any batch, and careful with pages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.arrivals import Arrivals
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.errors import InvalidConfig
from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.native import NativeDecoder
from kvrelay.native_steps import NativeSteps, pages_of
from kvrelay.runner import Runner
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.sparse import SparseAttention
from kvrelay.types import KVLayout, RequestId, RequestSpec, TicketId
from kvrelay_kernels import InvalidArgument
from kvrelay_kernels.cpu.native import library
from tiny_engine import prompts, tiny_llm, write_tiny_model

NUM_BLOCKS = 24
CONTEXTS = (1, 2, 63, 64, 65, 130, 7)
built = pytest.mark.skipif(library.instruction_set() is None, reason=library.HOW_TO_BUILD)


def store_of(
    decoder: Decoder | NativeDecoder,
    dtype: str = "float32",
    fill: float = float("nan"),
    *,
    keeps_stats: bool = False,
) -> KVStore:
    """Pages full of `fill`."""
    spec = decoder.spec
    layout = KVLayout(
        model="m",
        dtype=dtype,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    buffer = memoryview(bytearray(memory_bytes(layout, NUM_BLOCKS, keeps_stats=keeps_stats)))
    store = KVStore(layout, NUM_BLOCKS, buffer, torch.device("cpu"), keeps_stats=keeps_stats)
    store.pages.fill_(fill)
    return store


def request(tokens: list[int]) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId("r"),
        attempt=1,
        arrival=0,
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens),
        max_total_tokens=len(tokens) + 10,
        params=SamplingParams(),
        seed=0,
    )


def scattered_blocks() -> list[list[int]]:
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    return [[free.pop() for _ in range(-(-length // 64))] for length in CONTEXTS]


def prefill(decoder: Decoder | NativeDecoder, store: KVStore, blocks: list[list[int]]) -> list[int]:
    """All tokens but the last of each prompt into the pages; returns the last ones."""
    texts = prompts(*CONTEXTS)
    spans = [Span(0, len(text) - 1, ids) for text, ids in zip(texts, blocks, strict=True) if len(text) > 1]
    tokens = torch.tensor([token for text in texts for token in text[:-1]])
    positions = torch.cat([torch.arange(span.length) for span in spans])
    with torch.inference_mode():
        decoder.forward(tokens, positions, PagedAttention(store, spans))
    return [text[-1] for text in texts]


def torch_step(
    decoder: Decoder | NativeDecoder, store: KVStore, tokens: list[int], blocks: list[list[int]]
) -> torch.Tensor:
    spans = [Span(length - 1, 1, ids) for length, ids in zip(CONTEXTS, blocks, strict=True)]
    positions = torch.tensor(CONTEXTS) - 1
    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens), positions, PagedAttention(store, spans))
        return decoder.logits(hidden)


def native_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> NativeDecoder:
    decoder = load_model(directory, "cpu", dtype, "native")
    assert isinstance(decoder, NativeDecoder)
    return decoder


@built
def test_step_equals_the_torch_decoder_and_stores_the_same_kv(tiny_directory: Path) -> None:
    native, plain = native_decoder(tiny_directory), load_model(tiny_directory, "cpu", torch.float32, "torch")
    blocks, stores = scattered_blocks(), [store_of(native), store_of(plain, fill=1e4)]
    tokens = prefill(native, stores[0], blocks)
    assert tokens == prefill(plain, stores[1], blocks)
    before = stores[0].pages.clone()
    logits, _ = native.step(tokens, CONTEXTS, blocks, pages_of(stores[0]))
    expected = torch_step(plain, stores[1], tokens, blocks)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    pages = stores[0].pages.nan_to_num(1e4)
    torch.testing.assert_close(pages, stores[1].pages, rtol=1e-5, atol=1e-5)
    changed = (stores[0].pages != before) & ~(stores[0].pages.isnan() & before.isnan())
    places = {(int(b), int(t)) for _, _, b, _, t, _ in changed.nonzero()}
    assert places == {(ids[-1], (n - 1) % 64) for ids, n in zip(blocks, CONTEXTS, strict=True)}


@built
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_decodes_the_same_to_the_bit_in_any_batch(tiny_directory: Path, dtype: str) -> None:
    native, blocks = native_decoder(tiny_directory, getattr(torch, dtype)), scattered_blocks()
    store = store_of(native, dtype)
    tokens = prefill(native, store, blocks)
    pages = pages_of(store)
    together, _ = native.step(tokens, CONTEXTS, blocks, pages)
    kept = store.pages.clone()
    assert together.isfinite().all()
    for i, length in enumerate(CONTEXTS):
        assert torch.equal(native.step([tokens[i]], [length], [blocks[i]], pages)[0][0], together[i]), length
    order = [4, 2, 6]
    some, _ = native.step(*([x[i] for i in order] for x in (tokens, CONTEXTS, blocks)), pages)
    assert torch.equal(some, together[order])
    assert torch.equal(store.pages.nan_to_num(), kept.nan_to_num())


@built
def test_prompts_are_computed_the_same_to_the_bit_in_any_batch(tiny_directory: Path) -> None:
    native, blocks = native_decoder(tiny_directory), scattered_blocks()
    texts = prompts(*CONTEXTS)
    queries: dict[tuple[int, int], torch.Tensor] = {}

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.cat((q, k, v), dim=1)
        assert torch.equal(queries.setdefault((layer, len(q)), rows), rows)
        return q

    flat = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    together = native.forward(flat, positions, attend).split([len(text) for text in texts])
    for text, expected in zip(texts, together, strict=True):
        queries.clear()
        alone = native.forward(torch.tensor(text), torch.arange(len(text)), attend)
        assert torch.equal(alone, expected)
    assert len(blocks) == len(texts)


@built
def test_bfloat16_weights_in_float32_are_exactly_the_widened_ones(tmp_path: Path) -> None:
    short = write_tiny_model(tmp_path / "short", dtype="bfloat16")
    text = torch.tensor(prompts(20)[0])
    results = []
    for impl in ("native", "torch"):
        decoder = load_model(short, "cpu", torch.float32, impl)
        results.append(decoder.logits(decoder.forward(text, torch.arange(20), lambda layer, q, k, v: q)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


SELECTING = SparseAttention(budget_tokens=128, local_blocks=1, dense_below_tokens=0, candidate_tokens=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "reads everything": {"dense_below_tokens": 256},
    "lists for each head": {},
    "every block a candidate": {"candidate_tokens": 8192},
    "a dense layer": {"dense_layers": (1,)},
    "shared lists": {"exact": False, "top_p": 1.0},
}


@built
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 96])
@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_of_a_sparse_engine_are_one_call_and_the_same_to_the_bit_layer_by_layer(
    tmp_path: Path, dtype: str, head_dim: int, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, pages, the statistics of pages that became full, and what was read."""
    directory = write_tiny_model(tmp_path, head_dim=head_dim)
    native, blocks = native_decoder(directory, getattr(torch, dtype)), scattered_blocks()
    sparse = msgspec.structs.replace(SELECTING, **SETTINGS[settings])
    found = []
    for is_one_call in (True, False):
        store = store_of(native, dtype, keeps_stats=True)
        prefill(native, store, blocks)
        runner = Runner(native, store, frozenset(), sparse)
        batch = [
            DecodeSequence(request(text), list(ids), list(text))
            for text, ids in zip(prompts(*CONTEXTS), blocks, strict=True)
        ]
        with monkeypatch.context() as patch, torch.inference_mode():
            if is_one_call:
                patch.setattr(native.transformer, "before_attention", None)
            else:
                patch.setattr(NativeSteps, "run", lambda *arguments: None)
            found.append((runner.logits(batch), runner.attention, store.memory.tensors))
    (logits, read, ours), (expected, read_by_layer, theirs) = found
    assert torch.equal(logits, expected)
    assert read == read_by_layer
    assert (read[5].share_of_pairs < 1) is (settings != "reads everything")
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())
    full = blocks[CONTEXTS.index(64)][0]
    assert ours[1][:, :3, full].isfinite().all(), "statistics of the page that became full"


@built
def test_rows_that_attend_in_different_ways_go_layer_by_layer(tiny_directory: Path) -> None:
    native, blocks = native_decoder(tiny_directory), scattered_blocks()
    store = store_of(native, keeps_stats=True)
    prefill(native, store, blocks)
    steps = NativeSteps(native, store, SELECTING)
    batch = [
        DecodeSequence(request(text), ids, text) for text, ids in zip(prompts(*CONTEXTS), blocks, strict=True)
    ]

    def last_with(attention: str | SparseAttention) -> list[DecodeSequence]:
        other = msgspec.structs.replace(batch[-1].request, params=SamplingParams(attention=attention))
        return [*batch[:-1], replace(batch[-1], request=other)]

    quest = msgspec.structs.replace(SELECTING, selector="quest")
    on_its_way = replace(batch[-1], arrivals=Arrivals(TicketId("t"), native.spec.num_layers, [0]))
    assert steps.run(batch) is not None
    assert steps.run(last_with("dense")) is None
    assert steps.run(last_with(quest)) is None
    assert steps.run([*batch[:-1], on_its_way]) is None
    assert NativeSteps(native, store, quest).run(batch) is None


@built
def test_step_refuses_what_would_reach_outside(tiny_directory: Path) -> None:
    native = native_decoder(tiny_directory)
    pages = pages_of(store_of(native))
    fewer = replace(native, transformer=native.transformer.first_layers(1))
    with pytest.raises(InvalidArgument, match="pages: needed those of 1 layers, got"):
        fewer.step([5], [1], [[0]], pages)
    with pytest.raises(InvalidArgument, match="token_ids"):
        native.step([258], [1], [[0]], pages)
    with pytest.raises(InvalidArgument, match="block_table"):
        native.step([5], [65], [[0, NUM_BLOCKS]], pages)
    with pytest.raises(InvalidArgument, match="seq_lens"):
        native.step([5], [65], [[0]], pages)
    with pytest.raises(InvalidArgument, match="seq_lens"):
        native.step([5], [0], [[0]], pages)


def test_native_by_name_runs_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_tiny_model(tmp_path, head_dim=12)
    with pytest.raises(InvalidConfig, match=r"model_impl='native': head_dim is 12"):
        load_model(directory, "cpu", torch.float32, "native")
    assert load_model(directory, "cpu", torch.float32, "auto").impl == "torch"
    with pytest.raises(InvalidConfig, match=r"model_impl='native': device is meta"):
        load_model(directory, "meta", torch.float32, "native")
    monkeypatch.setattr(library, "_load", lambda: None)
    with pytest.raises(InvalidConfig, match=r"not built.*build_ext"):
        load_model(write_tiny_model(tmp_path / "whole"), "cpu", torch.float32, "native")


@pytest.mark.parametrize("impl", ["torch", pytest.param("native", marks=built)])
def test_report_says_what_computed(tiny_directory: Path, impl: str) -> None:
    with tiny_llm(tiny_directory, model_impl=impl) as llm:
        llm.generate(prompts(20))
        assert all(worker.model_impl.startswith(impl) for worker in llm.report().workers)
