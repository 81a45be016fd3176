"""`kv_handoff="sparse"`: decode starts on part of the KV, and its tokens are those of a full hand-off.

The link is slow on purpose (a prompt's KV takes most of a second): decode runs beside the transfer.
"""

import os
import signal
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kvrelay import LLM, EngineConfig, RequestOutput, RequestsFailed, SamplingParams, SparseAttention
from kvrelay.attention.crossover import Place
from kvrelay.cache.memory import memory_bytes
from kvrelay.config import WorkerConfig
from kvrelay.errors import InvalidConfig, LayoutMismatch, TransferFailed, UnknownName
from kvrelay.transport.base import Write
from kvrelay.transport.writer import PageWriter
from kvrelay.types import KVLayout, WorkerId, num_blocks
from kvrelay.worker import loading
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

LENGTHS = (840, 513, 300, 700, 65, 257)
MAX_TOKENS = 40
SPARSE = SparseAttention(
    budget_tokens=192,
    local_blocks=1,
    dense_layers=(0,),
    dense_below_tokens=0,
    top_p=None,
    exact=False,
    candidate_tokens=0,
)
SLOW = "inproc:gbit_per_s=0.01"
WAYS: dict[str, dict[str, Any]] = {
    "1P1D": {},
    "hidden-by-prefill": {"transport": "inproc"},
    "2P2D": {"prefill_workers": 2, "decode_workers": 2},
    "chunks-of-256": {"prefill_chunk_tokens": 256},
    "whole-prompts": {"prefill_chunk_tokens": None},
    "one-at-a-time": {"max_num_seqs": 1},
    "no-prefix-cache": {"prefix_cache": False},
    "small-pool": {"num_kv_blocks": 17},
    "shm": {"transport": "shm:gbit_per_s=0.01"},
    "unverified": {"verify_kv": False},
}


def sparse_llm(directory: Path, **settings: Any) -> LLM:
    defaults = {"attention": SPARSE, "kv_handoff": "sparse", "transport": SLOW}
    return tiny_llm(directory, **{**defaults, **settings})


@pytest.fixture(scope="module")
def expected(tiny_directory: Path) -> list[list[int]]:
    """Tokens without any hand-off."""
    with tiny_llm(tiny_directory, mode="colocated", attention=SPARSE) as llm:
        return [o.token_ids for o in llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))]


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_a_full_hand_off(
    tiny_directory: Path, way: str, expected: list[list[int]]
) -> None:
    with sparse_llm(tiny_directory, **WAYS[way]) as llm:
        outputs = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert [output.token_ids for output in outputs] == expected
    assert set(leaked.values()) == {0}
    if way != "hidden-by-prefill":
        first = sum(output.hand_off.bytes_before_first_token for output in outputs)
        assert 0 < first < sum(output.hand_off.num_bytes for output in outputs)


