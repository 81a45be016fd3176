"""Workers get cores of their own when together they take the whole machine; their threads wait briefly."""

from pathlib import Path

import psutil
import pytest

from kvrelay import config as config_module
from kvrelay.config import EngineConfig, WorkerSettings, usable_cores
from tiny_engine import greedy, prompts, tiny_llm


def cores_of(**settings: object) -> dict[str, tuple[int, ...]]:
    config = EngineConfig.of(model="m", **settings)
    return {worker: config.worker_cores(worker) for worker, _ in config.roles()}


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "usable_cores", lambda: (0, 1, 4, 5))


@pytest.mark.usefixtures("four_cores")
def test_shares_are_disjoint_and_cover_the_usable_cores() -> None:
    assert cores_of() == {"prefill-0": (0, 1), "decode-0": (4, 5)}
    assert cores_of(mode="colocated") == {"colocated-0": (0, 1, 4, 5)}
    listed = (WorkerSettings(role="prefill", threads=3), WorkerSettings(role="decode", threads=1))
    assert cores_of(workers=listed) == {"prefill-0": (0, 1, 4), "decode-0": (5,)}


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    "settings",
    [
        {"pin_threads": False},
        {"threads_per_worker": 1},  # leaves cores to others
        {"threads_per_worker": 4},  # more threads than cores
        {"prefill_workers": 2},  # three workers of one thread
    ],
    ids=str,
)
def test_otherwise_nobody_is_bound(settings: dict[str, object]) -> None:
    assert set(cores_of(**settings).values()) == {()}


def test_where_the_system_does_not_say_nobody_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(config_module.os, "sched_getaffinity")
    assert usable_cores() == ()
    assert set(cores_of().values()) == {()}


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_processes_run_on_their_cores_and_threads_of_this_one_anywhere(tiny_directory: Path) -> None:
    first, second = usable_cores()[:2]
    before = psutil.Process().cpu_affinity()
    try:
        psutil.Process().cpu_affinity([first, second])
        bound = {}
        for transport in ("shm", "inproc"):
            with tiny_llm(tiny_directory, transport=transport) as llm:
                llm.generate(prompts(5), greedy(2))
                for worker in llm.report().workers:
                    bound[transport, worker.role] = psutil.Process(worker.pid).cpu_affinity()
    finally:
        psutil.Process().cpu_affinity(before)
    assert bound["shm", "prefill"] == [first]
    assert bound["shm", "decode"] == [second]
    assert bound["inproc", "prefill"] == bound["inproc", "decode"] == [first, second]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, {"GOMP_SPINCOUNT": "2000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
    ids=str,
)
def test_openmp_of_a_worker_waits_briefly_unless_told(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], found: dict[str, str]
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with tiny_llm(tiny_directory, mode="colocated", transport="shm") as llm:
        llm.generate(prompts(5), greedy(2))
        (worker,) = llm.report().workers
        environment = psutil.Process(worker.pid).environ()
    assert {name: environment[name] for name in names if name in environment} == found
