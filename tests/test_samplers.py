"""Samplers that the peer lacks, against what is known in closed form: Gaussian data have an ideal denoiser.

For data of mean `MEAN` and standard deviation `STD`, the clean sample that a network should have in mind is linear in
x, the probability-flow ODE has an exact solution, and a solver's result is Gaussian, with a mean and a variance that
follow exactly from its answers to one unit of noise at a time.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from autopipeline import schedulers

MEAN, STD = 0.7, 0.5
OWN = ["DPMPP2SAncestralScheduler", "DPMPP3MSDEScheduler", "RestartScheduler"]
STOCHASTIC = dict.fromkeys(OWN, 2) | {"EulerAncestralDiscreteScheduler": 1, "KDPM2AncestralDiscreteScheduler": 2}


def made(name: str, **changes: Any) -> Any:
    karras = {} if name == "EulerAncestralDiscreteScheduler" else dict(use_karras_sigmas=True)
    return getattr(schedulers, name)(**tiny.BETAS | karras | changes)


def ideal(x: Tensor, sigma: float) -> Tensor:
    """The mean of the clean samples that may lie behind x."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def predicted(kind: str, x: Tensor, sigma: float) -> Tensor:
    """What a network of this kind of prediction says for `ideal`."""
    x0 = ideal(x, sigma)
    noise = (x - x0) / sigma
    return {"epsilon": noise, "sample": x0, "v_prediction": (noise - sigma * x0) / math.sqrt(1 + sigma**2)}[kind]


def walk(scheduler: Any, steps: int, x: Tensor, noise: Any, last: int = 0, begin: int = 0, **options: Any) -> Tensor:
    """From x down the grid, in double precision; `last` leaves out that many evaluations."""
    grid = scheduler.grid(steps).window(begin)
    solver = scheduler.solver(grid, **options)
    for i in list(grid.indices)[: len(grid.indices) - last]:
        seen = float(solver.seen(i))
        assert torch.allclose(solver.scale(x, i), x / math.sqrt(1 + seen**2))
        x = solver.advance(x, predicted(scheduler.config.prediction_type, x, seen), i, noise, None)[0]
    return x


def moments(scheduler: Any, steps: int, **options: Any) -> tuple[float, float]:
    """Mean and standard deviation of the results, from one row for each source of noise."""
    grid = scheduler.grid(steps)
    top, rows = float(grid.sigmas[0]), 2 + len(grid.timesteps)
    x = torch.full((rows,), MEAN, dtype=torch.float64)
    x[1] += math.sqrt(top**2 + STD**2)
    drawn = itertools.count(2)
    ends = walk(scheduler, steps, x, lambda: torch.eye(rows, dtype=torch.float64)[next(drawn)], **options)
    return float(ends[0]), float((ends[1:] - ends[0]).square().sum().sqrt())


