"""Contract 4: every request ends exactly once, as what it was, whatever the transport or a worker does."""

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvrelay import LLM, AsyncLLM, RequestsFailed, StreamEvent
from kvrelay.errors import EngineClosed, TransferFailed, WorkerFailed
from tiny_engine import assert_all_blocks_home, greedy, prompts, tiny_llm

LENGTHS = (2, 64, 65, 130, 200, 300, 90, 10)
FAULTS = {
    "lost notifications": "drop=0.3,limit=4",
    "duplicates": "duplicate=0.7",
    "reordered": "reorder=0.8,delay_s=0.05",
    "late": "delay=0.5,delay_s=0.05",
    "failing writes": "fail=0.2,limit=4",
    "hanging writes": "hang=0.2,limit=3",
    "truncated": "truncate=0.2,limit=4",
    "bit flips": "bitflip=0.2,limit=4",
    "everything": "drop=0.1,duplicate=0.2,reorder=0.2,delay=0.1,fail=0.01,hang=0.01,truncate=0.01,"
    "bitflip=0.01,delay_s=0.03,limit=6",
}


def expected_tokens(directory: Path) -> list[list[int]]:
    with tiny_llm(directory, mode="colocated") as llm:
        return [output.token_ids for output in llm.generate(prompts(*LENGTHS), greedy(16))]


def follow(llm: LLM, count: int, **settings: Any) -> list[list[StreamEvent]]:
    """Run the standard prompts and keep every event of each."""
    events: list[list[StreamEvent]] = [[] for _ in range(count)]
    for index, event in llm.stream_many(prompts(*LENGTHS)[:count], greedy(16, **settings)):
        events[index].append(event)
    return events


def assert_ended_once(events: list[StreamEvent]) -> None:
    ends = [event for event in events if event.output is not None or event.error is not None]
    assert len(ends) == 1
    assert ends[0] is events[-1]


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_ends_once_with_the_right_tokens(tiny_directory: Path, fault: str) -> None:
    transport = f"faulty:inner=inproc,seed=3,{FAULTS[fault]}"
    with tiny_llm(tiny_directory, transport=transport, lease_s=0.4) as llm:
        events = follow(llm, len(LENGTHS))
        assert_all_blocks_home(llm)
        counters = [worker.counters for worker in llm.report().workers]
        leaked = llm.engine.close()
    assert any(key.startswith("fault_") for counter in counters for key in counter), "no fault was injected"
    for each in events:
        assert_ended_once(each)
    assert [each[-1].output.token_ids for each in events if each[-1].output] == expected_tokens(
        tiny_directory
    )
    assert set(leaked.values()) == {0}


@pytest.mark.parametrize("fault", ["bitflip=1", "truncate=1", "fail=1"])
def test_a_transport_that_never_works_is_an_error_not_a_wrong_answer(
    tiny_directory: Path, fault: str
) -> None:
    with tiny_llm(tiny_directory, transport=f"faulty:inner=inproc,{fault}") as llm:
        with pytest.raises(RequestsFailed) as failure:
            llm.generate([*prompts(100, 200), [5]], greedy(4))
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert all(isinstance(error, TransferFailed) for error in failure.value.errors)
    assert failure.value.outputs[:2] == [None, None]
    assert failure.value.outputs[2] is not None, "a one-token prompt moves no KV and must not be lost"
    assert set(leaked.values()) == {0}


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("victim", ["prefill-0", "decode-1"])
def test_requests_move_when_a_worker_is_killed(tiny_directory: Path, victim: str) -> None:
    settings: dict[str, Any] = {"transport": "shm", "prefill_workers": 2, "decode_workers": 2}
    with tiny_llm(tiny_directory, **settings, policy="round_robin") as llm:
        pid = next(worker.pid for worker in llm.report().workers if worker.worker_id == victim)
        killed = False
        outputs: dict[int, list[int]] = {}
        for index, event in llm.stream_many(prompts(*LENGTHS) * 4, greedy(64)):
            if event.token_ids and not killed:
                os.kill(pid, signal.SIGKILL)
                killed = True
            assert event.error is None
            if event.output is not None:
                outputs[index] = event.output.token_ids
        report = llm.report()
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    with tiny_llm(tiny_directory, mode="colocated") as llm:
        expected = [output.token_ids for output in llm.generate(prompts(*LENGTHS), greedy(64))]
    assert [outputs[index] for index in range(4 * len(LENGTHS))] == expected * 4
    assert [worker.is_alive for worker in report.workers].count(False) == 1
    assert report.num_requests["finished"] == 4 * len(LENGTHS)
    assert report.num_requests["retried"] > 0
    assert victim not in leaked
    assert set(leaked.values()) == {0}


@pytest.mark.usefixtures("no_leftovers")
def test_the_last_worker_of_a_role_takes_its_requests_down_with_the_reason(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, transport="shm") as llm:
        pid = next(worker.pid for worker in llm.report().workers if worker.worker_id == "decode-0")
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(RequestsFailed) as failure:
            llm.generate(prompts(*LENGTHS) * 10, greedy(500))
        assert all(isinstance(error, WorkerFailed) for error in failure.value.errors)
        assert "decode-0 died: killed by SIGKILL" in str(failure.value)
        with pytest.raises(RequestsFailed, match="no decode worker is alive"):
            llm.generate(prompts(10), greedy(4))


