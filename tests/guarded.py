"""Memory that ends where nothing more may be touched: a read or write past it ends the test run."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_protect = ctypes.CDLL(None).mprotect
_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that ends with its page, and the page behind it is closed."""
    pages = -(-array.nbytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    usable = (pages - 1) * mmap.PAGESIZE
    assert _protect(whole.ctypes.data + usable, mmap.PAGESIZE, 0) == 0
    copy = whole[usable - array.nbytes : usable].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
