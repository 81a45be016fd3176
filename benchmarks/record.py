"""Ends a benchmark whose gate says more than checks: the engine's record, printed and, if kept, written."""

import json
from pathlib import Path
from typing import Any

from kvrelay.experiments import record as engine

RESULTS = Path(__file__).parent / "results"


def write_record(
    name: str,
    *,
    settings: dict[str, Any],
    gate: dict[str, Any],
    results: Any,
    keep: bool = True,
    directory: Path = RESULTS,
) -> dict[str, Any]:
    """Print the record as the last line and, if ``keep``, write ``<directory>/<name>.json``.

    gate: what was checked, with a bool under ``passed``.
    """
    checks = engine.Gate(checks={"passed": gate["passed"]})
    record = {**engine.make_record(name, settings, checks, results), "gate": gate}
    if keep:
        engine.write_record(record, directory / f"{name}.json")
    print(json.dumps(record))
    return record
