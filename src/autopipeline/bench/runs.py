"""The measurements: each library's turn comes after the other's, so that both meet the same machine; medians count."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from autopipeline.bench import worker
from autopipeline.errors import CheckpointError

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
looked, size = time.perf_counter() - begin, sum(each.nbytes for each in weights)
print(json.dumps([loaded, looked, (memory("VmHWM") - before) / size]))
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
    """Seconds to load in each precision, imports not counted, and until every weight was looked at; the peak of memory.

    Weights may come from their file, and be cast, when they are looked at. The peak is a share of them.
    """
    made: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        ways = {lib: _python(LOAD.format(library=lib), str(folder), dtype) for lib in libraries}
        taken = {lib: [json.loads(each) for each in lines] for lib, lines in in_turn(ways, runs).items()}
        names = f"load in {dtype}", f"load in {dtype}, each weight looked at", f"peak in {dtype}, of the weights"
        for k, name in enumerate(names):
            made[name] = {lib: statistics.median(each[k] for each in rows) for lib, rows in taken.items()}
    return made


class Worker:
    """A process with a pipeline of one library; see `bench.worker`."""

    def __init__(self, library: str, folder: Path, dtype: str, device: str) -> None:
        self.library = library
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-W", "ignore", "-m", worker.__name__, library, str(folder), dtype, device]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=os.environ | QUIET
        )

    def __call__(self, **order: Any) -> float:
        """What it answers to an order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            killed = self._process.wait() == -9
            ended = "it was killed, as happens where memory runs out; --without measures fewer at once"
            said = [ended] if killed else self._errors.read().strip().splitlines() or ["it ended"]
            raise CheckpointError(f"The process of {self.library} failed: {said[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def workers(libraries: list[str], folder: Path, dtype: str, device: str) -> Generator[dict[str, Worker]]:
    """A process for each library."""
    made: dict[str, Worker] = {}
    try:
        for library in libraries:
            made[library] = Worker(library, folder, dtype, device)
        yield made
    finally:
        for each in made.values():
            each.close()


def parts(
    made: Mapping[str, Callable[..., float]], steps: tuple[int, int], runs: int, call: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Seconds before the first step, of a step, of decoding and of a whole picture.

    A step is the difference of a longer and a shorter run; decoding that of a run with and without it.
    """
    few, many = steps
    kinds = {"short": (few, "latent"), "long": (many, "latent"), "whole": (many, "np")}
    ways = {
        f"{lib} {kind}": partial(order, steps=count, output=output, call=call)
        for lib, order in made.items()
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


def throughput(
    made: Mapping[str, Callable[..., float]], batches: list[int], steps: int, runs: int, call: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Seconds a picture, in batches of several sizes."""
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        order = dict(steps=steps, output="np", batch=batch, call=call)
        ways = {lib: partial(worker, **order) for lib, worker in made.items()}
        middle = {lib: statistics.median(each) for lib, each in in_turn(ways, runs).items()}
        found[f"picture in a batch of {batch}"] = {lib: taken / batch for lib, taken in middle.items()}
    return found


def operations(order: Callable[..., float], steps: tuple[int, int], call: Mapping[str, Any]) -> dict[str, float]:
    """GFLOP of a step and of decoding."""
    ends = ((steps[0], "latent"), (steps[1], "latent"), (steps[0], "np"))
    short, long, whole = (order(steps=count, output=output, call=call, count=True) for count, output in ends)
    return {"step": (long - short) / (steps[1] - steps[0]), "decode": whole - short}


def difference(
    made: Mapping[str, Callable[..., float]], steps: int, call: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """The largest and the root mean square difference of pictures, in 0..1, from the first library's."""
    pictures: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as work:
        for k, (lib, order) in enumerate(made.items()):
            order(steps=steps, output="np", call=call, keep=str(Path(work, f"{k}.pt")))
            pictures[lib] = torch.load(Path(work, f"{k}.pt"), weights_only=True)
    first = next(iter(pictures))
    apart = {lib: picture - pictures[first] for lib, picture in pictures.items() if lib != first}
    return {lib: (float(each.abs().max()), float(each.square().mean().sqrt())) for lib, each in apart.items()}
