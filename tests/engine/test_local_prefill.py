"""Short or cached prompts that stay on decode: the same tokens, no KV moved, a measured threshold."""

from pathlib import Path
from typing import Any

import pytest
from test_router_core import request

from kvrelay.router.fleet import Fleet
from kvrelay.router.local_prefill import NUM_PROBES, hand_off_seconds, worthwhile_tokens
from kvrelay.router.settings import RouterSettings
from kvrelay.types import WorkerId
from tiny_engine import assert_all_blocks_home, greedy, hello, prompts, tiny_llm

LENGTHS = (1, 2, 64, 65, 130, 200, 300)


@pytest.mark.parametrize("local_prefill_tokens", [64, 199, 10_000])
@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 8}, {"decode_workers": 2}])
def test_tokens_are_those_of_a_colocated_engine(
    tiny_directory: Path, local_prefill_tokens: int, settings: dict[str, Any]
) -> None:
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        expected = [output.token_ids for output in llm.generate(prompts(*LENGTHS), greedy(24))]
    with tiny_llm(tiny_directory, local_prefill_tokens=local_prefill_tokens, **settings) as llm:
        outputs = llm.generate(prompts(*LENGTHS), greedy(24))
        report = llm.report()
        assert_all_blocks_home(llm)
    assert [output.token_ids for output in outputs] == expected
    by_role: dict[str, int] = {"prefill": 0, "decode": 0}
    for worker in report.workers:
        by_role[worker.role] += worker.num_tokens["prefill"]
    assert by_role["decode"] > 0
    assert (by_role["prefill"] == 0) == (local_prefill_tokens == 10_000)
    assert (report.kv_bytes_moved == 0) == (local_prefill_tokens == 10_000)


def test_zero_is_never(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, local_prefill_tokens=0) as llm:
        llm.generate(prompts(2, 64), greedy(2))
        done = {worker.role: worker.num_tokens["prefill"] for worker in llm.report().workers}
    assert done["decode"] == 0


def fleet(local_prefill_tokens: int) -> Fleet:
    found = Fleet(RouterSettings(local_prefill_tokens=local_prefill_tokens))
    for worker_id, role in (("p0", "prefill"), ("d0", "decode")):
        found.add(hello(worker_id, role))  # type: ignore[arg-type]
    return found


def ways(found: Fleet, num_tokens: int) -> list[bool]:
    routed = request(0, num_tokens)
    return [pair.is_local for pair in found.pairs(routed, found.job(routed), 0.0)]


def test_the_threshold_counts_tokens_to_compute() -> None:
    assert ways(fleet(64), 65) == [True]
    assert ways(fleet(64), 66) == [False]


def test_what_decode_has_cached_need_not_be_computed() -> None:
    from kvrelay.cache.prefix import block_hashes

    found, routed = fleet(64), request(0, 300)
    layout = found.workers[WorkerId("d0")].hello.descriptor.layout
    names = block_hashes(routed.token_ids, layout.fingerprint())
    found.loads[WorkerId("d0")].change_cached(names[:3], [])
    assert ways(found, 300) == [False]
    found.loads[WorkerId("d0")].change_cached(names, [])
    assert ways(found, 300) == [True]


def test_a_busy_decode_worker_hands_short_prompts_over() -> None:
    found = fleet(64)
    found.loads[WorkerId("d0")].num_prompts = 2
    found.loads[WorkerId("d0")].num_prefill_tokens = 2 * 512
    assert ways(found, 65) == []


def test_the_threshold_is_what_prefill_does_in_the_time_of_a_hand_off() -> None:
    assert worthwhile_tokens(0.01, 0.001) == 10
    assert worthwhile_tokens(0.0, 0.001) == 0
    assert worthwhile_tokens(0.01, None) == 0


def test_hand_off_is_the_difference_of_medians_without_the_warm_up() -> None:
    remote = iter([9.0, 9.0, 0.05, 0.03, 0.04])
    local = iter([0.0, 0.0, 0.02, 0.01, 0.03])

    def ttft_s(pair: tuple[WorkerId, WorkerId]) -> float:
        return next(local if pair[0] == pair[1] else remote)

    assert hand_off_seconds(ttft_s, WorkerId("p"), WorkerId("d")) == pytest.approx(0.02)
    assert next(remote, None) is None
    assert NUM_PROBES == 5
    remote, local = iter([0.01] * 5), iter([0.04] * 5)
    assert hand_off_seconds(ttft_s, WorkerId("p"), WorkerId("d")) == 0.0, "never less than nothing"


def test_a_measured_threshold_is_set_before_the_first_request_and_not_counted(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_least_something(*given: Any) -> float:
        return max(0.01, hand_off_seconds(*given))  # on a busy machine noise may exceed it

    monkeypatch.setattr("kvrelay.engine.hand_off_seconds", at_least_something)
    with tiny_llm(tiny_directory, local_prefill_tokens="auto", power_model="idle_w=1,busy_w=2") as llm:
        report = llm.report()
        assert llm.engine._runtime.router.fleet.local_prefill_tokens > 0
        assert report.num_prompt_tokens == 0
        assert sum(report.num_requests.values()) == 0
        assert all(phase.num_tokens == 0 for phase in report.phases.values())
        assert b"time_to_first_token" not in llm.engine.metrics()
        assert len(llm.generate(prompts(70), greedy(4))[0].token_ids) == 4
        assert_all_blocks_home(llm)
