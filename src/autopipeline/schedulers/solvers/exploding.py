"""Solvers on levels of noise; x is the clean sample plus sigma times noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autopipeline.noise import BrownianNoise, Noise
from autopipeline.quadrature import integrals
from autopipeline.schedulers.parameterisation import clean, limited
from autopipeline.schedulers.scheduler import Pair, Solver


def ancestral(here: Tensor, there: Tensor) -> Pair:
    """How far down a step goes, and how much fresh noise leads up from there to the next level (Song et al. 2021b).

    The difference is taken in single precision, as everywhere else; where rounding leaves nothing of it, exactly.
    """
    up = torch.minimum(there, (there**2 * (here**2 - there**2) / here**2).sqrt())
    rest = there**2 - up**2
    return torch.where(rest > 0, rest.clamp(min=0).sqrt(), there**2 / here), up


def towards(x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """X at a lower level, with the same noise behind the clean sample."""
    return x0 + (there / here) * (x - x0)


class Exploding(Solver):
    """On sigmas; x is the clean sample plus sigma times noise, and scaled only for the network."""

    def seen(self, i: int) -> Tensor:
        """Noise in x when the network sees it at index i."""
        return self.sigma(i)

    def level(self, i: int) -> Pair:
        """All of the signal."""
        return torch.tensor(1.0), self.sigma(i)

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample, at what the network sees."""
        return self.cleaned(x, pred, self.seen(i))

    def cleaned(self, x: Tensor, pred: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample in x at a level, within its limits."""
        return limited(self.config, clean(self.config, x, pred, torch.tensor(1.0), sigma))

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return x / (self.seen(i) ** 2 + 1).sqrt().to(x)


class Euler(Exploding):
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
            x = x + noise() * self.s_noise * (above**2 - here**2).sqrt()
        x0 = self.cleaned(x, pred, self._meant(here, above))
        return towards(x, x0, above, self.sigma(i + 1)), x0

    def _meant(self, here: Tensor, above: Tensor) -> Tensor:
        """Noise is taken for that of the level above, but velocities for those of the level that the network sees."""
        return above if self.config.prediction_type == "epsilon" else here


class EulerAncestral(Exploding):
    """Euler's step to a lower level, and noise up to the next one (Song et al. 2021b; k-diffusion)."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws in every step, the last included."""
        down, up = ancestral(self.sigma(i), self.sigma(i + 1))
        x0 = self.denoised(x, pred, i)
        return towards(x, x0, self.sigma(i), down) + noise() * up, x0


class LMS(Exploding):
    """Linear multistep (Adams-Bashforth on uneven levels): the slopes' polynomial, integrated over the step.

    Option: `order`, of the method. A run that begins part-way weighs its first slopes as if it had all of them.
    """

    options = ("order",)
    order = 4

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """With as many of the last slopes as there are."""
        x0 = self.denoised(x, pred, i)
        self.said = [*self.said, (x - x0) / self.sigma(i)][-self.order :]
        nodes = [float(self.sigma(i - k)) for k in range(min(i + 1, self.order))]
        for weight, slope in zip(integrals(nodes, nodes[0], float(self.sigma(i + 1))), self.said[::-1], strict=False):
            x = x + weight * slope
        return x, x0


class Heun(Exploding):
    """Karras et al. 2022, algorithm 1: Euler's step, then the mean of both slopes.

    Two evaluations for each step, at indices 2 k and 2 k + 1 of the grid; the last one, to 0, has only the first.
    """

    fresh = False  # whether a step goes to a lower level, and noise from there up to the next one
    begun: Pair | None = None  # x at the beginning of the step, and its slope there

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One half of a step; fresh noise is drawn once for each step."""
        x0 = self.denoised(x, pred, i)
        slope, (here, there) = self._slope(x, pred, x0, i), self._ends(i)
        if self.begun is None:
            self.begun = (x, slope)
            return self._first(x, x0, here, there), x0
        (begun, before), self.begun = self.begun, None
        if not self.fresh:
            return self._second(begun, x0, (before, slope), here, there), x0
        down, up = ancestral(here, there)
        return self._second(begun, x0, (before, slope), here, down) + noise() * up, x0

    def seen(self, i: int) -> Tensor:
        """The level at the beginning of the step, or that of the second look."""
        return self.sigma(i) if self.begun is None else self.aim(*self._ends(i))

    def _slope(self, x: Tensor, pred: Tensor, x0: Tensor, i: int) -> Tensor:
        return (x - x0) / self.seen(i)

    def _ends(self, i: int) -> Pair:
        i -= self.begun is not None
        return self.sigma(i), self.sigma(i + 1)

    @classmethod
    def aim(cls, here: Tensor, there: Tensor) -> Tensor:
        """The level of the second look."""
        return there

    def _first(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Along the tangent to the second look."""
        return towards(x, x0, here, self.aim(here, there))

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor) -> Tensor:
        """From the beginning of the step to its end."""
        return x + (slopes[0] + slopes[1]) / 2 * (there - here)


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
        return (new + noise() * self.s_noise * (there**2 - here**2).sqrt() if there > here else new), x0


class KDPM2(Heun):
    """DPM-Solver-2 (Lu et al. 2022a) in the formulation of Karras et al. 2022: the slope halfway in the logarithm."""

    @classmethod
    def aim(cls, here: Tensor, there: Tensor) -> Tensor:
        """Halfway in the logarithm; 0 on the way to 0."""
        end = ancestral(here, there)[0] if cls.fresh else there
        begun = here.log().neg()
        return (begun + (end.log().neg() - begun) * 0.5).neg().exp()

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor) -> Tensor:
        return x + slopes[1] * (there - here)


class KDPM2Ancestral(KDPM2):
    """DPM-Solver-2 to a lower level, and noise up to the next one."""

    fresh = True


class DPMPP2SAncestral(KDPM2Ancestral):
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) to a lower level, and noise up to the next one."""

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor) -> Tensor:
        return towards(x, x0, here, there)


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
        levels = [level for level in self.grid.levels.tolist() if level > 0]
        if self.path is None and len(levels) > 1:
            self.path = BrownianNoise(noise, min(levels), max(levels), self.config.noise_sampler_seed)
        return super().advance(x, pred, i, noise, variance)

    def _leap(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Exponentially towards the clean sample, and noise up again."""
        down, up = ancestral(here, there)
        new = towards(x, x0, here, down)
        if up == 0:
            return new
        assert self.path is not None
        # The path is rough: levels that are rounded otherwise, as by a logarithm and back, would meet another one.
        return new + self.path(here.log().exp(), there.log().exp()) * (self.s_noise * up)

    def _first(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return self._leap(x, x0, here, self.aim(here, there))

    def _second(self, x: Tensor, x0: Tensor, slopes: Pair, here: Tensor, there: Tensor) -> Tensor:
        return self._leap(x, x0, here, there)
