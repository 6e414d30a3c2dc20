"""Time for one denoising step, ours and the peer's in turn in one process: python benchmarks/step.py --help.

The time of a step is the difference between a long and a short run, shared out over the steps between them, so that
text encoding, decoding and set-up drop out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch

import autopipeline
import measure
from autopipeline import shipped

PROMPT = "a large red circle left of a small blue square on a yellow background"


def call(pipe: Any, batch: int, steps: int) -> float:
    generators = [torch.Generator().manual_seed(k) for k in range(batch)]
    begin = time.perf_counter()
    pipe([PROMPT] * batch, num_inference_steps=steps, generator=generators, output_type="latent")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def step(pipe: Any, batch: int, few: int, many: int) -> float:
    return 1000 * (call(pipe, batch, many) - call(pipe, batch, few)) / (many - few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-128", help="a shipped model or a folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, nargs=2, default=[5, 25], metavar=("FEW", "MANY"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    import diffusers

    warnings.simplefilter("ignore")
    model = str(shipped.path(given.model)) if given.model in shipped.names() else given.model
    pipes: dict[str, Any] = {}
    for name, library in (("autopipeline", autopipeline), ("diffusers", diffusers)):
        loaded = library.DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, given.dtype))
        pipes[name] = loaded.to(given.device)
        pipes[name].set_progress_bar_config(disable=True)
    print(measure.machine(), f"{torch.get_num_threads()} threads")
    for batch in given.batch:
        taken: dict[str, list[float]] = {name: [] for name in pipes}
        for pipe in pipes.values():
            call(pipe, batch, 2)
        for _ in range(given.runs):
            for name, pipe in pipes.items():
                taken[name].append(step(pipe, batch, *given.steps))
        for name, values in taken.items():
            peer = taken["diffusers"] if name == "autopipeline" else None
            print(measure.row(f"{name}, batch {batch}", values, "ms", peer))
        ratios = [b / a for a, b in zip(taken["autopipeline"], taken["diffusers"], strict=True)]
        print(f"peer / ours, run by run: {', '.join(f'{r:.2f}' for r in ratios)}; {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
