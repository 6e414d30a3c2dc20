"""DPM-Solver++ over x with all of its signal, and the preconditioning of Karras et al. 2022."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipeline.noise import BrownianNoise, Noise
from autopipeline.schedulers.parameterisation import limited
from autopipeline.schedulers.scheduler import Solver
from autopipeline.schedulers.solvers.exploding import Churned, Exploding
from autopipeline.schedulers.solvers.multistep import DPMSolver


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


class Preconditioned(Solver):
    """Karras et al. 2022, table 1: the network is shown x at unit variance, and says what a share of x leaves open."""

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance, for data of the standard deviation sigma_data."""
        return x / (self.sigma(i) ** 2 + self.config.sigma_data**2).sqrt().to(x)

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample, within its limits."""
        return self.cleaned(x, pred, self.sigma(i))

    def cleaned(self, x: Tensor, pred: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample in x at a level."""
        data, sign = self.config.sigma_data, -1.0 if self.config.prediction_type == "v_prediction" else 1.0
        size = (sigma**2 + data**2).sqrt()
        return limited(self.config, (data / size) ** 2 * x + sign * sigma * data / size * pred)


class EDM(Preconditioned, Exploding, DPMSolver):
    """DPM-Solver++ over x with all of its signal."""


class EDMEuler(Preconditioned, Churned):
    """Euler's method."""

    def _cleaned(self, x: Tensor, pred: Tensor, here: Tensor, above: Tensor) -> Tensor:
        return self.cleaned(x, pred, above)


class Cosine(EDM):
    """SDE-DPM-Solver++ with noise along a Brownian path.

    Option: `seed`, that of the path, or a list with one for each sample; the reference implementation takes the
    generator's `initial_seed()`. Without it, the first draw of the run's noise decides.
    """

    fixed = Solver.fixed | dict(algorithm_type="sde-dpmsolver++")
    options = ("seed",)
    seed: int | Sequence[int] | None = None
    path: BrownianNoise | None = None

    def drawn(self, i: int, noise: Noise) -> Tensor:
        """The path's increment from grid index i to the next."""
        if self.path is None:
            self.path = BrownianNoise(noise, self.config.sigma_min, self.config.sigma_max, self.seed)
        return self.path(self.sigma(i), self.sigma(i + 1))
