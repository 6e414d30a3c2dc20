"""The measurements: each library's turn comes after the other's, so that both meet the same machine; medians count."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from autopipeline.errors import CheckpointError
from autopipeline.speed import prepare

OURS, PEER = "autopipeline", "diffusers"
PROMPT = "a large red circle left of a small blue square on a yellow background"
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
IMPORT = "import time; b = time.perf_counter(); {}; print(time.perf_counter() - b)"
LOAD = """
import json, sys, time
import torch, {library} as library
Auto, Known = library.AutoPipelineForText2Image, library.StableDiffusionPipeline  # imports are not counted
if library.__name__ == "diffusers":
    import transformers
    transformers.CLIPTextModel, transformers.CLIPTokenizer

def memory(kind):
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))
    except OSError:
        return 0

before, begin = memory("VmRSS"), time.perf_counter()
pipe = Auto.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
loaded = time.perf_counter() - begin
weights = [each for part in pipe.components.values() if isinstance(part, torch.nn.Module) for each in part.parameters()]
total = sum(float(each.flatten()[::1024].float().sum()) for each in weights)
size = sum(each.nbytes for each in weights)
print(json.dumps([loaded, (memory("VmHWM") - before) / size]))
"""


def there(library: str) -> bool:
    """Whether it is installed."""
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def in_turn(ways: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[Any]]:
    """What each gives, so many times, in turn; one more time before is not counted."""
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            given = way()
            if run:
                found[name].append(given)
    return found


def _python(code: str, *arguments: str) -> Callable[[], str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET, check=False)
        if done.returncode:
            raise CheckpointError(f"A process of the benchmark failed: {done.stderr.strip()[-500:]}")
        return done.stdout.splitlines()[-1]

    return run


def imports(libraries: list[str], runs: int) -> dict[str, dict[str, float]]:
    """Seconds until the library is there, and until AutoPipelineForText2Image is."""
    made: dict[str, dict[str, float]] = {}
    for name, code in (("import", "import {}"), ("import AutoPipeline", "from {} import AutoPipelineForText2Image")):
        taken = in_turn({lib: _python(IMPORT.format(code.format(lib))) for lib in libraries}, runs)
        made[name] = {lib: statistics.median(map(float, each)) for lib, each in taken.items()}
    return made


def loads(libraries: list[str], folder: Path, dtypes: list[str], runs: int) -> dict[str, dict[str, float]]:
    """Seconds to load in each precision, imports not counted, and the peak of memory as a share of the weights."""
    made: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        ways = {lib: _python(LOAD.format(library=lib), str(folder), dtype) for lib in libraries}
        taken = {lib: [json.loads(each) for each in lines] for lib, lines in in_turn(ways, runs).items()}
        for k, name in enumerate((f"load in {dtype}", f"peak in {dtype}, of the weights")):
            made[name] = {lib: statistics.median(each[k] for each in rows) for lib, rows in taken.items()}
    return made


def pipes(libraries: list[str], folder: Path, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A pipeline of each library."""
    made: dict[str, Any] = {}
    for lib in libraries:
        if lib == PEER:
            for chatty in (PEER, "transformers"):
                said = importlib.import_module(f"{chatty}.utils.logging")
                said.set_verbosity_error()
                said.disable_progress_bar()
        pipe = importlib.import_module(lib).AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=dtype)
        made[lib] = pipe.to(device)
        made[lib].set_progress_bar_config(disable=True)
    return made


def _call(pipe: Any, steps: int, batch: int, output: str, call: Mapping[str, Any]) -> Any:
    drawn = [torch.Generator().manual_seed(k) for k in range(batch)]
    return pipe([PROMPT] * batch, num_inference_steps=steps, generator=drawn, output_type=output, **call)


def parts(
    made: Mapping[str, Any], steps: tuple[int, int], runs: int, call: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Seconds before the first step, of a step, of decoding and of a whole picture.

    A step is the difference of a longer and a shorter run; decoding that of a run with and without it.
    """
    few, many = steps
    kinds = {"short": (few, "latent"), "long": (many, "latent"), "whole": (many, "np")}
    ways = {
        f"{lib} {kind}": partial(_timed, pipe, count, output, call)
        for lib, pipe in made.items()
        for kind, (count, output) in kinds.items()
    }
    middle = {key: statistics.median(each) for key, each in in_turn(ways, runs).items()}
    found: dict[str, dict[str, float]] = {name: {} for name in ("before the steps", "step", "decode", "whole picture")}
    for lib in made:
        short, long, whole = (middle[f"{lib} {kind}"] for kind in kinds)
        found["step"][lib] = (long - short) / (many - few)
        found["before the steps"][lib] = max(short - few * found["step"][lib], 0.0)
        found["decode"][lib] = whole - long
        found["whole picture"][lib] = whole
    return found


def _timed(pipe: Any, steps: int, output: str, call: Mapping[str, Any], batch: int = 1) -> float:
    begin = time.perf_counter()
    _call(pipe, steps, batch, output, call)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def throughput(
    made: Mapping[str, Any], batches: list[int], steps: int, runs: int, call: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Seconds a picture, in batches of several sizes."""
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        ways = {lib: partial(_timed, pipe, steps, "np", call, batch) for lib, pipe in made.items()}
        middle = {lib: statistics.median(each) for lib, each in in_turn(ways, runs).items()}
        found[f"picture in a batch of {batch}"] = {lib: taken / batch for lib, taken in middle.items()}
    return found


def operations(pipe: Any, steps: tuple[int, int], call: Mapping[str, Any]) -> dict[str, float]:
    """GFLOP of a step and of decoding, as torch counts them, by the plain networks."""
    before = os.environ.get(prepare.OFF)
    prepare.restore(pipe.components.values())
    os.environ[prepare.OFF] = "1"
    try:
        counts: list[float] = []
        for count, output in ((steps[0], "latent"), (steps[1], "latent"), (steps[0], "np")):
            with FlopCounterMode(display=False) as counter:
                _call(pipe, count, 1, output, call)
            counts.append(counter.get_total_flops() / 1e9)
    finally:
        os.environ.pop(prepare.OFF)
        if before is not None:
            os.environ[prepare.OFF] = before
    short, long, whole = counts
    return {"step": (long - short) / (steps[1] - steps[0]), "decode": whole - short}


def difference(made: Mapping[str, Any], steps: int, call: Mapping[str, Any]) -> float | None:
    """The largest difference of the two libraries' pictures, in 0..1."""
    if len(made) < 2:
        return None
    ours, theirs = (torch.as_tensor(_call(pipe, steps, 1, "np", call).images) for pipe in made.values())
    return float((ours.float() - theirs.float()).abs().max())
