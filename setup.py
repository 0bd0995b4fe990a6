"""Builds the one compiled library, flipkd/_native*.so; everything else is in pyproject.toml.

The library is plain C ABI and is loaded with ctypes (flipkd/kernels/native.py), not imported: a contributor needs a C++
compiler and nothing else (no CMake, no binding generator, no Python headers), and ctypes lets go of the GIL by itself.
`optional=True` makes an install without a compiler succeed; flipkd then uses its PyTorch reference and says so once.
There is no -march=native: the sources choose the instruction set at run time, so a wheel runs on any CPU of its kind.
FLIPKD_SANITIZE=address,undefined builds it with GCC's sanitizers; the README's "Development" runs it so.
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SANITIZE = os.environ.get("FLIPKD_SANITIZE", "")
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g"] if SANITIZE else []


class BuildNative(build_ext):
    """Builds a library that is no Python module."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Ask for no PyInit__native (only some linkers look at this list): there is no module to initialise."""
        return list(ext.export_symbols)


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "flipkd._native",
            sources=[
                "flipkd/kernels/pair_score/cpu.cpp",
                "flipkd/kernels/encoder_ops/attention_cpu.cpp",
                "flipkd/kernels/encoder_ops/cpu.cpp",
                "flipkd/vectors/index.cpp",
            ],
            depends=sorted(glob("flipkd/kernels/**/*.h", recursive=True)),
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-pthread", "-fno-math-errno", "-ffp-contract=off", *SANITIZERS],
            extra_link_args=["-pthread", *SANITIZERS] if sys.platform != "darwin" else [],
            optional=True,
        )
    ],
)
