"""Starts, watches and stops workers: a process each, or threads for transports that share one process.

Knows exit codes and logs. Knows nothing about requests.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

import msgspec

from kvrelay.config import EngineConfig, WorkerConfig
from kvrelay.transport import is_in_process
from kvrelay.types import WorkerId

LOG_LINES = 12
# OpenMP's threads (torch's) look for more work this often, some tens of microseconds, as our kernels' own do.
# Of themselves they do for milliseconds, on cores that the next kernel needs.
SHORT_WAITS = {"GOMP_SPINCOUNT": "2000"}
SETS_WAITS = SHORT_WAITS.keys() | {"OMP_WAIT_POLICY"}
MAX_SOCKET_PATH = 60  # a Unix socket's path ends at 107 bytes; ours add a name to the directory


class Workers(Protocol):
    """The running workers of one engine."""

    run_directory: str

    def start(self, configs: Sequence[WorkerConfig]) -> None:
        """Start them all; returns at once."""

    def dead(self) -> list[tuple[WorkerId, str]]:
        """Workers that ended since the last call, each with the reason, from its own log if it left one."""

    def kill(self, worker_id: WorkerId) -> None:
        """End one at once; `dead` will report it."""

    def close(self, timeout_s: float) -> None:
        """Wait for those told to stop, end the rest, leave no process or file."""


class ProcessWorkers:
    """`python -m kvrelay.worker`, each in a session of its own: Ctrl-C reaches the parent only."""

    def __init__(self) -> None:
        self.run_directory = make_run_directory()
        self._processes: dict[WorkerId, subprocess.Popen[bytes]] = {}
        self._logs: dict[WorkerId, Path] = {}

    def start(self, configs: Sequence[WorkerConfig]) -> None:
        for config in configs:
            path = Path(self.run_directory, f"{config.worker_id}.log")
            self._logs[config.worker_id] = path
            with path.open("wb") as log:
                self._processes[config.worker_id] = _start(config, log)

    def dead(self) -> list[tuple[WorkerId, str]]:
        running = list(self._processes.items())  # a copy: the starting thread adds to it
        ended = [(w, process) for w, process in running if process.poll() is not None]
        for worker_id, _ in ended:
            del self._processes[worker_id]
        return [(w, _reason(process.returncode, self._logs[w])) for w, process in ended]

    def kill(self, worker_id: WorkerId) -> None:
        if worker_id in self._processes:
            self._processes[worker_id].kill()

    def close(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._processes.clear()
        shutil.rmtree(self.run_directory, ignore_errors=True)


class ThreadWorkers:
    """The same workers as threads of this process, for in-process transports."""

    def __init__(self) -> None:
        from kvrelay.transport.base import InprocHub

        self.run_directory = make_run_directory()
        self._hub = InprocHub()
        self._threads: dict[WorkerId, threading.Thread] = {}
        self._reasons: dict[WorkerId, str] = {}

    def start(self, configs: Sequence[WorkerConfig]) -> None:
        for config in configs:
            thread = threading.Thread(target=self._serve, args=(config,), name=config.worker_id, daemon=True)
            thread.start()
            self._threads[config.worker_id] = thread

    def dead(self) -> list[tuple[WorkerId, str]]:
        threads = list(self._threads.items())  # a copy: the starting thread adds to it
        ended = [w for w, thread in threads if not thread.is_alive() or w in self._reasons]
        for worker_id in ended:
            del self._threads[worker_id]
        return [(worker_id, self._reasons.get(worker_id, "its thread ended")) for worker_id in ended]

    def kill(self, worker_id: WorkerId) -> None:
        """A thread cannot be ended from outside: it is given up, and reported dead although it may linger."""
        self._reasons[worker_id] = "it was silent, and its thread cannot be ended from outside"

    def close(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        shutil.rmtree(self.run_directory, ignore_errors=True)

    def _serve(self, config: WorkerConfig) -> None:
        from kvrelay.worker.loop import serve

        try:
            serve(config, self._hub)
        except Exception as error:  # noqa: BLE001  whatever ended it is the reason that the router reports
            self._reasons[config.worker_id] = f"{type(error).__name__}: {error}"


def open_workers(config: EngineConfig) -> Workers:
    """Processes, unless the transport needs one process."""
    return ThreadWorkers() if is_in_process(config.transport) else ProcessWorkers()


def make_run_directory() -> str:
    """A private directory for sockets and logs, short enough for a socket's path."""
    directory = tempfile.mkdtemp(prefix=f"kvrelay-{os.getpid()}-")
    if len(directory) > MAX_SOCKET_PATH:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix=f"kvrelay-{os.getpid()}-", dir="/tmp")
    return directory


def worker_environment() -> dict[str, str]:
    """This process's, with our packages on the path, and `SHORT_WAITS` unless it says how OpenMP waits."""
    source_roots = [str(Path(__file__).resolve().parent.parent), *_kernel_roots()]
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), *source_roots]
    waits = {} if SETS_WAITS & os.environ.keys() else SHORT_WAITS
    return {**waits, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _start(config: WorkerConfig, log: IO[bytes]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kvrelay.worker"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=worker_environment(),
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process


def _kernel_roots() -> list[str]:
    """Where the kernel library lies, found without importing it (it imports torch)."""
    found = importlib.util.find_spec("kvrelay_kernels")
    return [str(Path(found.origin).resolve().parent.parent)] if found and found.origin else []


def _reason(returncode: int, log: Path) -> str:
    how = f"exit code {returncode}"
    if returncode < 0:
        how = f"killed by {signal.Signals(-returncode).name}"
        if -returncode == signal.SIGKILL:
            how += " (out of memory?)"
    lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:] if log.exists() else []
    return f"{how}; its log ends: " + "\n".join(lines) if lines else f"{how}; its log is empty"
