"""What this machine does fastest, found out by trying, once, and kept in a file beside the user's other caches."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

REPEATS = 3
LONG = 0.05
"""Seconds that all tries take together, at least: short ones are repeated more often."""
MARGIN = 1.05
"""How much faster another way has to be to be taken over the first, which is torch's own."""
_LOCK = threading.Lock()
_known: dict[str, str] | None = None


def fastest(key: str, ways: Mapping[str, Callable[[], Any]], margin: float = MARGIN) -> str:
    """The name of the fastest of several ways, the first unless another is faster by a margin.

    Each is tried a few times in turn; what was found under a key is remembered, here and in a file.
    """
    with _LOCK:
        known = _remembered()
        if known.get(key) not in ways:
            times = seconds(ways)
            first, best = next(iter(ways)), min(times, key=times.__getitem__)
            known[key] = best if times[first] > margin * times[best] else first
            _remember(known)
        return known[key]


def seconds(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The shortest time that each takes, tried in turn after one try that is not counted."""
    taken = dict.fromkeys(ways, float("inf"))
    repeat, start = 0, time.perf_counter()
    with torch.no_grad():
        while repeat <= REPEATS or time.perf_counter() - start < LONG:
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if repeat:
                    taken[name] = min(taken[name], time.perf_counter() - begin)
            repeat += 1
    return taken


def file() -> Path:
    """Where it is kept; one file for each processor, number of threads and version of torch."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"{processor()} {torch.get_num_threads()} {torch.__version__}"
    return Path(home, "autopipeline", "".join(c if c.isalnum() else "-" for c in name) + ".json")


def processor() -> str:
    """The processor's name and, where the system tells them, its family, model and vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    said = [facts.get(name, "") for name in ("model name", "cpu family", "model")]
    return " ".join([*said, torch.backends.cpu.get_cpu_capability()])


@cache
def memory() -> int:
    """Bytes that this machine has, or that this process's group may have; where no one tells, 8 GiB."""
    found = [8 << 30]
    with suppress(AttributeError, ValueError, OSError):  # not everywhere
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(ValueError, OSError):  # "max" without a limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return min(found)


def _remembered() -> dict[str, str]:
    global _known
    if _known is None:
        try:
            found = json.loads(file().read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        pairs = found.items() if isinstance(found, dict) else ()
        _known = {str(key): way for key, way in pairs if isinstance(way, str)}
    return _known


def _remember(known: dict[str, str]) -> None:
    """Write the file whole, or not at all: a machine without a place for it measures again."""
    target = file()
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=2, sort_keys=True), "utf-8")
        os.replace(part, target)
    except OSError:
        with suppress(OSError):
            part.unlink()
