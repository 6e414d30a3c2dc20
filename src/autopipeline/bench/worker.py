"""A process that has one library's pipeline and makes pictures when told to, so that they stay apart.

`python -m autopipeline.bench.worker LIBRARY FOLDER DTYPE DEVICE`; each line of the input is a call as JSON, each line
of the output what came of it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from autopipeline.speed import prepare

PROMPT = "a large red circle left of a small blue square on a yellow background"
OURS, PEER, OPENVINO = "autopipeline", "diffusers", "autopipeline with OpenVINO"
COMPILED = "autopipeline compiled", "diffusers compiled"


def loaded(library: str, folder: Path, dtype: str, device: str) -> Any:
    """A pipeline of that library; "default" is what each takes for itself, ours on the command line."""
    peer = library in (PEER, COMPILED[1])
    if peer:
        for chatty in (PEER, "transformers"):
            said = importlib.import_module(f"{chatty}.utils.logging")
            said.set_verbosity_error()
            said.disable_progress_bar()
    options: dict[str, Any] = {}
    if dtype != "default":
        options["torch_dtype"] = getattr(torch, dtype)
    elif not peer:
        options["dtype"] = "auto"
    if "safety_checker" in json.loads((folder / "model_index.json").read_text("utf-8")):
        options["safety_checker"] = None  # it may blacken random pictures
    module = importlib.import_module(PEER if peer else OURS)
    pipe = module.AutoPipelineForText2Image.from_pretrained(folder, **options).to(device)
    if type(pipe.scheduler).__name__ == "PNDMScheduler":  # which asks once more than there are steps
        pipe.scheduler = module.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if library == OPENVINO:
        pipe.compile(engine="openvino")
    elif library in COMPILED:
        graphs = {"mode": "reduce-overhead"} if torch.device(device).type == "cuda" else {}
        if peer:
            names = [name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None]
            for part in (*(getattr(pipe, name) for name in names), pipe.vae.decoder):
                part.compile(**graphs)
        else:
            pipe.compile(**graphs)
    return pipe


def called(pipe: Any, order: Mapping[str, Any]) -> Any:
    """What the pipeline gives for an order: `steps`, `batch`, `output` and further arguments as `call`."""
    batch = order.get("batch", 1)
    drawn = [torch.Generator().manual_seed(k) for k in range(batch)]
    made = pipe(
        [PROMPT] * batch,
        num_inference_steps=order["steps"],
        generator=drawn,
        output_type=order["output"],
        **order.get("call", {}),
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made.images


def operations(pipe: Any, order: Mapping[str, Any]) -> float:
    """GFLOP of an order, as torch counts them, by the plain networks."""
    before = os.environ.get(prepare.OFF)
    prepare.restore(pipe.components.values())
    os.environ[prepare.OFF] = "1"
    try:
        with FlopCounterMode(display=False) as counter:
            called(pipe, order)
        return counter.get_total_flops() / 1e9
    finally:
        os.environ.pop(prepare.OFF)
        if before is not None:
            os.environ[prepare.OFF] = before


def answer(pipe: Any, order: Mapping[str, Any]) -> float:
    """Seconds that an order takes, or its operations; the picture goes to the file `keep`, if any."""
    if order.get("count"):
        return operations(pipe, order)
    begin = time.perf_counter()
    made = called(pipe, order)
    taken = time.perf_counter() - begin
    if order.get("keep"):
        torch.save(torch.as_tensor(made).float(), order["keep"])
    return taken


def main(library: str, folder: str, dtype: str, device: str) -> None:
    """Answer until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    pipe = loaded(library, Path(folder), dtype, device)
    for line in sys.stdin:
        print(json.dumps(answer(pipe, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
