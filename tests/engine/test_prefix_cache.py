"""The prefix cache end to end: what is found is not computed, not sent, and changes no token."""

import time
from pathlib import Path
from typing import Any

import pytest

from kvrelay import LLM, SamplingParams, SparseAttention
from tiny_engine import assert_all_blocks_home, eventually, greedy, prompts, tiny_llm

WAYS: dict[str, dict[str, Any]] = {
    "1P1D": {},
    "2P2D": {"prefill_workers": 2, "decode_workers": 2, "policy": "round_robin"},
    "chunks-of-64": {"prefill_chunk_tokens": 64},
    "whole-prompts": {"prefill_chunk_tokens": None},
    "small-pool": {"num_kv_blocks": 14, "prefill_chunk_tokens": 64},
    "colocated": {"mode": "colocated"},
    "colocated-small-pool": {"mode": "colocated", "num_kv_blocks": 14, "prefill_chunk_tokens": 64},
    "shm": {"transport": "shm"},
}


def conversation(llm: LLM, first: list[int], num_turns: int) -> list[tuple[list[int], int]]:
    """Each turn's prompt is everything so far and 40 more tokens: its answer and what it found cached."""
    text, turns = list(first), []
    for turn in range(num_turns):
        (output,) = llm.generate([text], greedy(50))
        turns.append((output.token_ids, output.num_cached_tokens))
        text += output.token_ids + [7 + turn] * 40
    return turns


def computed_tokens(llm: LLM) -> int:
    return llm.report().phases["prefill"].num_tokens


def found_by_worker(llm: LLM) -> list[tuple[float | None, int]]:
    return [(own.prefix_cache_hit_rate, own.num_cached_blocks) for own in llm.report().workers]


def moved_blocks(llm: LLM) -> int:
    report, spec = llm.report(), llm.engine.spec
    block_bytes = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 64 * 4
    return report.kv_bytes_moved // block_bytes


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("way", WAYS)
def test_conversations_go_on_with_the_same_tokens(tiny_directory: Path, way: str) -> None:
    with tiny_llm(tiny_directory, mode="colocated", prefix_cache=False) as llm:
        expected = conversation(llm, prompts(200)[0], 4)
    assert [cached for _, cached in expected] == [0] * 4
    with tiny_llm(tiny_directory, **WAYS[way]) as llm:
        turns = conversation(llm, prompts(200)[0], 4)
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert [tokens for tokens, _ in turns] == [tokens for tokens, _ in expected]
    assert set(leaked.values()) == {0}
    if way != "2P2D":
        assert all(cached > 0 for _, cached in turns[1:])


@pytest.mark.parametrize("way", ["1P1D", "whole-prompts", "colocated"])
def test_sparse_conversations_share_whole_selection_groups_of_prompts(tiny_directory: Path, way: str) -> None:
    """A generated token selected alone: as part of the next prompt it would not have, so it is computed."""
    sparse = SparseAttention(
        budget_tokens=192, local_blocks=1, dense_layers=(0,), dense_below_tokens=0, candidate_tokens=0
    )
    with tiny_llm(tiny_directory, mode="colocated", prefix_cache=False, attention=sparse) as llm:
        expected = conversation(llm, prompts(500)[0], 5)
    with tiny_llm(tiny_directory, attention=sparse, **WAYS[way]) as llm:
        turns = conversation(llm, prompts(500)[0], 5)
        other = SparseAttention(budget_tokens=256, dense_below_tokens=0, local_blocks=1)
        cached = [
            llm.generate([prompts(500)[0]], greedy(2, attention=attention))[0].num_cached_tokens
            for attention in ("dense", other, other)
        ]
        assert_all_blocks_home(llm)
    assert [tokens for tokens, _ in turns] == [tokens for tokens, _ in expected]
    assert [found for _, found in turns] == [0, 256, 512, 512, 768]
    assert cached == [0, 0, 256], "each setting keeps its own"


def test_only_what_decode_lacks_is_sent_and_only_what_prefill_lacks_is_computed(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory) as llm:
        (first,) = llm.generate([prompts(200)[0]], greedy(57))  # KV of 256 tokens: 4 full blocks
        assert eventually(lambda: (moved_blocks(llm), computed_tokens(llm)) == (4, 199))
        second = first.prompt_token_ids + first.token_ids + [5] * 44  # 301 tokens
        (output,) = llm.generate([second], greedy(2))
        expected = (4 + 1, 199 + 300 - 192)  # decode made block 3 itself; only the last is sent
        assert eventually(lambda: (moved_blocks(llm), computed_tokens(llm)) == expected)
        assert output.num_cached_tokens == 192, "the prefill worker never saw the answer's KV"


def test_a_prompt_that_decode_holds_whole_needs_no_prefill(tiny_directory: Path) -> None:
    prompt = prompts(129)[0]
    with tiny_llm(tiny_directory) as llm:
        (first,) = llm.generate([prompt], greedy(8))
        assert eventually(lambda: computed_tokens(llm) == 128)
        before = llm.report().phases["prefill"].num_steps
        (second,) = llm.generate([prompt], greedy(8))
        assert llm.report().phases["prefill"].num_steps == before
        assert eventually(lambda: moved_blocks(llm) == 2)
    assert second.token_ids == first.token_ids
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 128)
    assert second.timings.prefill_s == 0.0


