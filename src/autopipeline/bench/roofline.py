"""What the machine can do at best, measured: products of matrices, convolutions, copies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autopipeline.speed import heap, machine, packing


def line() -> str:
    """The machine in a line."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    return f"{machine.processor()}{gpu}, {threads} threads, load {load:.1f}, torch {torch.__version__}"


def measured(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """GFLOP/s of a product of matrices and of a convolution, GB/s of a copy: the best of a few tries."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    picture = torch.randn(2, 320, 64, 64, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(320, 320, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    target = torch.empty_like(a)
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "matrix GFLOP/s": (partial(functional.linear, a, b), 2 * side**3),
        "convolution GFLOP/s": (lambda: functional.conv2d(picture, kernel, padding=1), 2 * 2 * 64**2 * 320 * 320 * 9),
        "copy GB/s": (lambda: target.copy_(a), 2 * a.nbytes),
    }
    if device.type == "cpu" and packing.able(dtype):  # torch's own may be slower than the machine
        layers = nn.Sequential(nn.Linear(side, side), nn.Conv2d(320, 320, 3, padding=1)).to(dtype)
        packing.pack(layers, always=True)
        work["matrix GFLOP/s"] = (partial(layers[0], a), 2 * side**3)
        work["convolution GFLOP/s"] = (partial(layers[1], picture), 2 * 2 * 64**2 * 320 * 320 * 9)
    return {name: amount / _shortest(run, device) / 1e9 for name, (run, amount) in work.items()}


def _shortest(run: Callable[[], Any], device: torch.device, tries: int = 9) -> float:
    taken: list[float] = []
    with torch.no_grad(), heap.kept():
        for _ in range(tries + 1):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begin)
    return min(taken[1:])
