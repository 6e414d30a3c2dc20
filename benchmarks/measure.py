"""What the benchmarks share: whole processes, timed in turn, so that both libraries meet the same machine."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]


def output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def seconds(command: Sequence[str]) -> float:
    begin = time.perf_counter()
    output(command)
    return time.perf_counter() - begin


def in_turn(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[float]]:
    """Seconds of each command, `runs` times, taken in turn; one more run before is not counted."""
    for command in commands.values():
        output(command)
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    return taken


def row(name: str, values: Sequence[float], unit: str = "s", peer: Sequence[float] | None = None) -> str:
    low, middle = min(values), statistics.median(values)
    ratio = f"   peer / ours {statistics.median(peer) / middle:.2f}" if peer else ""
    return f"{name:34} min {low:8.3f} {unit}   median {middle:8.3f} {unit}{ratio}"


def machine() -> str:
    import platform

    import torch

    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch {torch.__version__}"
