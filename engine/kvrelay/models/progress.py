"""How long work says how far it has come: a context manager that yields `advance(num_bytes)`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]
"""`progress(title, total bytes or None when unknown)` opens one stage."""


@contextmanager
def silent(title: str, total_bytes: int | None) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda num_bytes: None


@contextmanager
def progress_bar(title: str, total_bytes: int | None) -> Iterator[Advance]:
    """Show one bar on the terminal's standard error, pulsing while the total is unknown."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total_bytes is not None:
        columns.insert(2, DownloadColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=total_bytes)
        yield lambda num_bytes: bars.advance(task, num_bytes)
