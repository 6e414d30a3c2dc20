"""The loop, which asks, and the drivers, which answer. Nothing here knows a family, a task or a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopipeline.errors import Cancelled, NotFiniteError
from autopipeline.reuse import Reuse
from autopipeline.stage import Ask, BoundTask, Cond, Loop, Moment, Pred, Run, Stage, Step, Task

OnStep = Callable[[Step], Mapping[str, Tensor] | None]


def denoise(stage: Stage, bind: Task, run: Run) -> Loop:
    """Denoise one stage; yields questions and reports, returns what leaves the stage."""
    grid = stage.schedule(run)
    solver = stage.scheduler.solver(grid, eta=run.get("eta", 0.0))
    task = bind(stage, run)
    x = x0 = task.begin(solver, grid)
    run.now = Moment(0, len(grid.timesteps) - grid.begin, grid.timesteps[grid.begin])
    cond = stage.condition(run, x)
    known = stage.guide(run).branches[: _blocks(cond, len(x))]  # the branches that there are rows for
    indices, reuse = grid.indices, Reuse(run.get("reuse"))
    for position, i in enumerate(indices):
        if run.interrupted:
            break
        t = grid.timesteps[i]
        run.now = Moment(position, len(grid.timesteps) - grid.begin, t)
        guide = stage.guide(run)
        if set(guide.branches) < set(known):  # a callback has ended the guidance
            cond, known = _for_branches(cond, known, guide.branches, len(x)), guide.branches
        scaled = solver.scale(x, i)
        full = _for_branches(cond, known, guide.branches, len(x)) | _extra(stage, task, run, guide.branches)
        answer = reuse.answer(scaled, t, full, position == len(indices) - 1)
        if answer is None:
            answer = yield Ask(
                scaled, t.expand(len(x)), full, guide.branches, stage.predict, stage.network, stage.beside
            )
            reuse.note(scaled, t, full, answer)  # type: ignore[arg-type]
        pred = guide.combine(answer)  # type: ignore[arg-type]
        step = solver.step(x, pred.mean, i, partial(run.random.like, solver.room(x, i)), **_variance(pred))
        x, x0 = task.keep(step.x, solver, i + 1, position == len(indices) - 1), step.x0
        if not torch.isfinite(x).all():
            raise NotFiniteError(f"The {stage.name} gave NaN or infinity at step {position + 1} of {len(indices)}.")
        seen = {"latents": x, "denoised": x0} | _public(stage, cond, guide.branches, len(x)) | task.tensors()
        changes = yield Step(stage.name, position, len(indices), t, seen, x0)
        if changes:
            x, x0 = changes.get("latents", x), changes.get("denoised", x0)  # type: ignore[union-attr]
            cond = cond | _changed(stage, cond, changes, len(x))  # type: ignore[arg-type]
            task.replace(changes)  # type: ignore[arg-type]
    return stage.emit(task.end(x), x0)


def _blocks(cond: Cond, batch: int) -> int:
    """How many branches the conditioning has rows for."""
    return max((len(entry) for entry in cond.values()), default=0) // batch


def _for_branches(cond: Cond, known: tuple[str, ...], branches: tuple[str, ...], batch: int) -> Cond:
    """The rows of these branches; one that comes and goes without rows of its own takes those of the prompt."""

    def rows(entry: Tensor) -> Tensor:
        held = known[len(known) - len(entry) // batch :]  # a callback that ends the guidance gives fewer rows
        if held == branches:
            return entry
        if "negative" in branches and "negative" not in held:
            raise ValueError(
                "A run that began without guidance can't go on with it; begin with guidance_scale above 1."
            )
        parts = dict(zip(held, entry.split(batch), strict=True))
        return torch.cat([parts[branch if branch in parts else "positive"] for branch in branches])

    return {name: rows(entry) for name, entry in cond.items()}


def _extra(stage: Stage, task: BoundTask, run: Run, branches: tuple[str, ...]) -> Cond:
    """What the task (the same for every branch) and the step add to the conditioning."""
    times = len(branches)
    rows = {name: rows.repeat(times, *[1] * (rows.ndim - 1)) for name, rows in task.condition().items()}
    return rows | stage.vary(run, branches)


def _variance(pred: Pred) -> dict[str, Tensor]:
    return {} if pred.variance is None else {"variance": pred.variance}


def _public(stage: Stage, cond: Cond, branches: tuple[str, ...], batch: int) -> dict[str, Tensor]:
    """Conditioning by the names that callbacks know; the rows of the negative branch once more by themselves."""
    named = {name: cond[own] for own, name in stage.public.items() if own in cond}
    negative = {f"negative_{name}": rows[:batch] for name, rows in named.items() if branches[0] == "negative"}
    return negative | ({name: rows[-batch:] for name, rows in named.items()} if stage.prompt_alone else named)


def _changed(stage: Stage, cond: Cond, changes: Mapping[str, Tensor], batch: int) -> Cond:
    """The conditioning entries that a callback gave back; where it saw each branch by itself, the others stay."""
    if not stage.prompt_alone:
        return {own: changes[name] for own, name in stage.public.items() if name in changes}
    made: Cond = {}
    for own, name in ((own, name) for own, name in stage.public.items() if own in cond):
        rows = cond[own]
        if name in changes:
            rows = torch.cat([rows[:-batch], changes[name].to(rows)])
        if f"negative_{name}" in changes and len(rows) > batch:
            rows = torch.cat([changes[f"negative_{name}"].to(rows), rows[batch:]])
        made[own] = rows
    return made


@torch.no_grad()
def answer(asks: Sequence[Ask]) -> list[tuple[Pred, ...]]:
    """One forward pass for all branches of asks that fit together."""
    xs, ts, conds, sizes = [], [], [], []
    for ask in asks:
        n = len(ask.branches)
        xs.append(ask.x.repeat(n, *[1] * (ask.x.ndim - 1)))
        ts.append(ask.t.repeat(n))
        conds.append(ask.cond)
        sizes.append([len(ask.x)] * n)
    cond = {name: _cat([c[name] for c in conds]) for name in conds[0]}
    pred = asks[0].predict(_cat(xs), _cat(ts), cond)
    rows = [size for ask_sizes in sizes for size in ask_sizes]
    means = iter(pred.mean.split(rows))
    variances = iter(pred.variance.split(rows)) if pred.variance is not None else None
    return [tuple(Pred(next(means), next(variances) if variances else None) for _ in ask_sizes) for ask_sizes in sizes]


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _fits(ask: Ask) -> tuple[Any, ...]:
    """Asks with equal keys can be answered in one pass."""
    shapes = tuple((name, rows.shape[1:], rows.dtype) for name, rows in sorted(ask.cond.items()))
    networks = tuple(id(network) for network in (ask.network, *ask.beside))
    return (networks, ask.x.shape[1:], ask.x.dtype, ask.t.dtype, shapes)


def drive(loops: Sequence[tuple[Loop, Run, OnStep]]) -> list[Tensor]:
    """Walk any number of loops to their ends together; asks that fit are answered in one forward pass.

    Each loop has its own pace: runs with different numbers of steps, sizes and guidance go side by side.
    """
    replies: list[Any] = [None] * len(loops)
    results: dict[int, Tensor] = {}
    while len(results) < len(loops):
        waiting: dict[int, Ask] = {}
        for k, (loop, run, on_step) in enumerate(loops):
            if k not in results:
                waiting |= _advance(k, loop, run, on_step, replies, results)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for k, ask in waiting.items():
            groups.setdefault(_fits(ask), []).append(k)
        for members in groups.values():
            for k, reply in zip(members, answer([waiting[k] for k in members]), strict=True):
                replies[k] = reply
    return [results[k] for k in range(len(loops))]


@torch.no_grad()
def _advance(
    k: int, loop: Loop, run: Run, on_step: OnStep, replies: list[Any], results: dict[int, Tensor]
) -> dict[int, Ask]:
    """Take loop k to its next question, reporting steps on the way."""
    try:
        while True:
            if run.cancel.is_set():
                loop.close()
                raise Cancelled("The run was cancelled.")
            event = loop.send(replies[k])
            if isinstance(event, Ask):
                return {k: event}
            replies[k] = on_step(event)
    except StopIteration as done:
        results[k] = done.value
        return {}
