"""Solvers by the logarithm of signal over noise that remember what the network said; x keeps unit variance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor

from autopipeline.noise import Noise
from autopipeline.quadrature import integrals
from autopipeline.schedulers.grids import alphas_cumprod
from autopipeline.schedulers.scheduler import Grid, Pair, Scheduler, Solver
from autopipeline.schedulers.solvers.exploding import Exploding


class Multistep(Solver):
    """On sigmas; x keeps unit variance. Remembers what the network said at the last levels."""

    def level(self, i: int) -> Pair:
        """Variance-preserving, or a flow."""
        sigma = self.sigma(i)
        if self.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1).sqrt()
        return alpha, sigma * alpha

    def log_ratio(self, i: int) -> Tensor:
        """Lambda: the logarithm of signal over noise."""
        alpha, sigma = self.level(i)
        return alpha.log() - sigma.log()

    def converted(self, x: Tensor, pred: Tensor, i: int, as_clean: bool) -> Pair:
        """What is remembered (the clean sample or the noise), and the clean sample."""
        if str(self.config.get("variance_type")).startswith("learned"):
            pred = pred[:, : x.shape[1]]  # the other half of the channels is the variance, which these solvers ignore
        (alpha, sigma), x0 = self.level(i), self.denoised(x, pred, i)
        if as_clean:
            return x0, x0
        given = self.config.prediction_type == "epsilon" and not self.config.thresholding
        return (pred if given else (x - alpha * x0) / sigma), x0

    def slopes(self, i: int, others: Iterable[int], said: Sequence[Tensor], h: Tensor) -> tuple[list[Tensor], ...]:
        """Where other indices lie from index i in steps of h, and from what was said at i, the slopes to them."""
        ratios = [(self.log_ratio(k) - self.log_ratio(i)) / h for k in others]
        return ratios, [(other - said[0]) / ratio for other, ratio in zip(said[1:], ratios, strict=True)]


class DPMSolver(Multistep):
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), as ODE or SDE, orders 1 to 3."""

    bend = -0.5  # of the third order of the SDE, as in the reference implementation; that of the ODE is 1/2

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One step of the order that the history and the end of the grid allow."""
        kind: str = self.config.algorithm_type
        said, x0 = self.converted(x, pred, i, kind.endswith("++"))
        self.said = [*self.said, said][-self.config.solver_order :]
        drawn = self.drawn(i, noise) if kind.startswith("sde") else None
        return self._update(x, i, min(self._order(i), len(self.said)), drawn), x0

    def drawn(self, i: int, noise: Noise) -> Tensor:
        """The noise of the step from grid index i."""
        return noise()

    def _order(self, i: int) -> int:
        """Lower orders at the end of short grids, which are unstable otherwise."""
        config, left = self.config, len(self.grid.timesteps) - 1 - i
        short = config.get("lower_order_final") and len(self.grid.timesteps) < 15
        if left == 0 and (config.get("euler_at_final") or short or self.level(i + 1)[1] == 0):
            return 1
        return min(config.solver_order, 2) if left == 1 and short else config.solver_order

    def _update(self, x: Tensor, i: int, order: int, noise: Tensor | None) -> Tensor:
        return self._expanded(x, i, i + 1, range(i - 1, i - order, -1), self.said[::-1][:order], noise)

    def _expanded(
        self, x: Tensor, start: int, end: int, others: Iterable[int], said: Sequence[Tensor], noise: Tensor | None
    ) -> Tensor:
        """From one index to another, with a Taylor expansion at the first by what was said there and at others."""
        h = self.log_ratio(end) - self.log_ratio(start)
        if h == 0:
            return x
        carry, first, second, third, spread = self._weights(start, end, len(said))
        derivatives = self._derivatives(*self.slopes(start, others, said, h))
        new = carry * x + first * said[0]
        for weight, derivative in zip((second, third), derivatives, strict=False):
            new = new + weight * derivative
        return new if noise is None else new + spread * noise

    def _derivatives(self, ratios: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
        """The first, and in the third order half of the second, of the parabola."""
        if len(slopes) < 2:
            return slopes
        change = (slopes[1] - slopes[0]) / (ratios[1] - ratios[0])
        return [slopes[0] - ratios[0] * change, change]

    def _weights(self, start: int, end: int, order: int) -> tuple[Tensor, ...]:
        """Of x, of the prediction, of its first and second difference, and of the noise."""
        (alpha_s, sigma_s), (alpha, sigma) = self.level(start), self.level(end)
        h = self.log_ratio(end) - self.log_ratio(start)
        kind: str = self.config.algorithm_type
        doubled, as_clean = kind.startswith("sde"), kind.endswith("++")
        double = 2.0 if doubled else 1.0
        if as_clean:
            carry, size, hh = sigma / sigma_s * (torch.exp(-h) if doubled else 1), alpha, -double * h
        else:
            carry, size, hh = alpha / alpha_s, double * sigma, h
        base = torch.expm1(hh)
        first = -size * base
        second = first / 2 if order == 2 and self.config.solver_type == "midpoint" else -size * (base / hh - 1)
        third = -size * ((base - hh) / hh**2 - (self.bend if doubled else 0.5))
        return carry, first, second, third, sigma * torch.sqrt(torch.expm1(-2 * h if as_clean else 2 * h).abs())


class DPMPP3MSDE(Exploding, DPMSolver):
    """DPM-Solver++ as an SDE of three steps (Lu et al. 2022b, section 5; k-diffusion), exponential in the logarithm.

    The curvature has half of the weight that a parabola would give it, as in k-diffusion. Option: `s_noise`.
    """

    fixed = Solver.fixed | dict(algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun")
    bend = 0.5
    options = ("s_noise",)
    s_noise = 1.0

    def drawn(self, i: int, noise: Noise) -> Tensor:
        """Scaled; none on the way to 0."""
        return self.s_noise * noise() if self.sigma(i + 1) > 0 else torch.tensor(0.0)


class Singlestep(DPMSolver):
    """DPM-Solver in blocks of steps of orders 1, 2, 3: each goes back to the x that its block began with."""

    def _order(self, i: int) -> int:
        """Counting up in each block; the last step alone where it would otherwise end a block."""
        config, steps = self.config, len(self.grid.timesteps)
        ends_low = config.lower_order_final and steps % config.solver_order == 0
        if i == steps - 1 and (ends_low or config.final_sigmas_type == "zero"):
            return 1
        return i % config.solver_order + 1

    def _update(self, x: Tensor, i: int, order: int, noise: Tensor | None) -> Tensor:
        self.begun = x if order == 1 else self.begun
        start = i - order + 1
        return self._expanded(self.begun, start, i + 1, range(start + 1, i + 1), self.said[-order:], noise)

    def _derivatives(self, ratios: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
        """With the whole second derivative; the kind called midpoint leaves it out."""
        if len(slopes) == 2 and self.config.solver_type == "midpoint":
            return slopes[1:]
        made = super()._derivatives(ratios, slopes)
        return [*made[:1], *[2 * change for change in made[1:]]]


class UniPC(Multistep):
    """Zhao et al. 2023: a predictor, and a corrector that reuses the next evaluation."""

    before: Tensor | None = None  # x that the last step began with
    order = 1  # of the last step

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.predictor = self._other(self.config.solver_p) if self.config.solver_p else None

    def _other(self, scheduler: Scheduler) -> Solver:
        """The predictor of another scheduler, on the same times."""
        own, grid = self.grid, scheduler.grid(self.grid.steps, device=self.grid.timesteps.device)
        if len(grid.timesteps) != len(own.timesteps) or not torch.equal(grid.timesteps, own.timesteps):
            raise ValueError(
                f"solver_p={type(scheduler).__name__} has other timesteps than the scheduler it is to serve."
            )
        return scheduler.solver(grid.window(own.begin, own.end))

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Correct the last step with what the network says now, then predict the next."""
        config = self.config
        said, x0 = self.converted(x, pred, i, config.predict_x0)
        if self.before is not None and i - 1 not in config.disable_corrector:
            x = self._update(self.before, i - 1, self.order, said)
        self.said = [*self.said, said][-config.solver_order :]
        left = len(self.grid.timesteps) - i if config.lower_order_final else config.solver_order
        self.order, self.before = min(config.solver_order, left, len(self.said)), x
        if self.predictor is not None:
            return self.predictor.advance(x, pred, i, noise, variance)[0], x0
        return self._update(x, i, self.order, None), x0

    def _update(self, x: Tensor, i: int, order: int, said: Tensor | None) -> Tensor:
        """From index i to i + 1; with what the network says there, the corrector."""
        h = self.log_ratio(i + 1) - self.log_ratio(i)
        if h == 0:
            return x
        m0, *_ = entries = self.said[::-1][:order]
        ratios, slopes = self.slopes(i, range(i - 1, i - order, -1), entries, h)
        hh = -h if self.config.predict_x0 else h
        base = torch.expm1(hh)
        scale = hh if self.config.solver_type == "bh1" else base
        weights = self._weights(ratios, hh, base, scale, order, said is not None)
        if said is not None:
            slopes.append(said - m0)
        (alpha_s, sigma_s), (alpha, sigma) = self.level(i), self.level(i + 1)
        carry, size = (sigma / sigma_s, alpha) if self.config.predict_x0 else (alpha / alpha_s, sigma)
        new = carry * x - size * base * m0
        for weight, slope in zip(weights, slopes, strict=True):
            new = new - size * scale * weight * slope
        return new

    @staticmethod
    def _weights(ratios: list[Tensor], hh: Tensor, base: Tensor, scale: Tensor, order: int, corrects: bool) -> Any:
        """Solve the order conditions (eq. 8 and 11)."""
        unknowns = order if corrects else order - 1
        if unknowns == 0:
            return []
        if unknowns == 1:
            return [torch.tensor(0.5)]
        phi, factorial, right = base / hh - 1, 1, []
        for k in range(1, unknowns + 1):
            right.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        points = torch.stack([*ratios, torch.ones(())][:unknowns])
        powers = torch.stack([points**k for k in range(unknowns)])
        return torch.linalg.solve(powers, torch.stack(right))


