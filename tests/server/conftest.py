"""One server over the tiny model for the tests that only ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_server import Served, tiny_server


@pytest.fixture(scope="package")
def served(tiny_directory: Path) -> Iterator[Served]:
    """1 prefill + 1 decode, with watts to assume, without a key."""
    with tiny_server(tiny_directory, power_model="idle_w=5,busy_w=20") as served:
        yield served
