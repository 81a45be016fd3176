"""Builds the optional C++ kernels: one shared library per instruction set, picked at run time.

Everything else about the package is in pyproject.toml. Without a compiler the install succeeds and says so;
``impl="cpu"`` is then batched torch. In a checkout: ``python setup.py build_ext --inplace``.
"""

import os
import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "kernels/csrc/kernels.cpp"
HEADERS = sorted(map(str, Path("kernels/csrc").glob("*.h")))
SOURCES_CRC = zlib.crc32(b"".join(Path(name).read_bytes() for name in [*HEADERS, SOURCE]))  # as library.py's
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
INSTRUCTION_SETS = {  # name: (float lanes, flags); library.py tries them in this order, reversed
    "generic": (4, []),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (16, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"]),
}


class BuildLibraries(build_ext):
    """Plain shared libraries with a C interface: no Python symbols, hence no Python version in the name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)  # the same source, compiled once per set
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def run(self) -> None:
        super().run()
        missing = [ext.name for ext in self.extensions if not os.path.exists(self.get_ext_fullpath(ext.name))]
        if missing:
            message = "kvrelay: not built, a C++17 compiler (GCC 12 or clang) is needed"
            print(f"{message}: {missing}; impl='cpu' will run batched torch instead", file=sys.stderr)


def extensions() -> list[Extension]:
    """The generic library everywhere; the others on x86-64 only. None on Windows."""
    if sys.platform == "win32":
        return []
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [
        Extension(
            f"kvrelay_kernels.cpu.native.kernels_{name}",
            [SOURCE],
            depends=HEADERS,
            language="c++",
            extra_compile_args=[*FLAGS, *flags, f"-DKVR_LANES={lanes}", f"-DKVR_SOURCES={SOURCES_CRC}u"],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, (lanes, flags) in INSTRUCTION_SETS.items()
        if x86 or name == "generic"
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries})
