"""Reads a JSON file that must hold an object. Knows nothing about models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in `path`; `ModelError` names the file when it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"missing file {path}") from error
    except (OSError, ValueError, RecursionError) as error:  # not text, not JSON, too long a number, too deep
        raise ModelError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def number(values: Mapping[str, Any], key: str, source: Path, default: float) -> float:
    """A finite number of an object read from `source`; where it has none, or null, the default."""
    value = default if values.get(key) is None else values[key]
    try:
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float holds
        value = "an integer of more than 300 digits"
    raise ModelError(f"{source}: {key} must be a finite number, not {value!r}")


def read_json_object_if_any(path: Path) -> dict[str, Any]:
    """Return the object in `path`, or an empty one when there is no such file."""
    return read_json_object(path) if path.exists() else {}
