"""The C++ kernels under AddressSanitizer: no read or write outside a tensor, though nobody would see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay_kernels.cpu.native.library import instruction_set

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi", "-pthread"]
LANES = {"generic": [4], "avx2": [8, "-mavx2", "-mfma"]}
TESTS = [
    *(
        "tests/kernels/test_packed_linear.py",
        "tests/kernels/test_cpu.py",
        "tests/kernels/test_kv_block_stats.py",
    ),
    *(
        "tests/kernels/test_select_blocks.py",
        "tests/kernels/test_attention.py",
        "tests/engine/test_native_step.py",
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(instruction_set() is None, reason="no C++ kernels here")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_kernels_stay_inside_their_tensors(tmp_path: Path) -> None:
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this g++ has no AddressSanitizer")
    package = tmp_path / "kernels" / "kvrelay_kernels"
    shutil.copytree(ROOT / "kernels/kvrelay_kernels", package, ignore=shutil.ignore_patterns("*.so"))
    name = "avx2" if instruction_set() in ("avx2", "avx512") else "generic"
    lanes, *flags = LANES[name]
    built = package / f"cpu/native/kernels_{name}.so"
    source = str(ROOT / "kernels/csrc/kernels.cpp")
    command = ["g++", *FLAGS, *map(str, flags), f"-DKVR_LANES={lanes}", "-fsanitize=address", source]
    subprocess.run([*command, "-o", str(built)], check=True)
    paths = [str(tmp_path / "kernels"), str(ROOT / "engine"), str(ROOT / "tests")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    chosen = "native or linear or tree_agrees or threads or rows or interleaved"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath=", *TESTS]
    done = subprocess.run([*run, "-k", chosen], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
