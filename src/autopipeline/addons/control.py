"""Control networks (Black Forest Labs 2024, "tools"): a picture's latents stand beside x, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipeline.stage import BoundTask, Cond, Family, Pred, Run, Stage, Task

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver

Components = Mapping[str, Any]
NAME = "control_image"


class Beside:
    """A task with further conditioning, which is made (and its random numbers drawn) before the task begins."""

    def __init__(self, task: BoundTask, make: Callable[[], Cond], shown: Mapping[str, str]) -> None:
        self.task, self.make = task, make
        self.shown = shown  # entries that callbacks may see: own name -> theirs
        self.rows: Cond = {}

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """The rows, then what the task begins with."""
        self.rows = self.make()
        return self.task.begin(solver, grid)

    def condition(self) -> Cond:
        """That of the task, and the rows."""
        return self.task.condition() | self.rows

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """As the task."""
        return self.task.keep(x, solver, i, last)

    def end(self, x: Tensor) -> Tensor:
        """As the task."""
        return self.task.end(x)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the task, and the rows that are shown."""
        return self.task.tensors() | {name: self.rows[own] for own, name in self.shown.items()}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a callback gave back."""
        self.task.replace(tensors)
        self.rows |= {own: tensors[name] for own, name in self.shown.items() if name in tensors}


def attach(family: Family, drawn: bool = True) -> Family:
    """The family with a `control_image`, whose latents (`drawn`, or the likeliest) the network takes beside x."""

    def beside(task: Task) -> Task:
        def bound(stage: Stage, run: Run) -> BoundTask:
            return Beside(task(stage, run), lambda: {NAME: latents(stage, run, run[NAME], drawn)}, {})

        return bound

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, replace(last, predict=_predict(last)))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        if args.get(NAME) is None:
            raise ValueError(f"This network needs {NAME}, a picture such as edges or depths.")

    tasks = {name: replace(row, task=beside(row.task)) for name, row in family.tasks.items()}
    return replace(family, tasks=tasks, stages=stages, check=check)


def _predict(stage: Stage) -> Callable[[Tensor, Tensor, Cond], Pred]:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        rest = {name: rows for name, rows in cond.items() if name != NAME}
        return stage.predict(torch.cat([x, cond[NAME].to(x)], -1 if x.ndim == 3 else 1), t, rest)

    return predict


def pixels(stage: Stage, run: Run, image: Any) -> Tensor:
    """Pictures (B, 3, H, W), one row for each picture to be made; a tensor is taken as it is, in whatever range."""
    x = image if isinstance(image, Tensor) else stage.space.pixels(run, image)
    if len(x) not in (1, run.prompts):
        raise ValueError(f"There are {len(x)} control pictures for {run.prompts} prompts; give one, or one for each.")
    return x.repeat_interleave(run.batch // len(x), 0).to(stage.device)


def latents(stage: Stage, run: Run, image: Any, drawn: bool = True) -> Tensor:
    """Latents of the pictures, each with a posterior of its own, in the layout of x; latents are left alone."""
    x = pixels(stage, run, image)
    made = (
        stage.space.encode(x, run.random if drawn else None) if x.ndim == 4 and x.shape[1] == 3 else stage.space.pack(x)
    )
    shape = stage.space.shape(run, run["height"], run["width"])
    if tuple(made.shape) != tuple(shape):
        raise ValueError(f"{NAME} has latents of {tuple(made.shape[1:])}; this call needs {tuple(shape[1:])}.")
    return made.to(stage.dtype)


def sized(args: dict[str, Any], pictures: Iterable[Any]) -> dict[str, Any]:
    """The arguments with the size of control pictures that are tensors, as these are taken as they are."""
    read = dict(args)
    for picture in pictures:
        if isinstance(picture, Tensor) and picture.ndim == 4 and picture.shape[1] == 3:
            for side, length in zip(("height", "width"), picture.shape[-2:], strict=True):
                if read[side] not in (None, length):
                    why = f"A tensor as {NAME} is taken as it is"
                    raise ValueError(f"{why}: {side}={read[side]} is not {length}.")
                read[side] = length
    return read