def test_blocks_that_prefill_has_and_decode_lacks_are_sent_without_computing(tiny_directory: Path) -> None:
    """Two decode workers in turn: the second gets all of the prompt from the prefill worker's cache."""
    prompt = prompts(193)[0]
    with tiny_llm(tiny_directory, decode_workers=2, policy="round_robin") as llm:
        (first,) = llm.generate([prompt], greedy(8))
        assert eventually(lambda: computed_tokens(llm) == 192)
        (second,) = llm.generate([prompt], greedy(8))
        assert computed_tokens(llm) == 192
        assert eventually(lambda: moved_blocks(llm) == 2 * 3)
        assert_all_blocks_home(llm)
    assert second.token_ids == first.token_ids
    assert second.num_cached_tokens == 192


def test_a_common_beginning_is_computed_once_for_all_that_come_together(tiny_directory: Path) -> None:
    common, tails = prompts(512)[0], prompts(*[30] * 6)
    for settings in ({"mode": "colocated"}, {}):
        with tiny_llm(tiny_directory, **settings, prefix_cache=False) as llm:
            expected = [output.token_ids for output in llm.generate([common + t for t in tails], greedy(8))]
        with tiny_llm(tiny_directory, **settings, prefill_chunk_tokens=512) as llm:
            outputs = llm.generate([common + tail for tail in tails], greedy(8))
            assert_all_blocks_home(llm)
            report = llm.report()
        computed = report.phases["prefill"].num_tokens
        assert [output.token_ids for output in outputs] == expected
        if settings:  # one worker, whose report of a step comes before the answer
            rate = report.workers[0].prefix_cache_hit_rate
            assert rate == pytest.approx(1 - computed / (6 * 541)), "a request looks once"
        assert computed <= 2 * 541 + 4 * 29, f"{computed} tokens computed for one common beginning of 512"


def test_the_ledger_says_how_much_of_the_transfer_was_hidden(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, prefill_chunk_tokens=64) as llm:
        outputs = llm.generate(prompts(900, 1), greedy(4))
        report = llm.report()
    moved, nothing = (output.timings for output in outputs)
    assert moved.transfer_s == pytest.approx(report.phases["transfer"].busy_s)
    assert moved.transfer_s > 0.0
    assert moved.transfer_overlap == max(0.0, 1.0 - moved.transfer_wait_s / moved.transfer_s)
    assert (nothing.transfer_s, nothing.transfer_overlap) == (0.0, None)
    waited_s = sum(output.timings.transfer_wait_s for output in outputs)
    ttft_s = sum(output.timings.ttft_s or 0.0 for output in outputs)
    assert report.transfer_share_of_ttft == pytest.approx(waited_s / ttft_s)
    assert report.transfer_overlap == pytest.approx(max(0.0, 1.0 - waited_s / moved.transfer_s))


def test_tenants_do_not_find_each_others_blocks(tiny_directory: Path) -> None:
    prompt = prompts(200)[0]
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        cached = [
            llm.generate([prompt], greedy(4, cache_salt=salt))[0].num_cached_tokens
            for salt in (None, "a", "b", "a", None)
        ]
    assert cached == [0, 0, 0, 192, 192]


def test_off_means_off_and_the_report_says_what_was_found(tiny_directory: Path) -> None:
    prompt = prompts(200)[0]
    for is_on in (True, False):
        with tiny_llm(tiny_directory, prefix_cache=is_on) as llm:
            for _ in range(2):
                llm.generate([prompt], greedy(4))
            assert_all_blocks_home(llm)
            expected = [(192 / 398, 3)] * 2 if is_on else [(0.0, 0)] * 2
            assert eventually(lambda llm=llm, expected=expected: found_by_worker(llm) == expected)


def test_urgent_requests_overtake(tiny_directory: Path) -> None:
    """One sequence at a time: the last to come has the lowest number, and is served second."""
    ended: list[int] = []
    params = [greedy(40, priority=priority) for priority in (0, 2, 1, -1)]
    with tiny_llm(tiny_directory, mode="colocated", max_num_seqs=1, prefill_chunk_tokens=64) as llm:
        for index, event in llm.stream_many(prompts(300, 300, 300, 300), params):
            if event.output is not None:
                ended.append(index)
    assert ended.index(3) < ended.index(2) < ended.index(1)


def test_the_router_learns_what_each_worker_has(tiny_directory: Path) -> None:
    from kvrelay.cache.prefix import block_hashes

    prompt = prompts(200)[0]
    with tiny_llm(tiny_directory) as llm:
        llm.generate([prompt], greedy(4))
        router = llm.engine._runtime.router
        layout = next(iter(router.workers.values())).hello.descriptor.layout
        names = set(block_hashes(prompt, layout.fingerprint()))
        deadline_s = time.monotonic() + 10.0  # prefill's report of its last step may come after the answer
        while (told := [load.cached for load in router.fleet.loads.values()]) != [names, names]:
            assert time.monotonic() < deadline_s, told
            time.sleep(0.01)


def test_sampling_does_not_depend_on_what_is_cached(tiny_directory: Path) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=11, ignore_eos=True, logprobs=2)
    with tiny_llm(tiny_directory) as llm:
        first, second = (llm.generate(prompts(200), params)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert second.num_cached_tokens == 192
    assert first.logprobs is not None
    assert second.logprobs is not None
    for a, b in zip(first.logprobs, second.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_log_probabilities_of_a_prompt_come_of_computing_it_whatever_is_cached(tiny_directory: Path) -> None:
    prompt = prompts(200)[0]
    with tiny_llm(tiny_directory) as llm:
        outputs = [
            llm.generate([prompt], greedy(4, **wanted))[0] for wanted in ({}, {"prompt_logprobs": 1}, {})
        ]
        assert_all_blocks_home(llm)
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 192]
    assert len({str(output.token_ids) for output in outputs}) == 1
    assert [len(output.prompt_logprobs or []) for output in outputs] == [0, 200, 0]
