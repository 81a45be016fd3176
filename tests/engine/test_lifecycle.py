"""However the user's process ends, no worker, socket or shared memory stays behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits "ignored"
from kvrelay import LLM, SamplingParams
llm = LLM({model!r}, transport="shm", dtype="float32", num_kv_blocks=32)
print(*[worker.pid for worker in llm.report().workers], llm.engine._workers.run_directory, flush=True)
{then}
"""
GENERATE = "while True: llm.generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=900, ignore_eos=True))"


Start = Callable[[str], tuple["subprocess.Popen[str]", list[int], Path]]


@pytest.fixture
def start(tiny_directory: Path) -> Iterator[Start]:
    """Starts a user's script on the tiny model; what still runs after the test is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(then: str) -> tuple["subprocess.Popen[str]", list[int], Path]:
        code = SCRIPT.format(model=str(tiny_directory), then=then)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        *pids, directory = process.stdout.readline().split()
        return process, [int(pid) for pid in pids], Path(directory)

    yield start
    for process in processes:
        process.kill()
        process.wait(15)


def assert_gone(pids: list[int], directory: Path) -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        if not any(psutil.pid_exists(pid) for pid in pids) and not directory.exists():
            return
        time.sleep(0.05)
    left = [pid for pid in pids if psutil.pid_exists(pid)]
    pytest.fail(f"left behind: processes {left}, directory {directory.exists()}")


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_to_the_user_process_leaves_nothing(start: Start, how: str) -> None:
    process, pids, directory = start(GENERATE)
    assert len(pids) == 2
    time.sleep(0.3)
    process.send_signal(getattr(signal, how))
    assert process.wait(15) != 0
    assert_gone(pids, directory)


def test_a_script_that_forgets_to_close_leaves_nothing(start: Start) -> None:
    process, pids, directory = start("")
    assert process.wait(15) == 0
    assert_gone(pids, directory)


def test_ctrl_c_at_a_terminal_reaches_the_user_only(start: Start) -> None:
    """A terminal signals its whole foreground group; workers are in sessions of their own."""
    process, pids, _ = start("time.sleep(60)")
    assert all(os.getsid(pid) != os.getsid(process.pid) for pid in pids)


def test_nothing_is_named_in_shared_memory(start: Start) -> None:
    _, pids, _ = start("time.sleep(60)")
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    assert all("/memfd:" in text and "/dev/shm/" not in text for text in maps)
