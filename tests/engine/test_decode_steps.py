"""Decode steps over tensors in place: padding, growth, tokens of the step before, and no word to the host.

Only the capture itself needs CUDA. That what is captured can be is shown on tensors without values: what
needs a value, or one of the host's tensors, fails on them.
"""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import kvrelay.decode_steps
from kvrelay import SamplingParams
from kvrelay.cache.store import KVStore
from kvrelay.config import EngineConfig
from kvrelay.decode_steps import DecodeSteps, Tokens, sizes_up_to
from kvrelay.errors import InvalidConfig, UnknownName
from kvrelay.models.decoder import Decoder, LayerWeights
from kvrelay.models.loading import load_model
from kvrelay.runner import Runner
from kvrelay.sampler import Row, choose, is_plain, sample
from kvrelay.scheduler.decode import PENDING, DecodeSequence
from kvrelay.types import KVLayout, RequestId, RequestSpec
from tiny_engine import greedy, prompts, tiny_llm, write_tiny_model

NUM_BLOCKS = 24
CONTEXTS = (1, 2, 63, 64, 65, 130, 7)
MAX_BLOCKS = 5


def plain_decoder(directory: Path) -> Decoder:
    decoder = load_model(directory, "cpu", torch.float32, "torch")
    assert isinstance(decoder, Decoder)
    return decoder


