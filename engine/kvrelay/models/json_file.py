"""Reads a JSON file that must hold an object. Knows nothing about models."""

import json
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in `path`; `ModelError` names the file when it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"missing file {path}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_json_object_if_any(path: Path) -> dict[str, Any]:
    """Return the object in `path`, or an empty one when there is no such file."""
    return read_json_object(path) if path.exists() else {}
