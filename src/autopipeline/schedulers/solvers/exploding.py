"""Solvers on levels of noise; x is the clean sample plus sigma times noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from autopipeline.schedulers.parameterisation import clean
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver
from autopipeline.schedulers.solvers.brownian import BrownianNoise

Pair = tuple[Tensor, Tensor]


def ancestral(here: Tensor, there: Tensor) -> Pair:
    """How far down a step goes, and how much fresh noise leads up from there to the next level (Song et al. 2021b).

    The difference is taken in single precision, as everywhere else; where rounding leaves nothing of it, exactly.
    """
    up = torch.minimum(there, (there**2 * (here**2 - there**2) / here**2).sqrt())
    rest = there**2 - up**2
    return torch.where(rest > 0, rest.clamp(min=0).sqrt(), there**2 / here), up


def middle(here: Tensor, there: Tensor) -> Tensor:
    """Halfway between two levels in the logarithm; 0 on the way to 0."""
    begun = here.log().neg()
    return (begun + (there.log().neg() - begun) * 0.5).neg().exp()


def towards(x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """X at a lower level, with the same noise behind the clean sample."""
    return x0 + (there / here).to(x) * (x - x0)


class Exploding(Solver):
    """On sigmas; x is the clean sample plus sigma times noise, and scaled only for the network."""

    def sigma(self, i: int) -> Tensor:
        """Noise at index i."""
        return self.grid.sigmas[i]  # type: ignore[index]

    def seen(self, i: int) -> Tensor:
        """Noise in x when the network sees it at index i."""
        return self.sigma(i)

    def level(self, i: int) -> Pair:
        """All of the signal."""
        return torch.tensor(1.0), self.sigma(i)

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return x / (self.seen(i) ** 2 + 1).sqrt().to(x)

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample."""
        at = self.seen(i).to(x)
        return clean(self.config, x, pred, torch.ones_like(at), at)


class Churned(Exploding):
    """Karras et al. 2022, algorithm 2: noise up to a higher level, then along the tangent.

    The network has seen x before the noise. Options: `s_churn`, `s_tmin`, `s_tmax`, `s_noise` of the paper.
    """

    options = ("s_churn", "s_tmin", "s_tmax", "s_noise")
    s_churn, s_tmin, s_tmax, s_noise = 0.0, 0.0, math.inf, 1.0

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws only where there is something to add."""
        here = self.sigma(i)
        within = self.s_tmin <= here <= self.s_tmax
        churn = min(self.s_churn / len(self.grid.timesteps), math.sqrt(2) - 1) if within else 0.0
        above = here * (1 + churn)
        if churn > 0:
            x = x + noise() * self.s_noise * (above**2 - here**2).sqrt().to(x)
        x0 = self._cleaned(x, pred, here.to(x), above.to(x))
        return towards(x, x0, above, self.sigma(i + 1)), x0

    def _cleaned(self, x: Tensor, pred: Tensor, here: Tensor, above: Tensor) -> Tensor:
        """The clean sample in x at the level above."""
        raise NotImplementedError


class Euler(Churned):
    """Euler's method; velocities are taken for those of the level that the network was told."""

    def _cleaned(self, x: Tensor, pred: Tensor, here: Tensor, above: Tensor) -> Tensor:
        at = above if self.config.prediction_type == "epsilon" else here
        return clean(self.config, x, pred, torch.ones_like(at), at)


class EulerAncestral(Exploding):
    """Euler's step to a lower level, and noise up to the next one (Song et al. 2021b; k-diffusion)."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws in every step, the last included."""
        here = self.sigma(i)
        down, up = ancestral(here, self.sigma(i + 1))
        x0 = self.denoised(x, pred, i)
        return towards(x, x0, here, down) + noise() * up.to(x), x0


class LMS(Exploding):
    """Linear multistep (Adams-Bashforth on uneven levels): the slopes' polynomial, integrated over the step.

    Option: `order`, of the method. A run that begins part-way weighs its first slopes as if it had all of them.
    """

    options = ("order",)
    order = 4

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.slopes: list[Tensor] = []  # the latest first

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """With as many of the last slopes as there are."""
        x0 = self.denoised(x, pred, i)
        self.slopes = [(x - x0) / self.sigma(i).to(x), *self.slopes][: self.order]
        for weight, slope in zip(self._weights(i), self.slopes, strict=False):
            x = x + weight * slope
        return x, x0

    def _weights(self, i: int) -> list[float]:
        """Integrals of Lagrange's polynomials, by a quadrature that is exact for their degree."""
        order = min(i + 1, self.order)
        known = [float(self.sigma(i - k)) for k in range(order)]
        begun, width = known[0], float(self.sigma(i + 1)) - known[0]
        nodes, weights = np.polynomial.legendre.leggauss(order)
        at = begun + width * (nodes + 1) / 2
        shapes = [math.prod(((at - b) / (a - b) for b in known if b != a), start=np.ones(order)) for a in known]
        return [float((weights * shape).sum() * width / 2) for shape in shapes]


class TwoHalves(Exploding):
    """Two evaluations for each step, at indices 2 k and 2 k + 1 of the grid; the last one, to 0, has only the first."""

    begun: Pair | None = None  # x at the beginning of the step, and its slope there

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One half of a step."""
        x0 = self.denoised(x, pred, i)
        slope = (x - x0) / self.seen(i).to(x)
        here, there = self._ends(i)
        if self.begun is None:
            self.begun = (x, slope)
            return self._first(x, x0, here, there), x0
        begun, before = self.begun
        self.begun = None
        return self._second(begun, x0, (before, slope), here, there, noise), x0

    def seen(self, i: int) -> Tensor:
        """The level at the beginning of the step, or that of the second look."""
        return self.sigma(i) if self.begun is None else self._aim(*self._ends(i))

    def _ends(self, i: int) -> Pair:
        i -= self.begun is not None
        return self.sigma(i), self.sigma(i + 1)

    def _aim(self, here: Tensor, there: Tensor) -> Tensor:
        """The level of the second look."""
        return there

    def _first(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Along the tangent to the second look."""
        return towards(x, x0, here, self._aim(here, there))

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor, noise: Noise) -> Tensor:
        """From the beginning of the step to its end."""
        return x + (slopes[0] + slopes[1]) / 2 * (there - here).to(x)


