"""The shared kernel tests on the Triton kernels, in Triton's interpreter and a process of its own.

A sample by default; ``--slow`` runs all of them. The interpreter is slow, and silently wrong for bf16.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ["test_attention.py", "test_kv_block_stats.py", "test_select_blocks.py"]
SAMPLE = " or ".join(
    [
        "float32",  # the four attention operations at length edges, poison everywhere unread
        "(every_head_dim and 96)",
        "any_chunk_offset",
        "empty_in_every_split",
        "many_splits",
        "match_the_keys",
        "scratch and 300",
        "(up_to_ties and (tree or quest))",
        "(without_the_oracle and tree)",
        "is_the_oracles",
        "(by_peak_are and tree and 64)",
    ]
)


def run_interpreted(*arguments: str) -> str:
    files = [str(Path(__file__).parent / name) for name in SHARED]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_a_sample_of_the_shared_suite_passes_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert " passed" in run_interpreted("-k", SAMPLE)


@pytest.mark.slow
def test_the_shared_suite_passes_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert " passed" in run_interpreted()
