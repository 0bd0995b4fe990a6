"""Loads the compiled library once.

`native()` is the only door to it. The library is optional: an install without a C++ compiler has none, and everything
that uses it has a slower way in Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import warnings
from pathlib import Path

# Raised with every change of an exported function's arguments or result, here and in pair_score/cpu.cpp, so that a
# library left over from an older checkout is refused instead of being called wrongly.
ABI_VERSION = 5

_REBUILD = "reinstall flipkd with a C++17 compiler present (pip install -e . in a checkout) for full speed"


class NativeLibraryWarning(UserWarning):
    """The compiled library is missing or stale; results are the same, slower."""


@functools.cache
def native() -> ctypes.CDLL | None:
    """Return the compiled library, or None (after one warning) where there is none that fits.

    Calls through it run without the GIL. Callers set `argtypes` and `restype` of the functions they use.
    """
    package = Path(__file__).resolve().parent.parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = package / f"_native{suffix}"
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            version = int(library.flipkd_abi_version())
        except (OSError, AttributeError) as error:
            _warn(f"the compiled library {path.name} does not load ({error})")
            return None
        if version != ABI_VERSION:
            _warn(f"the compiled library {path.name} is of another version of flipkd ({version}, not {ABI_VERSION})")
            return None
        return library
    _warn("flipkd was installed without its compiled library")
    return None


def _warn(what: str) -> None:
    warnings.warn(f"{what}; using the slower Python path; {_REBUILD}", NativeLibraryWarning, stacklevel=3)
