"""`workers`: pools whose workers differ in role, device, threads, budgets and power."""

from pathlib import Path
from typing import Any

import pytest

from kvrelay.config import EngineConfig, WorkerSettings
from kvrelay.errors import InvalidConfig, UnknownName
from kvrelay.types import WorkerId
from tiny_engine import greedy, prompts, tiny_llm

MIXED = [
    {"role": "prefill", "threads": 2, "prefill_chunk_tokens": 128, "power_model": "idle_w=1,busy_w=2"},
    {"role": "decode", "num_kv_blocks": 32},
    {"role": "decode", "worker_id": "fat", "num_kv_blocks": 48, "max_num_seqs": 2},
]


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.of(model="m", **settings)


def test_workers_get_their_own_settings_and_the_engines_for_the_rest() -> None:
    mixed = config(workers=MIXED, num_kv_blocks=64, power_model="idle_w=5,busy_w=9", threads_per_worker=1)
    assert [worker_id for worker_id, _ in mixed.roles()] == ["prefill-0", "decode-0", "fat"]
    assert [role for _, role in mixed.roles()] == ["prefill", "decode", "decode"]
    own = {worker_id: mixed.of_worker(worker_id) for worker_id, _ in mixed.roles()}
    assert [own[WorkerId(w)].num_kv_blocks for w in ("prefill-0", "decode-0", "fat")] == [64, 32, 48]
    assert own[WorkerId("prefill-0")].prefill_chunk_tokens == 128
    assert own[WorkerId("fat")].max_num_seqs == 2
    assert [mixed.worker_threads(WorkerId(w)) for w in ("prefill-0", "fat")] == [2, 1]
    assert mixed.powers() == "prefill-0:idle_w=1,busy_w=2;idle_w=5,busy_w=9"


@pytest.mark.parametrize(
    ("workers", "kind", "text"),
    [
        ([{"role": "prefill"}], InvalidConfig, "expected prefill and decode, or colocated only"),
        ([], InvalidConfig, "expected prefill and decode"),
        ([{"role": "colocated"}, {"role": "decode"}], InvalidConfig, "expected prefill and decode, or"),
        ([*MIXED, {"role": "colocated"}], InvalidConfig, "cannot be mixed"),
        ([*MIXED, {"role": "decode", "worker_id": "fat"}], InvalidConfig, "worker_id='fat': two workers"),
        ([{"role": "decode", "worker_id": "../x"}], InvalidConfig, "worker_id='../x'"),
        ([{"role": "decode", "threads": 0}], InvalidConfig, "workers.threads=0: expected at least 1"),
        (
            [{"role": "decode", "prefill_chunk_tokens": 100}],
            InvalidConfig,
            "workers.prefill_chunk_tokens=100",
        ),
        ([{"role": "decode", "device": "tpu"}], UnknownName, "workers.device='tpu'"),
        ([{"role": "decode", "power_model": "cpu:idle_w=1,busy_w=2"}], InvalidConfig, "one worker's"),
        ([{"role": "nurse"}], InvalidConfig, "nurse"),
        ([{"role": "decode", "speed": 9}], InvalidConfig, "speed"),
    ],
)
def test_a_bad_worker_is_refused_by_name(workers: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        config(workers=workers)


def test_two_default_names_never_meet_a_chosen_one() -> None:
    with pytest.raises(InvalidConfig, match="two workers have it"):
        config(workers=[{"role": "prefill"}, {"role": "decode"}, {"role": "decode", "worker_id": "decode-0"}])


def test_a_pool_of_unequal_workers_serves(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, workers=MIXED, power_model="idle_w=5,busy_w=9") as llm:
        outputs = llm.generate(prompts(70, 130, 20, 20), greedy(8))
        report = llm.report()
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        assert [o.token_ids for o in outputs] == [
            o.token_ids for o in llm.generate(prompts(70, 130, 20, 20), greedy(8))
        ]
    assert {(w.worker_id, w.num_blocks, w.num_threads) for w in report.workers} == {
        ("prefill-0", 64, 2),
        ("decode-0", 32, 1),
        ("fat", 48, 1),
    }


def test_settings_survive_the_way_to_a_worker() -> None:
    import msgspec

    mixed = config(workers=MIXED)
    assert msgspec.json.decode(msgspec.json.encode(mixed), type=EngineConfig) == mixed
    assert mixed.workers is not None
    assert isinstance(mixed.workers[0], WorkerSettings)