def store_of(decoder: Decoder, fill: float) -> KVStore:
    """Pages full of `fill`, a spare one at the end."""
    spec = decoder.spec
    layout = KVLayout(
        model="m",
        dtype="float32",
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    buffer = memoryview(bytearray(NUM_BLOCKS * layout.block_bytes))
    store = KVStore(layout, NUM_BLOCKS, buffer, torch.device("cpu"), has_spare_page=True)
    store.pages.fill_(fill)
    return store


def sequences(contexts: tuple[int, ...] = CONTEXTS, **params: Any) -> list[DecodeSequence]:
    """One per context, with room to grow in scattered blocks."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    found = []
    for index, (length, tokens) in enumerate(zip(contexts, prompts(*contexts), strict=True)):
        request = RequestSpec(
            request_id=RequestId(f"r{index}"),
            attempt=1,
            arrival=index,
            token_ids=tuple(tokens),
            num_prompt_tokens=length,
            max_total_tokens=1000,
            params=SamplingParams(max_tokens=100, **params),
            seed=index,
        )
        blocks = [free.pop() for _ in range(-(-(length + 2) // 64))]
        found.append(DecodeSequence(request, blocks, list(tokens)))
    return found


def runner_of(decoder: Decoder, *, with_steps: bool, max_num_seqs: int = 8) -> Runner:
    store = store_of(decoder, float("nan") if with_steps else 1e4)
    steps = DecodeSteps(decoder, store, max_num_seqs, MAX_BLOCKS) if with_steps else None
    return Runner(decoder, store, frozenset({1}), None, steps)


def fill_prompts(runner: Runner, batch: list[DecodeSequence]) -> None:
    """The K and V of all but each prompt's last token, by decode steps of other lengths, one by one."""
    from kvrelay.attention import PagedAttention, Span

    longer = [sequence for sequence in batch if len(sequence.token_ids) > 1]
    spans = [Span(0, sequence.num_cached, sequence.block_ids) for sequence in longer]
    tokens = torch.tensor([token for sequence in longer for token in sequence.token_ids[:-1]])
    positions = torch.cat([torch.arange(span.length) for span in spans])
    with torch.inference_mode():
        runner.decoder.forward(tokens, positions, PagedAttention(runner.store, spans))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (64, [1, 2, 4, 8, 16, 32, 64]), (5, [1, 2, 4, 5])],
)
def test_sizes_are_powers_of_two_and_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert sizes_up_to(most) == sizes


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_padded_step_gives_the_logits_and_pages_of_an_ordinary_one(
    tiny_directory: Path, count: int
) -> None:
    decoder = plain_decoder(tiny_directory)
    runners = [runner_of(decoder, with_steps=with_steps) for with_steps in (True, False)]
    batch = sequences()
    for runner in runners:
        fill_prompts(runner, batch)
    before = runners[0].store.pages.clone()
    mine, theirs = (runner.logits(batch[-count:]) for runner in runners)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
    stores = [runner.store.pages[:, :, :NUM_BLOCKS] for runner in runners]
    torch.testing.assert_close(stores[0].nan_to_num(1e4), stores[1], rtol=1e-5, atol=1e-5)
    changed = (runners[0].store.pages != before) & ~(runners[0].store.pages.isnan() & before.isnan())
    places = {(int(b), int(t)) for _, _, b, _, t, _ in changed.nonzero()}
    new = {(s.block_ids[s.num_cached // 64], s.num_cached % 64) for s in batch[-count:]}
    assert places == new | ({(NUM_BLOCKS, 0)} if count in (3, 7) else set()), "the spare page, if rows pad"


def settle(chosen: list[DecodeSequence], places: list[int], wait: Tokens) -> None:
    for sequence, place, sampled in zip(chosen, places, wait(), strict=True):
        assert sampled is not None
        sequence.token_ids[place] = sampled[0]


def test_steps_run_ahead_of_their_tokens(tiny_directory: Path) -> None:
    """Each step is begun before the last one's tokens are known; batches shrink, grow and change order."""
    decoder = plain_decoder(tiny_directory)
    orders = [(0, 1, 2, 3, 4, 5, 6), (6, 5, 4, 3), (3, 6), (2, 3, 0, 6, 1, 4, 5)]
    results: list[list[list[int]]] = []
    for with_steps in (True, False):
        runner, batch = runner_of(decoder, with_steps=with_steps), sequences(temperature=0.0)
        fill_prompts(runner, batch)
        begun: list[tuple[list[DecodeSequence], list[int], Tokens]] = []
        for order in orders:
            chosen = [batch[i] for i in order]
            assert runner.runs_ahead(chosen) == with_steps
            begun.append((chosen, [len(sequence.token_ids) for sequence in chosen], runner.launch(chosen)))
            for sequence in chosen:
                sequence.token_ids.append(PENDING)
            while len(begun) > with_steps:
                settle(*begun.pop(0))
        for step in begun:
            settle(*step)
        results.append([sequence.token_ids for sequence in batch])
    assert results[0] == results[1]
    num_new = [len(tokens) - length for tokens, length in zip(results[0], CONTEXTS, strict=True)]
    assert num_new == [2, 2, 2, 4, 3, 3, 4]


def test_logits_that_are_not_finite_give_no_token(tiny_directory: Path) -> None:
    decoder = plain_decoder(tiny_directory)
    runner, batch = runner_of(decoder, with_steps=True), sequences()
    fill_prompts(runner, batch)
    runner.store.pages[0, 1, batch[2].block_ids[0], :, 5] = float("nan")
    sampled = runner.launch(batch)()
    assert [result is None for result in sampled] == [i == 2 for i in range(len(batch))]


PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1e-6),
    SamplingParams(temperature=1.0, top_k=10**6),
]


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_tokens_chosen_at_once_are_those_sampled_one_by_one(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(40):
        logits = torch.randn(len(PARAMS), 700, generator=generator) * scale
        rows = [Row(p, seed, [0] * (3 + i), 2, (1,)) for i, p in enumerate(PARAMS)]
        chosen = choose(logits.clone(), rows).tolist()
        sampled = [result[0] for result in sample(logits.clone(), rows) if result is not None]
        assert chosen == sampled


def test_rows_without_a_finite_largest_have_no_token_to_choose() -> None:
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, 4], logits[3] = float("nan"), float("inf"), float("-inf")
    rows = [Row(SamplingParams(temperature=t), 5, [1, 2], 2, (1,)) for t in (0.0, 0.8, 0.0, 0.8)]
    assert choose(logits, rows).tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, True),
        ({"temperature": 0.4, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 3, "stop": "x"}, True),
        ({"logprobs": 0}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"min_tokens": 1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
    ],
)
def test_what_looks_at_earlier_tokens_is_not_plain(params: dict[str, Any], expected: bool) -> None:
    assert is_plain(SamplingParams(**params)) == expected