def log_ratios(solver: Multistep, newest: int, count: int) -> list[float]:
    """Lambda of a grid index and of those before it, in double precision: weights are differences of large numbers."""
    sigmas = [float(solver.grid.levels[newest - k]) for k in range(count)]
    return [log((1 - sigma if solver.config.use_flow_sigmas else 1) / sigma) for sigma in sigmas]


def adams(
    solver: Multistep, x: Tensor, i: int, newest: int, said: Sequence[Tensor], tau: float = 0.0, as_clean: bool = False
) -> Pair:
    """From index i to i + 1 with what was said (the latest first) at `newest` and before; and the deviation of noise.

    `tau` is how much noise there is on the way; `as_clean`: the clean sample was said, not the noise.
    """
    end, start = log_ratios(solver, i + 1, 2)
    (alpha_s, sigma_s), (alpha, sigma) = solver.level(i), solver.level(i + 1)
    h, nodes, rate = torch.tensor(end - start), log_ratios(solver, newest, len(said)), 1 + tau**2
    if as_clean:
        weights = _second(integrals(nodes, start, end, rate), nodes, start, end, rate)
        carry, size = torch.exp(-(tau**2) * h) * sigma / sigma_s, rate * alpha
        spread = sigma * torch.sqrt(-torch.expm1(-2 * tau**2 * h))
    else:
        weights = integrals(nodes, start, end, -1.0)
        carry, size = alpha / alpha_s, -rate * sigma
        spread = tau * sigma * torch.sqrt(torch.expm1(2 * h))
    new = carry * x
    for weight, entry in zip(weights, said, strict=True):
        new = new + size * weight * entry
    return new, spread


