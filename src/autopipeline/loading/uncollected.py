"""Loading makes thousands of objects and drops hardly any, which Python's garbage collector would look through again
and again, for a tenth of a second each time. Imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Without garbage collection; what is no longer referred to is freed all the same."""
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()