class Resting(OrderedDict[int, Write]):
    """A queue that seems empty: a write leaves it only by being withdrawn, and posted again as urgent."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("attention", [SPARSE, msgspec.structs.replace(SPARSE, exact=True, top_p=0.97)])
def test_decode_starts_with_what_is_urgent_and_runs_on_what_it_asks_for(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, attention: SparseAttention
) -> None:
    """On a link without a pace; nothing else ever leaves."""
    with tiny_llm(tiny_directory, mode="colocated", attention=attention) as llm:
        expected = [o.token_ids for o in llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))]
    build = PageWriter.__init__

    def build_resting(page_writer: PageWriter, *arguments: Any) -> None:
        build(page_writer, *arguments)
        page_writer._queue = Resting()

    monkeypatch.setattr(PageWriter, "__init__", build_resting)
    monkeypatch.setattr(PageWriter, "_is_small", lambda *_: False)
    with sparse_llm(tiny_directory, transport="inproc", attention=attention) as llm:
        outputs = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
        assert_all_blocks_home(llm)
    assert [output.token_ids for output in outputs] == expected
    layout = KVLayout(model="", dtype="float32", num_layers=4, num_kv_heads=2, head_dim=16)
    whole = memory_bytes(layout, sum(num_blocks(length - 1) for length in LENGTHS), keeps_stats=True)
    first, last = (
        sum(getattr(output.hand_off, field) for output in outputs)
        for field in ("bytes_before_first_token", "num_bytes")
    )
    assert 0 < first < last < whole
    assert any(output.hand_off.num_stalls for output in outputs)


@pytest.mark.parametrize("tier", ["host", "file"])
def test_what_the_tiers_kept_is_not_handed_off_and_the_rest_is_in_parts(
    tiny_directory: Path, tmp_path: Path, tier: str
) -> None:
    """Two conversations in turn, on pools that hold one."""

    def talk(llm: LLM) -> list[RequestOutput]:
        texts, outputs = prompts(600, 601), list[RequestOutput]()
        for _ in range(2):
            for text in texts:
                outputs += llm.generate([text], greedy(20))
                text += outputs[-1].token_ids + [9] * 10
        return outputs

    sizes: dict[str, dict[str, Any]] = {
        "host": {"kv_host_bytes": 1 << 24},
        "file": {"kv_file_bytes": 1 << 24, "kv_file_directory": str(tmp_path)},
    }
    with tiny_llm(tiny_directory, mode="colocated", attention=SPARSE, prefix_cache=False) as llm:
        expected = [output.token_ids for output in talk(llm)]
    with sparse_llm(tiny_directory, num_kv_blocks=11, **sizes[tier]) as llm:
        outputs = talk(llm)
        assert_all_blocks_home(llm)
        found = [worker.counters.get(f"tier_hits_{tier}", 0) for worker in llm.report().workers]
    assert [output.token_ids for output in outputs] == expected
    assert all(found), "both workers' tiers were of use"
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 512, 512]
    for before, after in zip(outputs[:2], outputs[2:], strict=True):
        assert before.hand_off.num_bytes > 10 * 4 * 2 * 2 * 64 * 16 * 4, "statistics too: it came in parts"
        assert 0 < after.hand_off.num_bytes < 0.5 * before.hand_off.num_bytes


def test_a_fetched_token_waits_for_what_it_reads(tiny_directory: Path, expected: list[list[int]]) -> None:
    """The prefill worker has the prompt in its cache, so that all of the transfer comes after it."""
    with sparse_llm(tiny_directory, decode_workers=2, policy="round_robin") as llm:
        outputs = [llm.generate(prompts(*LENGTHS)[:1], greedy(MAX_TOKENS))[0] for _ in range(2)]
        stalls = sum(worker.counters.get("kv_stalls", 0) for worker in llm.report().workers)
        assert_all_blocks_home(llm)
    assert [output.token_ids for output in outputs] == expected[:1] * 2
    hand_off = outputs[1].hand_off
    assert outputs[1].num_cached_tokens == 768
    assert 0 < hand_off.num_stalls <= stalls
    assert hand_off.stall_s > 0.0
    assert hand_off.bytes_before_first_token < 0.8 * hand_off.num_bytes
    timings = outputs[1].timings
    parts = (
        timings.queue_s
        + timings.prefill_s
        + timings.transfer_wait_s
        + timings.decode_queue_s
        + timings.first_decode_s
    )
    assert parts == pytest.approx(timings.ttft_s, rel=0.01)


@pytest.mark.parametrize("length", [840, 833, 830])
def test_the_first_token_finds_all_that_it_reads(tiny_directory: Path, length: int) -> None:
    """What it reads was foreseen, but where its prompt (833: 832 computed tokens) leaves its page no room.

    The prefill worker has the prompt in its cache the second time, so that all of the transfer comes after.
    """
    sparse = msgspec.structs.replace(SPARSE, dense_layers=())
    settings = {"decode_workers": 2, "policy": "round_robin", "attention": sparse}
    with sparse_llm(tiny_directory, **settings) as llm:
        hand_offs = [llm.generate(prompts(length), greedy(1))[0].hand_off for _ in range(2)]
    assert (hand_offs[1].num_stalls > 0) == (length == 833)


FAULTS = {
    "lost notifications": "drop=0.3,limit=4",
    "duplicates": "duplicate=0.7",
    "reordered": "reorder=0.8,delay_s=0.05",
    "late": "delay=0.5,delay_s=0.05",
    "failing writes": "fail=0.1,limit=3",
    "hanging writes": "hang=0.1,limit=3",
    "the first write hangs": "hang=1,limit=1",
    "truncated": "truncate=0.1,limit=4",
    "bit flips": "bitflip=0.1,limit=4",
    "everything": "drop=0.1,duplicate=0.2,reorder=0.2,delay=0.1,fail=0.01,hang=0.01,truncate=0.01,"
    "bitflip=0.01,delay_s=0.03,limit=6",
}


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("fault", FAULTS)
def test_tokens_are_right_whatever_the_transport_does(
    tiny_directory: Path, fault: str, expected: list[list[int]]
) -> None:
    transport = f"faulty:inner=inproc:gbit_per_s=0.02,seed=5,{FAULTS[fault]}"
    with sparse_llm(tiny_directory, transport=transport, lease_s=0.8) as llm:
        outputs = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
        assert_all_blocks_home(llm)
        counters = [worker.counters for worker in llm.report().workers]
        leaked = llm.engine.close()
    assert any(key.startswith("fault_") for counter in counters for key in counter), "no fault was injected"
    assert [output.token_ids for output in outputs] == expected
    assert set(leaked.values()) == {0}


@pytest.mark.parametrize("fault", ["bitflip=1", "truncate=1"])
def test_bytes_that_never_arrive_right_are_an_error(tiny_directory: Path, fault: str) -> None:
    with sparse_llm(tiny_directory, transport=f"faulty:inner=inproc:gbit_per_s=0.02,{fault}") as llm:
        with pytest.raises(RequestsFailed) as failure:
            llm.generate(prompts(*LENGTHS)[:1], greedy(4))
        assert_all_blocks_home(llm)
    assert isinstance(failure.value.errors[0], TransferFailed)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_that_dies_in_the_middle_of_a_fetch(
    tiny_directory: Path, victim: str, expected: list[list[int]]
) -> None:
    """Killed at the first token: decode runs by then, and most of the KV is on its way."""
    settings = {"prefill_workers": 2, "decode_workers": 2, "transport": "shm:gbit_per_s=0.01"}
    tokens: list[list[int]] = [[] for _ in LENGTHS]
    with sparse_llm(tiny_directory, **settings) as llm:
        pid = next(worker.pid for worker in llm.report().workers if worker.worker_id == victim)
        is_killed = False
        for index, event in llm.stream_many(prompts(*LENGTHS), greedy(MAX_TOKENS)):
            tokens[index] += event.token_ids
            if event.token_ids and not is_killed:
                os.kill(pid, signal.SIGKILL)
                is_killed = True
        report = llm.report()
        assert_all_blocks_home(llm)
    assert tokens == expected
    assert report.num_requests["retried"] > 0


def test_requests_that_end_in_the_middle_of_a_fetch_free_everything(
    tiny_directory: Path, expected: list[list[int]]
) -> None:
    """Ends of every kind: the last token, an owner who lost interest, a stop string."""
    with sparse_llm(tiny_directory, transport="inproc:gbit_per_s=0.01") as llm:
        short = llm.generate(prompts(*LENGTHS)[:2], greedy(2))
        assert_all_blocks_home(llm)
        for count in (0, 3, 9, 25):
            for number, _ in enumerate(llm.stream_many(prompts(*LENGTHS)[:2], greedy(MAX_TOKENS))):
                if number == count:
                    break
            assert_all_blocks_home(llm)
        text = llm.generate(prompts(*LENGTHS)[:1], greedy(MAX_TOKENS))[0].text
        stop = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, stop=text[4:8])
        assert llm.generate(prompts(*LENGTHS)[:1], stop)[0].finish_reason == "stop"
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert [output.token_ids for output in short] == [tokens[:2] for tokens in expected[:2]]
    whole = 14 * 2 * 4 * 2 * 64 * 16 * 4
    assert 0 < short[0].hand_off.num_bytes < whole, "the rest is of no use and was not sent"
    assert set(leaked.values()) == {0}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kv_handoff": "some"}, UnknownName, "kv_handoff='some': expected one of full, sparse"),
        ({"attention": "dense"}, InvalidConfig, "kv_handoff='sparse': with attention='dense'"),
        ({"mode": "colocated"}, InvalidConfig, "kv_handoff='sparse': with mode='colocated'"),
        (
            {"attention": SparseAttention(selector="oracle")},
            InvalidConfig,
            "selector='oracle' reads all keys",
        ),
        ({"transport": "inproc:gbit_per_s=0"}, InvalidConfig, "gbit_per_s='0'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tiny_directory: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparse_llm(tiny_directory, **settings)


def test_workers_that_select_from_different_positions_do_not_pair(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode would read keys that prefill does not send it first."""
    numbers = iter((256, 512))

    def measured(*_: object) -> SparseAttention:
        return msgspec.structs.replace(SPARSE, dense_below_tokens=next(numbers))

    monkeypatch.setattr(loading, "measured", measured)
    with pytest.raises(LayoutMismatch, match=r"dense_below_tokens: (256 != 512|512 != 256)"):
        sparse_llm(tiny_directory, attention="auto")


