"""The small types that everything else is made of: what one denoising problem is, and what one generation owns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from autopipeline.noise import normal

if TYPE_CHECKING:
    from autopipeline.guidance import Guidance
    from autopipeline.schedulers import Grid, Scheduler, Solver
    from autopipeline.spaces import Space

Cond = dict[str, Tensor]
"""Conditioning, keyed by the network's own argument names; rows are branch-major: all of the first, then the second."""


class Pred(NamedTuple):
    """What a network says about x; some (DeepFloyd IF, Kandinsky 2) learn the variance of the step as well."""

    mean: Tensor  # (R, C, H, W)
    variance: Tensor | None = None


Predict = Callable[[Tensor, Tensor, Cond], Pred]


class Moment(NamedTuple):
    """Where a run stands: the step that is about to be made."""

    position: int  # from 0
    total: int  # steps from the run's first one to the end of the schedule
    t: Tensor  # ()


class Ask(NamedTuple):
    """The loop's question: the network's output for x at t, once for each conditioning branch."""

    x: Tensor  # (B, C, H, W), as the network takes it
    t: Tensor  # (B,)
    cond: Cond  # rows: len(branches) * B
    branches: tuple[str, ...]
    predict: Predict
    network: torch.nn.Module  # asks with the same networks and shapes can be answered in one pass
    beside: tuple[torch.nn.Module, ...] = ()


class Step(NamedTuple):
    """The loop's report after each step; the driver may answer with tensors to go on with, by name."""

    stage: str
    index: int  # type: ignore[assignment]  # from 0; the tuple's own method is not needed
    total: int
    timestep: Tensor  # ()
    tensors: dict[str, Tensor]  # "latents", "prompt_embeds" ...: by the names that callbacks know
    x0: Tensor  # the picture that the network has in mind at this step, in the same space as the latents


Answer = Sequence[Pred] | Mapping[str, Tensor] | None
Loop = Generator[Ask | Step, Answer, Tensor]


