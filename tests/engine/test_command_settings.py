"""`generate` and `demo` take their settings as `serve` does: `--set`, then options; any field, checked."""

from typing import Any

import pytest
from typer.testing import CliRunner

from kvrelay import LLM
from kvrelay.cli import DEFAULT_MODEL, _settings, app
from kvrelay.errors import InvalidConfig


def test_options_go_before_pairs_and_a_model_is_always_there() -> None:
    pairs = ["max_num_seqs=4", "transport=inproc", "model=from-pair"]
    assert _settings(pairs, {"transport": "shm"}, None) == {
        "model": "from-pair",
        "max_num_seqs": 4,
        "transport": "shm",
    }
    assert _settings(pairs, {}, "from-option")["model"] == "from-option"
    assert _settings(None, {}, None) == {"model": DEFAULT_MODEL}


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("no_such=1", "no_such: there is no such setting"),
        ("self=1", "self: there is no such setting"),
        ("cls=1", "cls: there is no such setting"),
        ("model=1", "model=1: Expected `str`"),
        ("pue=NaN", "pue=nan: expected at least 1"),
        ("lease_s=Infinity", "lease_s=inf: expected seconds above 0"),
    ],
)
def test_a_pair_that_is_wrong_is_refused_by_name(pair: str, reason: str) -> None:
    settings: dict[str, Any] = _settings([pair], {}, None)
    with pytest.raises(InvalidConfig, match=reason):
        LLM(**settings)


@pytest.mark.parametrize("arguments", [["demo"], ["generate", "--prompt", "x"]])
@pytest.mark.parametrize("model", ["[1]", '["[/]"]', "{}", "1"])
def test_a_model_that_is_no_text_is_refused_by_every_command(arguments: list[str], model: str) -> None:
    done = CliRunner().invoke(app, [*arguments, "--set", f"model={model}"])
    assert isinstance(done.exception, InvalidConfig), done.exception
    assert "Expected `str`" in str(done.exception)