class Heun(TwoHalves):
    """Karras et al. 2022, algorithm 1: Euler's step, then the mean of both slopes."""

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample, clipped where the configuration asks for it."""
        x0, most = super().denoised(x, pred, i), self.config.clip_sample_range
        return x0.clamp(-most, most) if self.config.clip_sample else x0


class Restart(Heun):
    """Xu et al. 2023, algorithm 2: Heun's steps, and noise back up wherever the grid rises.

    Option: `s_noise`, which scales that noise.
    """

    options = ("s_noise",)
    s_noise = 1.0

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws only at the end of a step below the beginning of the next."""
        new, x0 = super().advance(x, pred, i, noise, variance)
        here, there = self.sigma(i), self.sigma(i + 1)
        if there > here:
            new = new + noise() * self.s_noise * (there**2 - here**2).sqrt().to(x)
        return new, x0


class KDPM2(TwoHalves):
    """DPM-Solver-2 (Lu et al. 2022a) in the formulation of Karras et al. 2022: the slope halfway in the logarithm."""

    def _aim(self, here: Tensor, there: Tensor) -> Tensor:
        return middle(here, there)

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor, noise: Noise) -> Tensor:
        return x + slopes[1] * (there - here).to(x)


class KDPM2Ancestral(KDPM2):
    """DPM-Solver-2 to a lower level, and noise up to the next one; draws once for each step."""

    def _aim(self, here: Tensor, there: Tensor) -> Tensor:
        return middle(here, ancestral(here, there)[0])

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor, noise: Noise) -> Tensor:
        down, up = ancestral(here, there)
        return super()._second(x, x0, slopes, here, down, noise) + noise() * up.to(x)


class DPMPP2SAncestral(KDPM2Ancestral):
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) to a lower level, and noise up to the next one."""

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor, noise: Noise) -> Tensor:
        down, up = ancestral(here, there)
        return towards(x, x0, here, down) + noise() * up.to(x)


class DPMSolverSDE(KDPM2):
    """DPM-Solver++(2S) in two ancestral halves, whose noise is one Brownian path over the levels (k-diffusion).

    The path is torchsde's, of the configuration's `noise_sampler_seed`: one for the batch, or a list of one for each
    picture; without one, the run's own noise seeds it. Option: `s_noise`, which scales it.
    """

    options = ("s_noise",)
    s_noise = 1.0
    path: BrownianNoise | None = None

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """The path is laid in the first step; a single step, to 0, takes no noise."""
        levels = [level for level in self.grid.sigmas.tolist() if level > 0]  # type: ignore[union-attr]
        if self.path is None and len(levels) > 1:
            self.path = BrownianNoise(noise, min(levels), max(levels), self.config.noise_sampler_seed)
        return super().advance(x, pred, i, noise, variance)

    def _between(self, here: Tensor, there: Tensor) -> Tensor:
        """Unit noise of the path between two levels."""
        # The path is rough: levels that are rounded otherwise, as by a logarithm and back, would meet another one.
        assert self.path is not None
        return self.path(*(level.log().exp() for level in (here, there)))

    def _leap(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Exponentially towards the clean sample, and noise up again."""
        down, up = ancestral(here, there)
        new = towards(x, x0, here, down)
        return new if up == 0 else new + self._between(here, there).to(x) * (self.s_noise * up).to(x)

    def _first(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return self._leap(x, x0, here, self._aim(here, there))

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor, noise: Noise) -> Tensor:
        return self._leap(x, x0, here, there)


class DPMPP3MSDE(Exploding):
    """DPM-Solver++ as an SDE of three steps (Lu et al. 2022b, section 5; k-diffusion), exponential in the logarithm.

    The curvature has half of the weight that a parabola would give it, as in k-diffusion. Option: `s_noise`.
    """

    options = ("s_noise",)
    s_noise = 1.0

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.known: list[Pair] = []  # logarithm of signal over noise, and clean sample; the latest first

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """By as many of the last clean samples as there are; the last step takes the clean sample."""
        x0 = self.denoised(x, pred, i)
        here, there = self.sigma(i), self.sigma(i + 1)
        if there == 0:
            return x0, x0
        (t0, _), *others = self.known = [(-here.log(), x0), *self.known][:3]
        h = here.log() - there.log()
        shrunk = torch.expm1(-2 * h)  # twice, as half of the way down is made good by noise
        new = x0 + (shrunk + 1).to(x) * (x - x0)
        linear = shrunk / 2 + h
        if others:
            slope = _slope(*self.known[:2])
            if len(others) > 1:
                bend = (slope - _slope(*others)) / (t0 - others[1][0]).to(x)
                slope = slope + (t0 - others[0][0]).to(x) * bend
                new = new + ((h**2 - linear) / 2).to(x) * bend
            new = new + linear.to(x) * slope
        return new + noise() * (self.s_noise * there * (-shrunk).sqrt()).to(x), x0


def _slope(now: Pair, before: Pair) -> Tensor:
    """Of the clean sample, from one logarithm of signal over noise to another."""
    return (now[1] - before[1]) / (now[0] - before[0]).to(now[1])