class Random:
    """Standard-normal draws, from no generator (torch's global one), one generator, or one for each picture.

    With a list, every draw is made picture by picture, so that a picture does not depend on its neighbours.
    """

    def __init__(
        self, generator: torch.Generator | list[torch.Generator] | None, batch: int, apart: bool = False
    ) -> None:
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators were given for {batch} pictures; give one, or one for each picture."
            )
        self.generator = generator
        self.apart = apart  # no picture's numbers depend on how many others there are, whatever the family's habit

    def normal(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Noise of `shape`, drawn where the generator lives and moved to `device`; of a list, the first ones draw."""
        if isinstance(self.generator, list):
            alone, turns = (1, *shape[1:]), islice(cycle(self.generator), shape[0])  # pictures may have several rows
            return torch.cat([normal(alone, one, dtype=dtype, device=device) for one in turns])
        return normal(shape, self.generator, dtype=dtype, device=device)

    def like(self, x: Tensor) -> Tensor:
        """Noise with the shape, dtype and device of x."""
        return self.normal(x.shape, dtype=x.dtype, device=x.device)


@dataclass(slots=True)
class Run:
    """Everything that one generation owns: its arguments, its random numbers, whether it was cancelled."""

    args: Mapping[str, Any]
    settings: Mapping[str, Any]  # of the pipeline, such as `force_zeros_for_empty_prompt`
    prompts: int
    batch: int  # pictures: prompts * num_images_per_prompt
    random: Random
    guidance_scale: float = 1.0  # a callback may change it while the run goes on
    interrupted: bool = False  # stop denoising, decode what there is
    now: Moment = field(default_factory=lambda: Moment(0, 1, torch.zeros(())))  # kept by the loop
    cancel: threading.Event = field(default_factory=threading.Event)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where the task has no such parameter."""
        return self.args.get(name, default)


def _nothing(run: Run, x: Tensor) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One denoising problem, made for one run from the pipeline's components."""

    name: str  # the component that denoises, such as "unet"
    network: torch.nn.Module
    space: Space
    scheduler: Scheduler
    dtype: torch.dtype  # of x
    schedule: Callable[[Run], Grid]
    condition: Callable[[Run, Tensor], Cond]  # rows for all branches; x tells the size
    guide: Callable[[Run], Guidance]
    predict: Predict
    emit: Callable[[Tensor, Tensor], Tensor] = lambda x, x0: x  # what leaves the stage
    public: Mapping[str, str] = field(default_factory=dict[str, str])  # callbacks' names of conditioning entries
    prompt_alone: bool = False  # callbacks see those entries' rows of the prompt, not of all branches
    vary: Callable[[Run, tuple[str, ...]], Cond] = lambda run, branches: {}  # entries of one step, for these branches
    beside: tuple[torch.nn.Module, ...] = ()  # networks that `predict` asks as well
    enter: Callable[[Run, Tensor], None] = _nothing  # gives the run this stage's arguments, and what the last one left

    @property
    def device(self) -> torch.device:
        """Where x lives: with the network."""
        return next(self.network.parameters()).device


class BoundTask(Protocol):
    """A task at work in one run."""

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """The first x."""
        ...

    def condition(self) -> Cond:
        """Entries that the task adds to the conditioning; one row a picture."""
        ...

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """What is kept of x after the step to grid index i."""
        ...

    def end(self, x: Tensor) -> Tensor:
        """What leaves the last step, after callbacks have seen it."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What callbacks may see and replace, by name; replaced ones come back through `replace`."""
        ...

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a callback gave back."""
        ...


Task = Callable[[Stage, Run], BoundTask]


def as_it_is(part: Any) -> Any:
    """The component itself."""
    return part


class Slot(NamedTuple):
    """A component that a family expects: the classes it may have, by the names in model_index.json."""

    classes: tuple[str, ...]
    optional: bool = False
    take: Callable[[Any], Any] = as_it_is  # what the caller gives -> the component


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """A task of a family: what does it, and its call parameters with their defaults."""

    task: Task
    params: Mapping[str, Any]
    tensors: tuple[str, ...] = ("latents",)  # what a callback may ask for
    unsaved: tuple[str, ...] = ()  # settings that this task's class writes only where they are not at their default
    pasted: bool = True  # what `padding_mask_crop` cut out goes back into the picture
    trigger: str | None = None  # the input that asks for this task, where it is not the usual one
    needs: tuple[str, ...] | None = None  # the inputs that it can't do without, where they are not the usual ones
    whole: tuple[str, ...] = ()  # inputs whose lists belong to every prompt, not one item to each


def _no_variants() -> Mapping[frozenset[str], Mapping[str, TaskRow]]:
    return {}


def _no_addons() -> Mapping[str, Callable[[Family], Family]]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A name row, its components, its tasks, and how components become stages."""

    key: str
    stem: str
    slots: Mapping[str, Slot]
    settings: Mapping[str, Any]
    tasks: Mapping[str, TaskRow]
    stages: Callable[[Mapping[str, Any], Run], tuple[Stage, ...]]
    finish: Callable[[Mapping[str, Any], Run, Tensor], Finished | Mapping[str, Any]]  # pictures, or what else by name
    # From here on, settings stand among the components.
    size: Callable[[Mapping[str, Any]], tuple[int, int]]  # default height and width in pixels
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda components, args: None
    adopt: Callable[[dict[str, Any]], dict[str, Any]] = lambda components: components  # mends old checkpoints
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = lambda components, args: args  # of a call
    variants: Mapping[frozenset[str], Mapping[str, TaskRow]] = field(default_factory=_no_variants)  # tasks by add-ons
    addons: Mapping[str, Callable[[Family], Family]] = field(default_factory=_no_addons)  # attached in its own way
    embeds_rank: int = 3  # dimensions of `prompt_embeds`
    linked: str | None = None  # "prior": components "prior_*" may stand in a checkpoint that this one's card names


class Finished(NamedTuple):
    """Pictures in -1..1, and for each whether a safety checker objected (None: nobody looked)."""

    pictures: Tensor  # (B, 3, H, W)
    flagged: list[bool] | None = None
    raw: bool = False  # as tensors ("pt") they are given as they are, not in 0..1
    marked: list[bool] | None = None  # whether a checker found the mark of others
    each: int | None = None  # pictures of every result, which is then a list of them
