"""Solvers on levels of noise that remember what the network said; x keeps unit variance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from autopipeline.config import Config
from autopipeline.schedulers.parameterisation import clean, limited
from autopipeline.schedulers.scheduler import Grid, Noise, Pair, Scheduler, Solver


class Multistep(Solver):
    """On sigmas; x keeps unit variance. Remembers what the network said at the last levels."""

    def level(self, i: int) -> Pair:
        """Variance-preserving, or a flow."""
        sigma = self.grid.levels[i]
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
        alpha, sigma = (v.to(x) for v in self.level(i))
        x0 = clean(self.config, x, pred, alpha, sigma)
        if self.config.get("thresholding"):
            x0 = limited(self.config, x0)
        elif not as_clean and self.config.prediction_type == "epsilon":
            return pred, x0
        return (x0 if as_clean else (x - alpha * x0) / sigma), x0


class DPMSolver(Multistep):
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), as ODE or SDE, orders 1 to 3."""

    fixed: ClassVar[dict[str, Any]] = {}  # what other classes have in their configuration
    bend = -0.5  # of the third order of the SDE, as in the reference implementation; that of the ODE is 1/2

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.config = Config(self.config | self.fixed)
        self.kind: str = self.config.algorithm_type

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One step of the order that the history and the end of the grid allow."""
        said, x0 = self.converted(x, pred, i, self.kind.endswith("++"))
        self.seen = [*self.seen[1 - self.config.solver_order :], said] if self.config.solver_order > 1 else [said]
        drawn = self.drawn(i, noise) if self.kind.startswith("sde") else None
        return self._update(x, i, min(self._order(i), len(self.seen)), drawn), x0

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
        h = self.log_ratio(i + 1) - self.log_ratio(i)
        return x if h == 0 else self._expanded(x, i, i + 1, order, self.seen[-1], self._slopes(h, i, order), noise)

    def _expanded(
        self, x: Tensor, start: int, end: int, order: int, said: Tensor, slopes: list[Tensor], noise: Tensor | None
    ) -> Tensor:
        """From one index to another, with a Taylor expansion at the first."""
        carry, first, second, third, spread = self._weights(start, end, order)
        new = carry.to(x) * x + first.to(x) * said
        for weight, slope in zip((second, third), slopes, strict=False):
            new = new + weight.to(x) * slope
        return new if noise is None else new + spread.to(x) * noise

    def _weights(self, start: int, end: int, order: int) -> tuple[Tensor, ...]:
        """Of x, of the prediction, of its first and second difference, and of the noise."""
        (alpha_s, sigma_s), (alpha, sigma) = self.level(start), self.level(end)
        h = self.log_ratio(end) - self.log_ratio(start)
        midpoint = order == 2 and self.config.solver_type == "midpoint"
        double = 2.0 if self.kind.startswith("sde") else 1.0
        if self.kind.endswith("++"):
            carry = sigma / sigma_s * (torch.exp(-h) if double == 2 else 1)
            grown = -torch.expm1(-double * h)  # 1 - exp(-h), or with 2 h
            first = alpha * grown
            second = first / 2 if midpoint else alpha * (1 - grown / (double * h))
            third = alpha * ((grown - double * h) / (double * h) ** 2 + (self.bend if double == 2 else 0.5))
            return carry, first, second, third, sigma * torch.sqrt(-torch.expm1(-2 * h))
        grown = torch.expm1(h)
        first = -double * sigma * grown
        second = first / 2 if midpoint else -double * sigma * (grown / h - 1)
        third = -sigma * ((grown - h) / h**2 - 0.5)
        return alpha / alpha_s, first, second, third, sigma * torch.sqrt(torch.expm1(2 * h))

    def _slopes(self, h: Tensor, i: int, order: int) -> list[Tensor]:
        """Divided differences of what the network said."""
        if order == 1:
            return []
        r0 = (self.log_ratio(i) - self.log_ratio(i - 1)) / h
        d0 = (self.seen[-1] - self.seen[-2]) / r0
        if order == 2:
            return [d0]
        r1 = (self.log_ratio(i - 1) - self.log_ratio(i - 2)) / h
        d1 = (self.seen[-2] - self.seen[-3]) / r1
        change = (d0 - d1) / (r0 + r1)
        return [d0 + r0 * change, change]


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
        if order == 1:
            self.begun = x
        start = i - order + 1
        h = self.log_ratio(i + 1) - self.log_ratio(start)
        if h == 0:
            return x
        said, *later = self.seen[-order:]
        ratios = [(self.log_ratio(start + k) - self.log_ratio(start)) / h for k in range(1, order)]
        slopes = [(entry - said) / r.to(x) for entry, r in zip(later, ratios, strict=True)]
        if order == 3:
            slopes = self._third(slopes, *ratios)
        return self._expanded(self.begun, start, i + 1, order, said, slopes, noise)

    def _third(self, slopes: list[Tensor], near: Tensor, far: Tensor) -> list[Tensor]:
        """First and second derivative of the parabola; the kind called midpoint leaves out the second."""
        if self.config.solver_type == "midpoint":
            return slopes[1:]
        change = (slopes[1] - slopes[0]) / (far - near)
        return [slopes[0] - near * change, 2 * change]


class UniPC(Multistep):
    """Zhao et al. 2023: a predictor, and a corrector that reuses the next evaluation."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.before: Tensor | None = None  # x that the last step began with
        self.order = 1
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
        self.seen = [*self.seen, said][-config.solver_order :]
        left = len(self.grid.timesteps) - i if config.lower_order_final else config.solver_order
        self.order, self.before = min(config.solver_order, left, len(self.seen)), x
        if self.predictor is not None:
            return self.predictor.advance(x, pred, i, noise, variance)[0], x0
        return self._update(x, i, self.order, None), x0

    def _update(self, x: Tensor, i: int, order: int, said: Tensor | None) -> Tensor:
        """From index i to i + 1; with what the network says there, the corrector."""
        h = self.log_ratio(i + 1) - self.log_ratio(i)
        if h == 0:
            return x
        m0 = self.seen[-1]
        ratios = [(self.log_ratio(i - k) - self.log_ratio(i)) / h for k in range(1, order)]
        slopes = [(self.seen[-1 - k] - m0) / r for k, r in enumerate(ratios, 1)]
        hh = -h if self.config.predict_x0 else h
        base = torch.expm1(hh)
        scale = hh if self.config.solver_type == "bh1" else base
        weights = self._weights(ratios, hh, base, scale, order, said is not None)
        if said is not None:
            slopes.append(said - m0)
        (alpha_s, sigma_s), (alpha, sigma) = self.level(i), self.level(i + 1)
        carry, size = (sigma / sigma_s, alpha) if self.config.predict_x0 else (alpha / alpha_s, sigma)
        new = carry.to(x) * x - (size * base).to(x) * m0
        for weight, slope in zip(weights, slopes, strict=True):
            new = new - (size * scale * weight).to(x) * slope
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
