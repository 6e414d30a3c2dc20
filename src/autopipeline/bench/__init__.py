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
    stored: str | None = None,
    depth: int | None = None,
    device: str = "cpu",
    size: int | None = None,
    steps: tuple[int, int] = (2, 4),
    runs: int = 3,
    batches: tuple[int, ...] = (),
    parts: tuple[str, ...] = ("import", "load", "run"),
    without: tuple[str, ...] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure a model, and give what was found.

    Args:
        model: a folder, or a shipped model. With `random`, a folder that has the configs and tokenizers of a checkpoint
            without its weights: they are drawn, and stored in a temporary folder.
        dtype: the precision to compute in; "default" is what our command line takes here, and what diffusers takes.
        stored: with `random`, the precision to store in; None is float16.
        depth: with `random`, so many blocks of each kind in transformers, so that a step shows what a block costs.
        device: such as "cpu" or "cuda".
        size: side of the pictures in pixels; None is the model's own.
        steps: a short and a long run, of two steps at least: schedulers that look back begin otherwise.
        runs: how often each is measured, after once that is not counted.
        batches: sizes of batches to measure the throughput at.
        parts: what to measure.
        without: which of "diffusers" and "openvino" stay out, even where they are installed.
        compiled: with each library compiled by torch.compile as well; the first, uncounted turn takes minutes.
    """
    import torch

    from autopipeline.bench import layout, roofline, worker
    from autopipeline.bench import runs as measured
    from autopipeline.selection import locate
    from autopipeline.speed import precision

    others = [name for name in ("diffusers", "openvino") if name not in without and measured.there(name)]
    libraries = [worker.OURS, *(name for name in others if name == worker.PEER)]
    call = {} if size is None else {"height": size, "width": size}
    kind = getattr(torch, dtype, torch.bfloat16 if precision.halves_pay() else torch.float32)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) if random else Path(locate(model))
        if random:
            layout.fill(Path(model), folder, getattr(torch, stored or "float16"), depth)
        best = roofline.measured(kind, torch.device(device))
        found: dict[str, Any] = {
            "machine": roofline.line(),
            "model": Path(model).name + " with random weights" * random + f", {depth} blocks of a kind" * bool(depth),
            "dtype": dtype,
            "roofline": best,
            "figures": {},
            "shares": {},
            "difference": {},
        }
        if "import" in parts:
            found["figures"] |= measured.imports(libraries, runs)
        if "load" in parts:
            most = precision.stored(path for path in folder.iterdir() if path.is_dir()).most_common(1)
            own = [str(kind).removeprefix("torch.") for kind, _ in most]
            wanted = dict.fromkeys([*own, "float32" if dtype == "default" else dtype, "bfloat16"])
            found["figures"] |= measured.loads(libraries, folder, list(wanted), runs)
        if "run" in parts:
            engines = [worker.OPENVINO] if device == "cpu" and "openvino" in others else []
            if compiled:
                engines += [name for name in worker.COMPILED if name.split()[0] in libraries]
            with measured.workers(libraries + engines, folder, dtype, device) as made:
                found["figures"] |= measured.parts(made, steps, runs, call)
                found["figures"] |= measured.throughput(made, list(batches), steps[0], runs, call)
                found["difference"] = measured.difference(made, steps[0], call)
                peak = max(best["matrix GFLOP/s"], best["convolution GFLOP/s"])
                for name, amount in measured.operations(made[worker.OURS], steps, call).items():
                    found["shares"][name] = amount / found["figures"][name][worker.OURS] / peak
    return found
