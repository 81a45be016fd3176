"""Options and fixtures of the whole suite: `--slow` runs what a default run only samples."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tiny_engine import write_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """A default run draws the same examples every time; `--slow` looks for new ones.

    No example has a deadline: on a busy machine it would fail what is right.
    """
    settings.register_profile("same-every-time", derandomize=True, deadline=None)
    settings.register_profile("new-every-time", deadline=None)
    settings.load_profile("new-every-time" if config.getoption("--slow") else "same-every-time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="long; run with --slow"))


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte tokenizer, small enough for hundreds of requests a second."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fail when a worker process or a run directory outlives the test."""
    from tiny_engine import leftovers

    before = leftovers()
    yield
    assert not leftovers() - before
