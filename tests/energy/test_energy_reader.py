"""The reader thread: one per router, safe from any thread, clean at the end."""

import threading
import time
from collections.abc import Callable

import pytest

from kvrelay.energy.none import NoMeter
from kvrelay.energy.reader import MAX_FAILURES, EnergyReader
from kvrelay.energy.records import Activity, Domain
from kvrelay.errors import EnergyUnavailable


class FakeMeter:
    """10 W on one domain; fails on demand."""

    source = "rapl"
    domains = (Domain(name="package", worker_ids=("w",)),)

    def __init__(self) -> None:
        self.why = "asked for by name"
        self.warnings: tuple[str, ...] = ("a warning",)
        self.error: Exception | None = None
        self.num_samples = 0
        self.num_closed = 0
        self.readers: set[str] = set()

    def sample(self, now_s: float) -> dict[str, float]:
        assert not self.num_closed
        self.readers.add(threading.current_thread().name)
        if self.error:
            raise self.error
        self.num_samples += 1
        return {"package": 10.0 * now_s}

    def close(self) -> None:
        self.num_closed += 1


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 5 s"
        time.sleep(0.005)


def decode(start_s: float, end_s: float) -> Activity:
    return Activity(worker_id="w", phase="decode", start_s=start_s, end_s=end_s, num_tokens={"a": 1})


def test_figures_on_a_fake_clock() -> None:
    meter, clock = FakeMeter(), FakeClock()
    reader = EnergyReader(meter, clock=clock)
    for index in range(41):
        clock.now_s = index * 0.05
        reader.sample_now()
    reader.add_activity(decode(0.5, 1.0))
    reader.add_heartbeat("w", 2.0)
    report = reader.snapshot()
    assert (report.gross_j, report.decode_j) == (pytest.approx(20.0), pytest.approx(5.0))
    assert report.warnings == ("a warning",)
    assert reader.request_energy("a").decode_j == pytest.approx(5.0)
    reader.retire_worker("w")


def test_the_thread_samples_and_close_ends_it_with_a_last_sample() -> None:
    meter = FakeMeter()
    with EnergyReader(meter, period_s=0.005) as reader:
        wait_until(lambda: meter.num_samples >= 5)
        assert sum(thread.name == "kvrelay-energy" for thread in threading.enumerate()) == 1
    assert not any(thread.name == "kvrelay-energy" for thread in threading.enumerate())
    assert "MainThread" in meter.readers
    reader.close()
    assert meter.num_closed == 1
    reader.sample_now()
    report = reader.snapshot()
    assert report.gross_j == pytest.approx(10.0 * report.window_s)


def test_close_counts_the_time_up_to_itself() -> None:
    meter, clock = FakeMeter(), FakeClock()
    reader = EnergyReader(meter, period_s=60.0, clock=clock).start()
    clock.now_s = 5.0
    reader.close()
    assert reader.snapshot().gross_j == pytest.approx(50.0)


def test_many_threads_may_talk_to_it_at_once() -> None:
    meter = FakeMeter()
    failures: list[BaseException] = []

    def talk() -> None:
        try:
            for _ in range(100):
                now_s = time.monotonic()
                reader.add_activity(decode(now_s - 1e-4, now_s))
                reader.sample_now()
                reader.snapshot()
                reader.request_energy("a")
        except BaseException as error:
            failures.append(error)

    with EnergyReader(meter, period_s=0.001) as reader:
        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    report = reader.snapshot()
    assert not failures
    assert report.gross_j is not None
    assert (report.decode_j or 0.0) + (report.idle_j or 0.0) == pytest.approx(report.gross_j, rel=1e-9)


def test_a_few_lost_readings_cost_nothing_and_many_make_it_unknown() -> None:
    meter, clock = FakeMeter(), FakeClock()
    reader = EnergyReader(meter, clock=clock)
    reader.sample_now()
    meter.error = EnergyUnavailable("busy")
    for _ in range(MAX_FAILURES - 1):
        reader.sample_now()
    meter.error, clock.now_s = None, 3.0
    reader.sample_now()
    assert reader.snapshot().gross_j == pytest.approx(30.0)
    meter.error = EnergyUnavailable("busy again")
    for _ in range(MAX_FAILURES - 1):
        reader.sample_now()
    assert reader.snapshot().gross_j == pytest.approx(30.0)
    meter.error = EnergyUnavailable("GPU is lost")
    for _ in range(MAX_FAILURES):
        reader.sample_now()
    report = reader.snapshot()
    assert report.gross_j is None
    assert "GPU is lost" in (report.reason or "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_dies_makes_the_figures_unknown() -> None:
    meter = FakeMeter()
    with EnergyReader(meter, period_s=0.005) as reader:
        meter.error = RuntimeError("a bug")
        wait_until(lambda: "unexpectedly" in (reader.snapshot().reason or ""))
        meter.error = None
    assert reader.snapshot().gross_j is None


def test_a_meter_that_fails_at_the_start_says_so_at_the_start() -> None:
    meter = FakeMeter()
    meter.error = EnergyUnavailable("no permission")
    with pytest.raises(EnergyUnavailable, match="no permission"):
        EnergyReader(meter).start()


def test_without_a_meter_no_thread_runs() -> None:
    before = threading.active_count()
    with EnergyReader(NoMeter()) as reader:
        assert threading.active_count() == before
        reader.add_activity(decode(0.0, 1.0))
        reader.add_heartbeat("w", 1.0)
        assert reader.snapshot().gross_j is None
        assert reader.request_energy("a").total_j is None
