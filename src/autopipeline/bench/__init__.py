"""`autopipeline bench`: how long things take here, beside diffusers, and how much of what the machine can do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def bench(
    model: str,
    *,
    random: bool = False,
    dtype: str = "float32",
    stored: str = "float16",
    device: str = "cpu",
    size: int | None = None,
    steps: tuple[int, int] = (2, 4),
    runs: int = 3,
    batches: tuple[int, ...] = (),
    parts: tuple[str, ...] = ("import", "load", "run"),
    alone: bool = False,
) -> dict[str, Any]:
    """Measure a model, and give what was found.

    Args:
        model: a folder, or a shipped model. With `random`, a folder that has the configs and tokenizers of a checkpoint
            without its weights: they are drawn, and stored in the precision `stored` in a temporary folder.
        dtype: the precision to compute in.
        device: such as "cpu" or "cuda".
        size: side of the pictures in pixels; None is the model's own.
        steps: a short and a long run, of two steps at least: schedulers that look back begin otherwise.
        runs: how often each is measured, after once that is not counted.
        batches: sizes of batches to measure the throughput at.
        parts: what to measure.
        alone: without diffusers, even where it is installed.
    """
    import torch

    from autopipeline.bench import layout, roofline
    from autopipeline.bench import runs as measured
    from autopipeline.selection import locate

    libraries = [measured.OURS] + ([measured.PEER] if measured.there(measured.PEER) and not alone else [])
    kind, call = getattr(torch, dtype), {} if size is None else {"height": size, "width": size}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) if random else Path(locate(model))
        if random:
            layout.fill(Path(model), folder, getattr(torch, stored))
        best = roofline.measured(kind, torch.device(device))
        found: dict[str, Any] = {
            "machine": roofline.line(),
            "model": Path(model).name + (" with random weights" if random else ""),
            "dtype": dtype,
            "roofline": best,
            "figures": {},
            "shares": {},
            "difference": None,
        }
        if "import" in parts:
            found["figures"] |= measured.imports(libraries, runs)
        if "load" in parts:
            found["figures"] |= measured.loads(
                libraries, folder, list(dict.fromkeys([stored, dtype, "bfloat16"])), runs
            )
        if "run" in parts:
            pipes = measured.pipes(libraries, folder, kind, device)
            found["figures"] |= measured.parts(pipes, steps, runs, call)
            found["figures"] |= measured.throughput(pipes, list(batches), steps[0], runs, call)
            found["difference"] = measured.difference(pipes, steps[0], call)
            most = max(best["matrix GFLOP/s"], best["convolution GFLOP/s"])
            for name, amount in measured.operations(pipes[measured.OURS], steps, call).items():
                found["shares"][name] = amount / found["figures"][name][measured.OURS] / most
    return found
