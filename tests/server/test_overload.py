"""Ten times what the server can do, over HTTP: refused quickly and politely, and no slower for the others."""

from pathlib import Path

import pytest

from tiny_server import tiny_server, wait_for_blocks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_ten_times_the_sustainable_rate_is_refused_and_what_is_accepted_stays_fast(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences at a time, four may wait. The bars are those of `benchmarks/overload.py`; a machine that
    is busy with other things may serve half of what it did a moment ago without having collapsed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overload
    from openai_client import Target

    load = overload.Load(
        prompt="x" * 200, output_tokens=400, queue=4, at_once=2, times=10.0, seconds=4.0, num_calm=3
    )
    limits = {"max_queued_requests": load.queue, "max_num_seqs": load.at_once, "verify_kv": False}
    with tiny_server(tiny_directory, **limits) as served:
        results = overload.measure(Target("tiny", served.url, "tiny", {"ignore_eos": True}), load)
        wait_for_blocks(served.engine)
        counts = served.engine.report().num_requests
        assert counts["finished"] == load.num_calm + 6 * load.at_once + results["accepted"]
        assert counts["failed"] == counts["aborted"] == 0
    monkeypatch.setattr(overload, "LEAST_SERVED", 0.5)
    assert results["accepted"] >= load.queue + load.at_once
    assert overload.gate_of(results).passed, results