@pytest.fixture
def absent(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> DecodeSteps:
    """Steps whose weights, pages and inputs are on the meta device: shapes without values."""
    monkeypatch.setattr(
        kvrelay.decode_steps, "paged_decode", lambda q, kv: (torch.empty_like(q), q.new_empty(q.shape[:2]))
    )
    decoder = plain_decoder(tiny_directory)
    steps = DecodeSteps(decoder, store_of(decoder, 0.0), 8, MAX_BLOCKS)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, LayerWeights):
            return LayerWeights(**{field.name: moved(getattr(value, field.name)) for field in fields(value)})
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    rope = decoder.rope
    rope._inverse = moved(rope._inverse)
    weights = {name: moved(getattr(decoder, name)) for name in ("embedding", "layers", "norm", "head")}
    steps._decoder = Decoder(spec=decoder.spec, rope=rope, **weights)
    steps._store.pages = moved(steps._store.pages)
    for name in ("_inputs", "_table", "_chosen"):
        setattr(steps, name, moved(getattr(steps, name)))
    return steps


def test_what_is_captured_stays_on_the_device_and_asks_the_host_nothing(absent: DecodeSteps) -> None:
    for size in absent.sizes:
        with torch.inference_mode():
            logits = absent._compute(size)
        assert (logits.shape, logits.device.type) == ((size, 258), "meta")


def test_a_value_or_a_tensor_of_the_host_would_be_noticed(absent: DecodeSteps) -> None:
    with pytest.raises(RuntimeError, match="meta"):
        int(absent._compute(1).argmax())
    absent._decoder.rope._inverse = torch.zeros(absent._decoder.rope._inverse.shape)
    with pytest.raises(RuntimeError, match="device"):
        absent._compute(1)


def test_uncaptured_steps_need_a_dense_torch_decoder(tiny_directory: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"cuda_graphs='uncaptured'.*dense"):
        tiny_llm(tiny_directory, model_impl="torch", cuda_graphs="uncaptured", attention="sparse")
    with pytest.raises(UnknownName, match=r"cuda_graphs.*'on'"):
        EngineConfig.of(model="m", cuda_graphs="on")


def test_rows_that_need_earlier_tokens_and_rows_that_do_not_share_a_worker(tiny_directory: Path) -> None:
    params = [
        SamplingParams(max_tokens=20, seed=1, temperature=0.8, ignore_eos=True),
        SamplingParams(max_tokens=30, seed=2, temperature=0.8, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=40, seed=3, stop_token_ids=tuple(range(100, 120)), ignore_eos=True),
        SamplingParams(max_tokens=1, temperature=0.0),
    ]
    texts = prompts(5, 64, 70, 3, 128)
    results = []
    for graphs in ("off", "uncaptured"):
        with tiny_llm(tiny_directory, model_impl="torch", cuda_graphs=graphs) as llm:
            outputs = llm.generate(texts, params)
            outputs += [llm.generate([text], own)[0] for text, own in zip(texts, params, strict=True)]
            how = {worker.model_impl for worker in llm.report().workers}
        assert how == {"torch" if graphs == "off" else "torch, steps in place"}
        results.append([(output.token_ids, output.finish_reason) for output in outputs])
    assert results[0] == results[1]
    assert "stop" in {reason for _, reason in results[0]}


INTERPRETED = """
import functools, sys
from pathlib import Path
import torch
import kvrelay.decode_steps as steps
from kvrelay_kernels import paged_decode
steps.paged_decode = functools.partial(paged_decode, impl="triton")
from test_decode_steps import fill_prompts, plain_decoder, runner_of, sequences
decoder = plain_decoder(Path(sys.argv[1]))
runners = [runner_of(decoder, with_steps=with_steps) for with_steps in (True, False)]
batch = sequences()[3:6]
for runner in runners:
    fill_prompts(runner, batch)
mine, theirs = (runner.logits(batch) for runner in runners)
torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
"""


def test_a_step_over_the_triton_kernel_interpreted_gives_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    directory = write_tiny_model(tmp_path, num_hidden_layers=2)
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, *(path for path in sys.path if path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_greedy_tokens_outlive_a_change_of_batch(tiny_directory: Path) -> None:
    """More requests than rows: sequences end one by one, and others take their rows."""
    results = []
    texts = prompts(*range(3, 80, 7))
    for graphs in ("off", "uncaptured"):
        settings: dict[str, Any] = {"mode": "colocated", "max_num_seqs": 3, "cuda_graphs": graphs}
        with tiny_llm(tiny_directory, model_impl="torch", **settings) as llm:
            params = [greedy(3 + 5 * (i % 4)) for i in range(len(texts))]
            results.append([output.token_ids for output in llm.generate(texts, params)])
    assert results[0] == results[1]