def _second(weights: list[float], nodes: list[float], start: float, end: float, rate: float) -> list[float]:
    """In the second order, the authors' implementation takes h**2 / 2 for the integral over the slope."""
    if len(nodes) != 2:
        return weights
    slope = integrals([start + 1, start], start, end, rate)[0]
    change = ((end - start) ** 2 / 2 - slope) / (nodes[0] - nodes[1])
    return [weights[0] + change, weights[1] - change]


class DEIS(DPMSolver):
    """Zhang & Chen 2023, the Adams-Bashforth kind, with the polynomial in the logarithm of sigma / alpha."""

    def _update(self, x: Tensor, i: int, order: int, noise: Tensor | None) -> Tensor:
        if order == 1:
            return super()._update(x, i, order, noise)
        return adams(self, x, i, i, self.said[::-1][:order])[0]


class SASolver(Multistep):
    """Xue et al. 2023, algorithm 1: a predictor, and a corrector that reuses the next evaluation and the noise."""

    before: Pair | None = None  # x and the noise that the last step began with
    order = 1  # of the next corrector

    def tau(self, i: int) -> float:
        """How much noise there is on the way from grid index i."""
        t, chosen = self.grid.timesteps[i], self.config.tau_func
        return float(chosen(t) if chosen else 200 <= t <= 800)

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """At the level of the timestep as the network is told it, which curves of sigmas round."""
        if self.config.use_flow_sigmas or i >= len(self.grid.timesteps):
            return super().noised(x0, noise, i)
        share = alphas_cumprod(self.config)[int(self.grid.timesteps[i])].to(x0)
        return share.sqrt() * x0 + (1 - share).sqrt() * noise

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Correct the last step with what the network says now, then predict the next."""
        config = self.config
        said, x0 = self.converted(x, pred, i, config.algorithm_type == "data_prediction")
        self.said = [*self.said, said]
        if self.before is not None:
            x = self._update(*self.before, i - 1, i, self.order)
        self.before = (x, noise())
        self.said = self.said[-max(config.predictor_order, config.corrector_order - 1) :]
        left = len(self.grid.timesteps) - i if config.lower_order_final else len(self.said)
        known = min(len(self.said), left)
        self.order = min(config.corrector_order, known + 1)
        return self._update(*self.before, i, i, min(config.predictor_order, known)), x0

    def _update(self, x: Tensor, noise: Tensor, i: int, newest: int, order: int) -> Tensor:
        """From index i to i + 1, with what was said at `newest` and before."""
        as_clean = self.config.algorithm_type == "data_prediction"
        new, spread = adams(self, x, i, newest, self.said[::-1][:order], self.tau(i), as_clean)
        return new + spread * noise
