"""Contract 1 in sparse mode: the same tokens whichever way a request is served, and what was read is told."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvrelay import SamplingParams, SparseAttention
from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.models.spec import ModelSpec
from kvrelay.request_checks import check_layers
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

LENGTHS = (1, 2, 65, 257, 300, 513, 700, 840)
MAX_TOKENS = 140
SPARSE = SparseAttention(budget_tokens=192, local_blocks=1, dense_layers=(0,), dense_below_tokens=0)
WAYS: dict[str, dict[str, Any]] = {
    "1P1D": {},
    "2P2D": {"prefill_workers": 2, "decode_workers": 2},
    "chunks-of-256": {"prefill_chunk_tokens": 256},
    "whole-prompts": {"prefill_chunk_tokens": None},
    "one-at-a-time": {"max_num_seqs": 1},
    "preempted": {"num_kv_blocks": 19},
    "colocated": {"mode": "colocated"},
    "colocated-preempted": {"mode": "colocated", "num_kv_blocks": 19, "prefill_chunk_tokens": 256},
    "shm": {"transport": "shm"},
    "faults": {
        "transport": "faulty:inner=inproc,seed=3,drop=0.1,duplicate=0.2,reorder=0.2,delay=0.1,fail=0.01,"
        "hang=0.01,truncate=0.01,bitflip=0.01,delay_s=0.03,limit=6",
        "lease_s": 0.4,
    },
}


@pytest.fixture(scope="module")
def expected(tiny_directory: Path) -> dict[str, list[list[int]]]:
    """Tokens of the plainest way, sparse and dense."""
    found = {}
    for name, attention in (("sparse", SPARSE), ("dense", "dense")):
        with tiny_llm(
            tiny_directory, mode="colocated", max_num_seqs=1, prefill_chunk_tokens=None, attention=attention
        ) as llm:
            found[name] = [o.token_ids for o in llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))]
    return found


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("way", WAYS)
def test_sparse_tokens_are_equal_in_every_way(
    tiny_directory: Path, way: str, expected: dict[str, list[list[int]]]
) -> None:
    with tiny_llm(tiny_directory, attention=SPARSE, **WAYS[way]) as llm:
        outputs = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
        report = llm.report()
        assert_all_blocks_home(llm)
    assert [output.token_ids for output in outputs] == expected["sparse"]
    if "preempted" in way:
        assert report.num_requests["preempted"] > 0, "the pool was meant to be too small for all at once"
    for output in outputs:
        assert output.attention["decode"].attended_tokens_per_query <= (192 * 3 + 980) / 4
    longest = outputs[-1].attention
    assert longest["prefill"].share_of_pairs < 0.7
    assert longest["decode"].share_of_pairs < 0.5


@pytest.mark.usefixtures("no_leftovers")
def test_tokens_of_exact_lists_are_equal_whole_and_cut_up(tiny_directory: Path) -> None:
    exact = msgspec.structs.replace(SPARSE, exact=True, top_p=0.9)
    found = []
    for way in ({"mode": "colocated", "max_num_seqs": 1, "prefill_chunk_tokens": None}, WAYS["preempted"]):
        with tiny_llm(tiny_directory, attention=exact, **way) as llm:
            outputs = llm.generate(prompts(*LENGTHS), greedy(MAX_TOKENS))
            assert_all_blocks_home(llm)
        found.append([output.token_ids for output in outputs])
        assert outputs[-1].attention["prefill"].share_of_pairs < 0.7
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_sparse_tokens_are_equal_after_a_prefix_hit(
    tiny_directory: Path, mode: str, expected: dict[str, list[list[int]]]
) -> None:
    """The whole prompt again, and a longer prompt that begins as an earlier one did."""
    long = prompts(*LENGTHS)[-1]
    with tiny_llm(tiny_directory, attention=SPARSE, mode=mode) as llm:
        llm.generate(long[:600], greedy(MAX_TOKENS))
        again = [llm.generate(long, greedy(MAX_TOKENS))[0] for _ in range(2)]
    assert [output.token_ids for output in again] == [expected["sparse"][-1]] * 2
    dense_pairs = [output.attention["prefill"].causal_pairs for output in again]
    assert dense_pairs[1] < dense_pairs[0], "the second time, less was meant to be computed"


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_sparse_tokens_survive_a_worker(
    tiny_directory: Path, victim: str, expected: dict[str, list[list[int]]]
) -> None:
    settings = {"prefill_workers": 2, "decode_workers": 2, "transport": "shm", "attention": SPARSE}
    tokens: list[list[int]] = [[] for _ in LENGTHS]
    with tiny_llm(tiny_directory, **settings) as llm:
        pid = next(w.pid for w in llm.report().workers if w.worker_id == victim)
        is_killed = False
        for index, event in llm.stream_many(prompts(*LENGTHS), greedy(MAX_TOKENS)):
            tokens[index] += event.token_ids
            if sum(map(len, tokens)) > 40 and not is_killed:
                os.kill(pid, signal.SIGKILL)
                is_killed = True
        assert is_killed
        assert_all_blocks_home(llm)
    assert tokens == expected["sparse"]


def test_sparse_tokens_are_not_those_of_dense(expected: dict[str, list[list[int]]]) -> None:
    assert expected["sparse"] != expected["dense"], "selection was meant to leave keys out"
    short = [index for index, length in enumerate(LENGTHS) if length + MAX_TOKENS <= 192]
    assert short == [0, 1]
    assert [expected["sparse"][i][:40] for i in short] == [expected["dense"][i][:40] for i in short]


def test_a_request_may_have_settings_of_its_own(
    tiny_directory: Path, expected: dict[str, list[list[int]]]
) -> None:
    params = [
        SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, attention=attention)
        for attention in ("dense", SPARSE)
    ]
    prompt = prompts(*LENGTHS)[-1]
    wide = SparseAttention(budget_tokens=640, dense_below_tokens=0)
    with tiny_llm(tiny_directory, attention=wide) as llm:
        dense, sparse = llm.generate([prompt, prompt], params)
        with pytest.raises(InvalidRequest, match="dense_layers=4: the model has layers 0 to 3"):
            llm.generate(prompt, SamplingParams(attention=SparseAttention(dense_layers=(4,))))
    assert dense.token_ids == expected["dense"][-1]
    assert sparse.token_ids == expected["sparse"][-1]
    assert dense.attention["prefill"].share_of_pairs == 1.0
    assert sparse.attention["prefill"].share_of_pairs < 0.7


def test_a_long_prefill_tells_how_far_it_is(tiny_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kvrelay")
    with tiny_llm(tiny_directory, prefill_chunk_tokens=256) as llm:
        events = list(llm.stream(prompts(1, 700)[1], greedy(2)))
        short = list(llm.stream(prompts(1, 200)[1], greedy(2)))
    told = [event.num_prefilled for event in events if event.num_prefilled is not None]
    assert told == [256, 512]
    assert [event.num_prefilled for event in short] == [None, None]
    assert [record.args[1:] for record in caplog.records if "prompt tokens" in record.msg] == [
        (256, 700),
        (512, 700),
    ]


def test_a_model_of_one_layer_may_be_sparse_but_has_no_second_layer(tiny_directory: Path) -> None:
    one_layer = replace(ModelSpec.from_directory(tiny_directory), num_layers=1)
    check_layers(SparseAttention(), one_layer)
    check_layers(SparseAttention(dense_layers=(0,)), one_layer)
    with pytest.raises(InvalidConfig, match="dense_layers=1: the model has layers 0 to 0"):
        check_layers(SparseAttention(dense_layers=(0, 1)), one_layer)


def test_what_cannot_be_done_is_refused(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory) as llm:
        with pytest.raises(InvalidRequest, match="attention='dense'"):
            llm.generate("abc", SamplingParams(attention="sparse"))
        (output,) = llm.generate("abc", SamplingParams(max_tokens=2, attention="dense"))
        assert output.attention == {}
    with pytest.raises(InvalidConfig, match="dense_layers=7: the model has layers 0 to 3"):
        tiny_llm(tiny_directory, attention=SparseAttention(dense_layers=(0, 7)))
