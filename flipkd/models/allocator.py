"""How the C library's allocator treats the memory of a batch."""

from __future__ import annotations

import ctypes
import functools

# glibc's mallopt; its largest accepted threshold for mapped blocks is 32 MiB.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BLOCK = 64 << 20, 32 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Lets each thread keep up to 64 MiB that one layer has freed for the next one, in the whole process.

    By default glibc gives a freed block of a megabyte or more back to the system, so that every output of every layer
    is made of fresh pages, which the system first fills with zeros: a tenth of the time of encoding. Elsewhere (musl,
    macOS) nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
