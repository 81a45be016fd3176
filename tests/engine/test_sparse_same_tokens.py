"""Contract 1 in sparse mode: the same tokens whichever way a request is served, and what was read is told."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvrelay import SamplingParams, SparseAttention, StreamEvent, outputs
from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.models.spec import ModelSpec
from kvrelay.request_checks import check_layers
from tiny_engine import (
    assert_all_blocks_home,
    greedy,
    once,
    prompts,
    tiny_llm,
    until_preempted,
    write_tiny_model,
)

SHORT = (1, 2, 3, 5, 8, 13)  # prefilled at once, 3 blocks each at their end: more than pools of 17 hold
LENGTHS = (*SHORT, 65, 257, 300, 513, 700, 840)
MAX_TOKENS = 140
SPARSE = SparseAttention(
    budget_tokens=192, local_blocks=1, dense_layers=(0,), dense_below_tokens=0, candidate_tokens=0
)  # 6 blocks are ranked by their keys
WAYS: dict[str, dict[str, Any]] = {
    "1P1D": {},
    "2P2D": {"prefill_workers": 2, "decode_workers": 2},
    "chunks-of-256": {"prefill_chunk_tokens": 256},
    "whole-prompts": {"prefill_chunk_tokens": None},
    "one-at-a-time": {"max_num_seqs": 1},
    "small-pool": {"num_kv_blocks": 17},  # whether it preempts is a matter of which worker is faster
    "colocated": {"mode": "colocated"},
    "colocated-preempted": {"mode": "colocated", "num_kv_blocks": 17, "prefill_chunk_tokens": 256},
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
        serve = until_preempted if "preempted" in way else once
        tries = serve(llm, prompts(*LENGTHS), greedy(MAX_TOKENS))
        assert_all_blocks_home(llm)
    for found in tries:
        assert [output.token_ids for output in found] == expected["sparse"]
    for output in tries[0]:
        assert output.attention["decode"].attended_tokens_per_query <= (192 * 3 + 980) / 4
    longest = tries[0][-1].attention
    assert longest["prefill"].share_of_pairs < 0.7
    assert longest["decode"].share_of_pairs < 0.5


VARIANTS: dict[str, dict[str, Any]] = {
    "less of attention": {"top_p": 0.9, "dense_layers": ()},
    "shared lists": {"exact": False, "top_p": None, "dense_layers": ()},
    "less in decode": {"budget_tokens": 512, "decode_budget_tokens": 128},
    "every block a candidate": {"candidate_tokens": 8192},
    "more in decode, dense at first": {"decode_budget_tokens": 512, "dense_below_tokens": 300},
    "dense for longer in decode": {"decode_dense_below_tokens": 768},
    "quest": {"selector": "quest", "top_p": None},
    "mean_pool": {"selector": "mean_pool"},
    "two_stage": {"selector": "two_stage"},
}
SLOW = ("quest", "mean_pool")  # no C++ of their own


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS]
)
def test_tokens_of_every_setting_are_equal_however_they_are_served(
    tiny_directory: Path, variant: str
) -> None:
    """Whole and alone; cut up, preempted and then found in the cache; in parts over a link that fails."""
    sparse = msgspec.structs.replace(SPARSE, **VARIANTS[variant])
    ways = {
        "alone": {"mode": "colocated", "max_num_seqs": 1, "prefill_chunk_tokens": None},
        "preempted": {"mode": "colocated", "num_kv_blocks": 17, "prefill_chunk_tokens": 256},
        "in parts": {
            "kv_handoff": "sparse",
            "transport": "faulty:inner=inproc:gbit_per_s=0.02,seed=5,fail=0.5,reorder=0.3,drop=0.1,limit=6",
            "lease_s": 0.8,
        },
    }
    batch = prompts(*SHORT, 300, 700, 840)
    sampled = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.95, seed=1, ignore_eos=True)
    params = [greedy(MAX_TOKENS), sampled] * (len(batch) // 2) + [greedy(MAX_TOKENS)]
    found, retried = {}, {}
    for name, way in ways.items():
        with tiny_llm(tiny_directory, attention=sparse, **way) as llm:
            found[name] = until_preempted(llm, batch, params) if name == "preempted" else []
            found[name] += [llm.generate(batch, params) for _ in range(2)]
            retried[name] = llm.report().num_requests["retried"]
            assert_all_blocks_home(llm)
            assert set(llm.engine.close().values()) == {0}
    assert retried["alone"] == 0
    assert retried["in parts"] > 0
    whole, again = found["in parts"]
    assert whole[-1].hand_off.bytes_before_first_token < whole[-1].hand_off.num_bytes
    assert again[-1].num_cached_tokens
    outputs = found["alone"][0]
    for tries in found.values():
        for each in tries:
            assert [output.token_ids for output in each] == [output.token_ids for output in outputs]
    assert outputs[-1].attention["prefill"].share_of_pairs < 0.9
    for output in outputs if "decode_budget_tokens" in VARIANTS[variant] else []:
        most = (sparse.budget(is_generated=True) * 3 + 980) / 4  # one layer of four is dense
        assert output.attention["decode"].attended_tokens_per_query <= most


@pytest.mark.parametrize("exact", [False, True])
def test_where_a_long_prompt_is_cut_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, exact: bool
) -> None:
    """Of 46 blocks the queries of a group name six together: with fewer queries they would be others."""
    directory = write_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=4096)
    sparse, texts = msgspec.structs.replace(SPARSE, exact=exact), prompts(2900, 2700)
    params = greedy(8, logprobs=0)
    whole = {"mode": "colocated", "max_num_seqs": 1, "prefill_chunk_tokens": None}
    found = []
    for way in (whole, {"prefill_chunk_tokens": 256}, {"mode": "colocated"}):
        with tiny_llm(directory, attention=sparse, num_kv_blocks=100, **way) as llm:
            if way is not whole:  # what ends within a group is not shared
                llm.generate([text[:1400] for text in texts], greedy(1))
            found.append(llm.generate(texts, params))
    for served in found[1:]:
        assert [output.num_cached_tokens for output in served] == [1280, 1280]
        for output, expected in zip(served, found[0], strict=True):
            assert output.token_ids == expected.token_ids
            logprobs, others = ([each.logprob for each in o.logprobs or ()] for o in (output, expected))
            assert logprobs == pytest.approx(others, abs=1e-3)


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
    assert short == list(range(len(SHORT)))
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
    assert (dense.attention["prefill"].share_of_pairs, dense.sparse) == (1.0, None)
    assert sparse.attention["prefill"].share_of_pairs < 0.7


def test_a_long_prefill_tells_how_far_it_is(
    tiny_directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="kvrelay")
    with tiny_llm(tiny_directory, prefill_chunk_tokens=256, prefix_cache=False) as llm:
        list(llm.stream(prompts(1, 900)[1], greedy(2)))
        assert not [record for record in caplog.records if "prompt tokens" in record.msg], "it took no 5 s"
        monkeypatch.setattr(outputs, "PROGRESS_S", 0.0)
        events, in_flight = list[StreamEvent](), list[int]()
        for event in llm.stream(prompts(1, 700)[1], greedy(200)):
            events.append(event)
            in_flight += [request.num_prefilled for request in llm.engine.in_flight()]
        short = list(llm.stream(prompts(1, 200)[1], greedy(2)))
    assert 512 in in_flight
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
        assert (output.attention, output.sparse) == ({}, None)
    with pytest.raises(InvalidConfig, match="dense_layers=7: the model has layers 0 to 3"):
        tiny_llm(tiny_directory, attention=SparseAttention(dense_layers=(0, 7)))


def test_auto_stands_for_what_was_measured_for_requests_too(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRELAY_HOME", str(tmp_path))
    prompt, own = prompts(*LENGTHS)[-1], msgspec.structs.replace(SPARSE, dense_below_tokens="auto")
    with tiny_llm(tiny_directory, attention="auto") as llm:
        (short,) = llm.generate([prompt], greedy(4))
    assert short.attention["prefill"].share_of_pairs == 1.0, "it fits in the budget of 4,096"
    path = tmp_path / "crossover.json"
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: [500, 850]}))
    with tiny_llm(tiny_directory, attention="auto") as llm:
        (auto,) = llm.generate([prompt], greedy(40, attention=own))
    with tiny_llm(tiny_directory, attention="sparse") as llm:
        told, others = (
            llm.generate([prompt], greedy(40, attention=own.with_crossover(*numbers)))[0]
            for numbers in ((500, 850), (500, None))
        )
    assert (auto.token_ids, auto.attention, auto.sparse) == (told.token_ids, told.attention, told.sparse)
    assert auto.sparse == own.with_crossover(500, 850)
    assert auto.attention["prefill"] == others.attention["prefill"]
    assert auto.attention["decode"] != others.attention["decode"]