def slope_of_errors(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: how the logarithm of the error falls with that of the number of steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDERS = [
    ("EulerDiscreteScheduler", {}, {}, 1),
    ("HeunDiscreteScheduler", {}, {}, 2),
    ("KDPM2DiscreteScheduler", {}, {}, 2),
    *[("LMSDiscreteScheduler", {}, dict(order=order), order) for order in (1, 2, 3, 4)],
    ("RestartScheduler", dict(restarts=[]), {}, 2),
]


@pytest.mark.parametrize(("name", "changes", "options", "order"), ORDERS, ids=str)
def test_error_falls_with_the_order_of_the_method(
    name: str, changes: dict[str, Any], options: dict[str, Any], order: int
) -> None:
    """Against the exact solution of the ODE, down to the last level above 0."""
    scheduler, errors, steps = made(name, **changes), [], [40, 80, 160]
    for count in steps:
        sigmas = scheduler.grid(count).sigmas.double()
        x = torch.tensor([MEAN + 9.0], dtype=torch.float64)
        exact = MEAN + 9.0 * math.sqrt((STD**2 + sigmas[-2] ** 2) / (STD**2 + sigmas[0] ** 2))
        errors.append(abs(float(walk(scheduler, count, x, None, last=1, **options) - exact)))
    assert slope_of_errors(steps, errors) > order - 0.3, errors


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("name", "order"), STOCHASTIC.items())
def test_mean_and_variance_of_the_data(name: str, order: int, kind: str) -> None:
    """Samplers that draw noise come to the data's distribution; the error of its width falls with their order.

    The last step takes the clean samples that lie behind the last level, which spread a little less than the data.
    """
    if kind == "sample" and name.startswith("KDPM2"):
        pytest.skip("it has no such prediction")
    errors, steps = [], [50, 100, 200]
    for count in steps:
        restarts = dict(restarts=[[count // 5, 2, 0.1, 2.0]]) if name == "RestartScheduler" else {}
        scheduler = made(name, prediction_type=kind, **restarts)
        mean, std = moments(scheduler, count)
        assert abs(mean - MEAN) < 1e-6
        least = float(scheduler.grid(count).sigmas[-2])
        errors.append(abs(std / STD * math.hypot(STD, least) / STD - 1))
    assert slope_of_errors(steps, errors) > order - 0.3, errors
    assert errors[-1] < (0.04 if order == 1 else 0.001), errors


def test_noise_of_restarts_makes_good_for_errors() -> None:
    """Xu et al. 2023, theorem 1: going back up contracts what the way down has got wrong."""
    start = MEAN + 9.0
    errors = []
    for again in ([], [[6, 1, 0.1, 2.0]], [[6, 3, 0.1, 2.0]]):
        scheduler = made("RestartScheduler", restarts=again)
        steps = 8 + sum(count * times for count, times, *_ in again)
        x = torch.tensor([start, start + 1.0], dtype=torch.float64)
        ends = walk(scheduler, steps, x, lambda: torch.zeros(2, dtype=torch.float64))
        errors.append(float(ends[1] - ends[0]))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def independent_2s(x: float, sigmas: list[float], noise: list[float]) -> float:
    """DPM-Solver++(2S) to an ancestral level, in logarithms of signal over noise."""
    for here, there, drawn in zip(sigmas, sigmas[1:], noise, strict=False):
        if there == 0:
            return ideal(x, here)
        down = there**2 / here
        lam, h = -math.log(here), math.log(here / down)
        middle = math.exp(-(lam + h / 2))
        u = middle / here * x + (1 - math.exp(-h / 2)) * ideal(x, here)
        x = down / here * x + (1 - math.exp(-h)) * ideal(u, middle) + math.sqrt(there**2 - down**2) * drawn
    return x


def independent_3m(x: float, sigmas: list[float], noise: list[float]) -> float:
    """The exponential integral of the polynomial through the last clean samples, by quadrature."""
    seen: list[tuple[float, float]] = []
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for here, there, drawn in zip(sigmas, sigmas[1:], noise, strict=False):
        x0 = ideal(x, here)
        if there == 0:
            return x0
        lam, h = -math.log(here), math.log(here / there)
        seen = [*seen, (lam, x0)][-3:]
        fits = np.polynomial.Polynomial(np.polynomial.polynomial.polyfit(*zip(*seen, strict=True), len(seen) - 1))
        curve = fits.coef[2] if len(seen) == 3 else 0.0
        at = lam + h * (nodes + 1) / 2
        # k-diffusion gives the quadratic term half of its weight
        means = fits(at) - 0.5 * curve * (at - lam) ** 2
        x = math.exp(-2 * h) * x + float((weights * 2 * np.exp(-2 * (lam + h - at)) * means).sum()) * h / 2
        x += there * math.sqrt(1 - math.exp(-2 * h)) * drawn
    return x


def independent_restart(x: float, sigmas: list[float], noise: list[float]) -> float:
    """Heun's steps between the levels of each fall, and noise at each rise; `sigmas` has the ends of all steps."""
    draws = iter(noise)
    for here, there in itertools.pairwise(sigmas):
        if there > here:
            x += math.sqrt(there**2 - here**2) * next(draws)
            continue
        slope = (x - ideal(x, here)) / here
        ahead = x + slope * (there - here)
        x = ahead if there == 0 else x + (slope + (ahead - ideal(ahead, there)) / there) / 2 * (there - here)
    return x


@pytest.mark.parametrize("name", OWN)
def test_the_same_as_an_independent_formulation(name: str) -> None:
    changes = dict(restarts=[[3, 2, 0.1, 2.0]]) if name.startswith("Restart") else {}
    scheduler = made(name, **changes)
    levels = scheduler.grid(15).sigmas.double().tolist()
    ends = [level for k, level in enumerate(levels) if k == 0 or level != levels[k - 1]]
    noise = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    draws = iter(noise)
    found = walk(scheduler, 15, torch.tensor([8.0], dtype=torch.float64), lambda: torch.tensor([next(draws)]).double())
    known = {"DPMPP2S": independent_2s, "DPMPP3M": independent_3m, "Restart": independent_restart}
    independent = next(formula for start, formula in known.items() if name.startswith(start))
    assert abs(float(found) - independent(8.0, ends, noise)) < 1e-4


def test_grid_of_restarts() -> None:
    """Their steps count among those of the run, and each fall begins where the paper says."""
    scheduler = made("RestartScheduler", restarts=[[3, 2, 0.1, 2.0]])
    grid = scheduler.grid(16)
    assert (len(grid.timesteps), len(grid.sigmas)) == (31, 32)
    rises = [(a, b) for a, b in itertools.pairwise(grid.sigmas.tolist()) if b > a]
    assert len(rises) == 2
    assert all(b == 2.0 for _, b in rises)
    assert len({a for a, _ in rises}) == 1
    plain = schedulers.HeunDiscreteScheduler(**tiny.BETAS, use_karras_sigmas=True).grid(10)
    main = torch.cat([grid.sigmas[: -len(plain.sigmas)], grid.sigmas])
    assert set(plain.sigmas.tolist()) <= set(main.tolist())


@pytest.mark.parametrize(("steps", "rises"), [(10, 0), (20, 1), (36, 2)])
def test_restarts_by_the_number_of_steps(steps: int, rises: int) -> None:
    grid = made("RestartScheduler").grid(steps)
    assert len(grid.timesteps) == 2 * steps - 1
    assert int((grid.sigmas.diff() > 0).sum()) == rises


@pytest.mark.parametrize(
    "restarts",
    [5, [5], [[3, 2, 0.1]], [[0, 2, 0.1, 2.0]], [[3, 2, 2.0, 0.1]], [[3, 2, 0.0, 2.0]], [[3.5, 2, 0.1, 2.0]]],
)
def test_impossible_restarts(restarts: list[Any]) -> None:
    with pytest.raises(ValueError, match="sigma_min"):
        made("RestartScheduler", restarts=restarts)


def test_restarts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="leaves fewer than 2"):
        made("RestartScheduler", restarts=[[3, 3, 0.1, 2.0]]).grid(10)
    with pytest.raises(ValueError, match="does not lie within"):
        made("RestartScheduler", restarts=[[3, 1, 0.1, 200.0]]).grid(10)


@pytest.mark.parametrize("name", OWN)
def test_starting_part_way_and_saving(name: str, tmp_path: Path) -> None:
    """A run from the middle is the end of the whole one; a configuration comes back from its file."""
    scheduler = made(name)
    scheduler.save_pretrained(tmp_path)
    read = getattr(schedulers, name).from_pretrained(tmp_path)
    assert dict(read.config) == dict(scheduler.config) or read.config["use_karras_sigmas"]
    grid = read.grid(24)
    begin = 5 * read.order
    noised = read.solver(grid.window(begin)).noised(torch.zeros(1), torch.ones(1), begin)
    assert float(noised) == float(grid.sigmas[begin])
    ends = walk(read, 24, noised.double(), lambda: torch.zeros(1, dtype=torch.float64), begin=begin)
    assert abs(float(ends) - MEAN) < 3 * STD


@pytest.mark.parametrize("name", OWN)
def test_from_other_configurations(name: str) -> None:
    """Shared keys come over from a checkpoint's scheduler, and go back."""
    euler = schedulers.EulerDiscreteScheduler(**tiny.BETAS, prediction_type="v_prediction")
    there = getattr(schedulers, name).from_config(euler.config)
    assert (there.config.prediction_type, there.config.beta_end) == ("v_prediction", euler.config.beta_end)
    assert schedulers.EulerDiscreteScheduler.from_config(there.config).config.beta_end == euler.config.beta_end