def test_the_workers_of_an_engine_measure_alike_however_they_differ() -> None:
    def place(worker: str, **settings: Any) -> Place:
        engine = EngineConfig.of(model="m", attention="auto", **settings)
        config = WorkerConfig(
            worker_id=WorkerId(worker),
            role="decode",
            index=0,
            epoch=1,
            endpoint="",
            run_directory="",
            model_directory="",
            num_threads=engine.worker_threads(WorkerId(worker)),
            num_workers=2,
            engine=engine.of_worker(WorkerId(worker)),
        )
        layout = KVLayout(model="m", dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8)
        return loading.place_of(config, layout, SimpleNamespace(num_q_heads=2), torch.device("cpu"))

    listed = [{"role": "prefill", "threads": 1, "device": "cpu"}, {"role": "decode", "threads": 2}]
    assert place("prefill-0", workers=listed) == place("decode-0", workers=listed)
    assert place("prefill-0", threads_per_worker=1) == place("decode-0", threads_per_worker=1)
    assert place("prefill-0", threads_per_worker=1) != place("decode-0", threads_per_worker=2)
    plain = [{"role": "prefill"}, {"role": "decode"}]
    for settings in ({"threads_per_worker": 2}, {"device": "cpu"}):
        assert place("prefill-0", workers=plain, **settings) == place("decode-0", **settings)
        assert place("prefill-0", workers=plain, **settings) != place("prefill-0", workers=plain)


def test_requests_that_read_everything_are_handed_off_in_full(tiny_directory: Path) -> None:
    """A dense request, one whose selector reads all keys, and a prompt that fits in the budget."""
    prompt, short = prompts(*LENGTHS)[0], prompts(*LENGTHS)[4]
    ways = [
        "dense",
        SparseAttention(selector="oracle", budget_tokens=128, local_blocks=1, dense_below_tokens=0),
    ]
    params = [greedy(8, attention=attention) for attention in (*ways, None)]
    with sparse_llm(tiny_directory, prefix_cache=False) as llm:
        outputs = llm.generate([prompt, prompt, short], params)
    with sparse_llm(tiny_directory, kv_handoff="full", prefix_cache=False) as llm:
        full = llm.generate([prompt, prompt, short], params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in full]
    for output in (*outputs, *full):
        assert output.hand_off.bytes_before_first_token == output.hand_off.num_bytes > 0
        assert output.hand_off.num_stalls == 0
