"""The C library's memory, kept for the next layer while a pipeline works, where it goes back to the system by default.

What a layer gives is megabytes, and the system clears each page of fresh memory at the first touch: for a layer of an
autoencoder that takes as long as half a convolution.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM, LARGE, MAPPED = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h
USUAL = {LARGE: 1 << 25, TRIM: 1 << 26, MAPPED: 1 << 16}
"""Where glibc arrives by itself when large blocks come and go; having been told once, it adjusts no more."""
KEEPING = {LARGE: 1 << 25, TRIM: (1 << 31) - 1, MAPPED: 0}
_LOCK = threading.Lock()
_inside = 0


@contextmanager
def kept() -> Generator[None]:
    """Memory that is freed in here stays with the process; the last to leave gives it back.

    With other libraries than glibc, nothing changes.
    """
    global _inside
    with _LOCK:
        _inside += 1
        _set(KEEPING)
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                _set(USUAL)
                _given_back()


def _set(options: dict[int, int]) -> None:
    library = _glibc()
    for option, value in options.items() if library else ():
        library.mallopt(option, value)


def _given_back() -> None:
    library = _glibc()
    if library:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        needed = (library.gnu_get_libc_version, library.mallopt, library.malloc_trim)
    except (OSError, AttributeError):
        return None
    return library if all(needed) else None