@pytest.mark.usefixtures("no_leftovers")
def test_a_stopped_worker_is_given_up_and_its_requests_move(tiny_directory: Path) -> None:
    settings: dict[str, Any] = {"transport": "shm", "decode_workers": 2, "worker_timeout_s": 1.0}
    with tiny_llm(tiny_directory, **settings, policy="round_robin") as llm:
        pid = next(worker.pid for worker in llm.report().workers if worker.worker_id == "decode-0")
        os.kill(pid, signal.SIGSTOP)
        outputs = llm.generate(prompts(*LENGTHS), greedy(16))
        alive = {worker.worker_id: worker.is_alive for worker in llm.report().workers}
    assert [output.token_ids for output in outputs] == expected_tokens(tiny_directory)
    assert alive == {"prefill-0": True, "decode-0": False, "decode-1": True}


@pytest.mark.usefixtures("no_leftovers")
def test_who_was_stopped_together_goes_on_together(tiny_directory: Path) -> None:
    """The router sleeps as long as its workers, and longer than it would wait for one: nobody is given up."""
    with tiny_llm(tiny_directory, transport="shm", worker_timeout_s=2.0) as llm:
        pids = [worker.pid for worker in llm.report().workers]

        def sleep(_: float) -> None:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(3.0)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

        events: list[StreamEvent] = []
        llm.engine.submit(llm.engine.prepare(prompts(300)[0], greedy(200)), events.append)
        llm.engine._runtime.call(sleep).result()
        outputs = llm.generate(prompts(10), greedy(4))
        assert len(outputs[0].token_ids) == 4
        assert all(worker.is_alive for worker in llm.report().workers)
        assert llm.report().num_requests["retried"] == 0


def test_aborts_at_any_point_free_everything(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, num_kv_blocks=12, prefill_chunk_tokens=64) as llm:
        for round_number in range(6):
            for count, _ in enumerate(llm.stream_many(prompts(*LENGTHS) * 2, greedy(60))):
                if count == 7 * round_number:
                    break
        outputs = llm.generate(prompts(*LENGTHS), greedy(16))
        ended = llm.report().num_requests
        assert_all_blocks_home(llm)
        leaked = llm.engine.close()
    assert [output.token_ids for output in outputs] == expected_tokens(tiny_directory)
    assert ended["aborted"] > 0
    assert set(leaked.values()) == {0}


def test_closing_ends_what_is_running(tiny_directory: Path) -> None:
    llm = tiny_llm(tiny_directory)
    events: list[StreamEvent] = []
    for prompt in prompts(*LENGTHS):
        llm.engine.submit(llm.engine.prepare(prompt, greedy(500)), events.append)
    llm.close()
    errors = [event.error for event in events if event.error is not None]
    assert len(errors) == len(LENGTHS)
    assert all(isinstance(error, EngineClosed) for error in errors)
    with pytest.raises(EngineClosed):
        llm.generate(prompts(4), greedy(4))
    llm.close()


def test_an_owner_whose_callback_raises_harms_nobody_else(tiny_directory: Path) -> None:
    def broken(event: StreamEvent) -> None:
        raise RuntimeError("the owner's own bug")

    with tiny_llm(tiny_directory) as llm:
        llm.engine.submit(llm.engine.prepare(prompts(20)[0], greedy(200)), broken)
        outputs = llm.generate(prompts(*LENGTHS), greedy(16))
        assert_all_blocks_home(llm)
        assert llm.report().num_requests["aborted"] == 1
    assert [output.token_ids for output in outputs] == expected_tokens(tiny_directory)


def test_a_closed_event_loop_harms_nobody_else(tiny_directory: Path) -> None:
    async def leave_open() -> object:
        stream = llm.stream(prompts(20)[0], greedy(900))
        await anext(stream)
        return stream  # kept, so that nobody closes it before the loop is gone

    llm = AsyncLLM(str(tiny_directory), transport="inproc", dtype="float32", num_kv_blocks=64)
    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(leave_open())
    loop.close()
    outputs = asyncio.run(llm.generate(prompts(20)[0], greedy(16)))
    assert len(outputs.token_ids) == 16
    asyncio.run(llm.close())
    del kept


def test_a_step_that_cannot_be_computed_fails_its_requests_not_the_worker(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvrelay.runner import Runner

    def out_of_memory(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with tiny_llm(tiny_directory) as llm:
        for method in ("prefill", "decode"):
            with monkeypatch.context() as patch:
                patch.setattr(Runner, method, out_of_memory)
                with pytest.raises(RequestsFailed, match=r"could not compute a step.*allocate memory"):
                    llm.generate(prompts(100), greedy(4))
            assert_all_blocks_home(llm)
        assert all(worker.is_alive for worker in llm.report().workers)
        assert len(llm.generate(prompts(100), greedy(4))[0].token_ids) == 4
