"""Records name the state of the source that made them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay.experiments import record

RECORD, PICTURE = "benchmarks/results/peers.json", "docs/peers.png"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the module that makes records, a record, a picture, and a page."""
    module = tmp_path / "engine/record.py"
    for path in (module, tmp_path / RECORD, tmp_path / PICTURE, tmp_path / "page.md"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    shutil.copy(record.__file__, module)
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", *arguments.split()], cwd=tmp_path, check=True)
    return tmp_path


def made_in(checkout: Path) -> dict[str, object]:
    program = (
        "import json, record; print(json.dumps(record.make_record('x', {}, record.Gate(checks={}), {})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout / "engine", capture_output=True, text=True, check=True
    )
    made: dict[str, object] = json.loads(done.stdout)
    return made


def test_a_changed_file_makes_a_record_dirty_but_an_earlier_record_does_not(checkout: Path) -> None:
    first = made_in(checkout)
    assert first["dirty"] is False
    assert len(str(first["commit"])) == 40

    (checkout / RECORD).write_text('{"another": "run"}')
    (checkout / PICTURE).write_text("of another run")
    assert made_in(checkout)["dirty"] is False

    (checkout / "page.md").write_text("changed")
    assert made_in(checkout)["dirty"] is True
