"""The one reader of the one meter: a thread in the router's process that samples for all workers.

Knows threads and the clock; the arithmetic is `EnergyAccount`'s.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from kvrelay.energy.account import EnergyAccount
from kvrelay.energy.meter import Meter
from kvrelay.energy.records import Activity
from kvrelay.energy.report import EnergyReport, RequestEnergy
from kvrelay.errors import EnergyUnavailable

MAX_FAILURES = 20  # readings lost in a row; a counter makes up for fewer, since it is cumulative


class EnergyReader:
    """Samples `meter` every `period_s` into an account; every method may be called from any thread.

    Owns the meter and closes it. `start` begins sampling, `close` ends it with a last sample; figures stay
    readable afterwards. Without a meter (`source` None) no thread runs.
    """

    def __init__(
        self, meter: Meter, *, period_s: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.meter = meter
        self._clock = clock
        self._period_s = period_s
        self._account = EnergyAccount(meter.domains, meter.source)
        self._account_lock = threading.Lock()
        self._meter_lock = threading.Lock()  # taken first; a slow driver call never holds up the router
        self._stop = threading.Event()
        self._closed = False
        self._num_failures = 0
        self._thread: threading.Thread | None = None

    def start(self) -> "EnergyReader":
        """Takes the first sample and starts the thread. Raises `EnergyUnavailable`; call it once."""
        assert self._thread is None, "already started"
        if self.meter.source is not None:
            self._sample()
            self._thread = threading.Thread(target=self._run, name="kvrelay-energy", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Takes a last sample, ends the thread and releases the meter. Calling it again does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._meter_lock:
            if self._closed:
                return
        self.sample_now()
        with self._meter_lock:
            self._closed = True
            self.meter.close()

    def sample_now(self) -> None:
        """Samples at once, so that a report includes the last milliseconds the counter has seen."""
        try:
            self._sample()
        except EnergyUnavailable as error:
            self._note_failure(str(error))

    def add_activity(self, activity: Activity) -> None:
        """See `EnergyAccount.add_activity`."""
        with self._account_lock:
            self._account.add_activity(activity)

    def add_heartbeat(self, worker_id: str, until_s: float) -> None:
        """See `EnergyAccount.add_heartbeat`."""
        with self._account_lock:
            self._account.add_heartbeat(worker_id, until_s)

    def retire_worker(self, worker_id: str) -> None:
        """See `EnergyAccount.retire_worker`."""
        with self._account_lock:
            self._account.retire_worker(worker_id)

    def request_energy(self, request_id: str) -> RequestEnergy:
        """See `EnergyAccount.request_energy`."""
        with self._account_lock:
            return self._account.request_energy(request_id, self._clock())

    def snapshot(self) -> EnergyReport:
        """See `EnergyAccount.snapshot`; the meter's warnings are added."""
        with self._account_lock:
            report = self._account.snapshot(self._clock())
        return replace(report, warnings=(*self.meter.warnings, *report.warnings))

    def __enter__(self) -> "EnergyReader":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sample(self) -> None:
        with self._meter_lock:
            if self._closed or self.meter.source is None:
                return
            now_s = self._clock()
            joules = self.meter.sample(now_s)
            self._num_failures = 0
            with self._account_lock:
                self._account.add_sample(now_s, joules)

    def _note_failure(self, reason: str) -> None:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            self._fail(f"{self._num_failures} readings failed in a row: {reason}")

    def _fail(self, reason: str) -> None:
        with self._account_lock:
            self._account.fail(reason)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._period_s):
                self.sample_now()
        finally:
            if not self._stop.is_set():
                self._fail("the energy reader ended unexpectedly; its traceback is on stderr")
