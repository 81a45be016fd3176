"""Settings of `kvrelay serve`: a TOML file, then `--set PATH=VALUE`, then the command's own options.

The file's top level holds `EngineConfig`'s fields, its `[server]` table `ServerConfig`'s.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrelay.config import EngineConfig
from kvrelay.errors import InvalidConfig
from kvrelay.server_config import ServerConfig

SERVER = "server"
MAX_QUEUED_REQUESTS = 1024  # a server answers 429 past this many unless told otherwise


def read_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `InvalidConfig`, naming the file and the place in it."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InvalidConfig(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"--config {path}: {error}") from error


def parse_pair(pair: str) -> tuple[str, Any]:
    """`PATH=VALUE` of `--set`; the value is JSON where it parses as such, else text."""
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise InvalidConfig(f"--set {pair!r}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def combine(
    file: dict[str, Any], pairs: Sequence[str], engine: dict[str, Any], server: dict[str, Any]
) -> tuple[EngineConfig, ServerConfig]:
    """Both configurations; None among the options `engine` and `server` means: not given.

    Raises `InvalidConfig` or `UnknownName` naming the field.
    """
    chosen = dict(file)
    listening = chosen.pop(SERVER, {})
    if not isinstance(listening, dict):
        raise InvalidConfig(f"[{SERVER}]: expected a table; got {listening!r}")
    for pair in pairs:
        path, value = parse_pair(pair)
        table, _, name = path.rpartition(".")
        if table not in ("", SERVER):
            raise InvalidConfig(f"--set {path}: there is no table {table!r}; there is {SERVER!r}")
        (listening if table else chosen)[name] = value
    chosen |= {name: value for name, value in engine.items() if value is not None}
    chosen.setdefault("max_queued_requests", MAX_QUEUED_REQUESTS)
    listening |= {name: value for name, value in server.items() if value is not None}
    if "model" not in chosen:
        raise InvalidConfig("model: missing; give --model, or model = '...' in the file")
    return EngineConfig.of(**chosen), ServerConfig.of(**listening)
