"""Checks that settings share: each raises with the field, what was needed and what there was."""

import math
import threading

from kvrelay.errors import InvalidConfig, UnknownName
from kvrelay.types import BLOCK_SIZE


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UnknownName` for a value that is not among the choices."""
    if value not in choices:
        raise UnknownName(f"{field}={value!r}: expected one of {', '.join(choices)}")


def check_at_least(field: str, value: float | None, least: float) -> None:
    """Raise `InvalidConfig` for a number below the least, or not finite; None passes."""
    if value is not None and not least <= value < math.inf:
        raise InvalidConfig(f"{field}={value}: expected at least {least}")


def check_seconds(field: str, seconds: float | None) -> None:
    """Raise `InvalidConfig` for a time that nobody can wait; None passes."""
    if seconds is not None and not 0.0 < seconds <= threading.TIMEOUT_MAX:
        most = f"at most {threading.TIMEOUT_MAX:g}"
        raise InvalidConfig(f"{field}={seconds!r}: expected seconds above 0, {most}")


def check_chunk(field: str, chunk: int | None) -> None:
    """Raise `InvalidConfig` for a chunk that is not of whole KV blocks; None passes."""
    if chunk is not None and (chunk < BLOCK_SIZE or chunk % BLOCK_SIZE):
        raise InvalidConfig(f"{field}={chunk}: expected a multiple of {BLOCK_SIZE}, or None")
