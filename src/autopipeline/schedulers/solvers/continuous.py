"""Solvers on continuous times: those of Karras et al. 2022, and others with a formulation of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipeline.noise import BrownianNoise, Noise
from autopipeline.schedulers.parameterisation import limited
from autopipeline.schedulers.scheduler import Grid, Pair, Scheduler, Solver
from autopipeline.schedulers.solvers.discrete import adams_bashforth
from autopipeline.schedulers.solvers.exploding import Euler, Exploding
from autopipeline.schedulers.solvers.multistep import DPMSolver


class Preconditioned(Exploding):
    """Karras et al. 2022, table 1: the network is shown x at unit variance, and says what a share of x leaves open."""

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance, for data of the standard deviation sigma_data."""
        return x / (self.sigma(i) ** 2 + self.config.sigma_data**2).sqrt().to(x)

    def cleaned(self, x: Tensor, pred: Tensor, sigma: Tensor) -> Tensor:
        """What the shares of x and of the answer make up, within its limits."""
        data, sign = self.config.sigma_data, -1.0 if self.config.prediction_type == "v_prediction" else 1.0
        size = (sigma**2 + data**2).sqrt()
        return limited(self.config, (data / size) ** 2 * x + sign * sigma * data / size * pred)


class EDM(Preconditioned, DPMSolver):
    """DPM-Solver++ over x with all of its signal."""


class EDMEuler(Preconditioned, Euler):
    """Karras et al. 2022, algorithm 2."""

    def _meant(self, here: Tensor, above: Tensor) -> Tensor:
        return above


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


class IPNDM(Solver):
    """Zhang & Chen 2022, section 3: Adams-Bashforth on the noise, of a network that says the velocity.

    The grid's sigmas are shares of noise, the signal's share squared makes up the rest.
    """

    fixed = Solver.fixed | dict(prediction_type="v_prediction")

    def level(self, i: int) -> Pair:
        """Variance-preserving."""
        return (1 - self.sigma(i) ** 2).sqrt(), self.sigma(i)

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Of the order that the history allows, up to four."""
        (alpha, sigma), (alpha_t, sigma_t) = self.level(i), self.level(i + 1)
        self.said = [*self.said[-3:], self.noise_in(x, pred, i)]
        slope = adams_bashforth(self.said)
        new = alpha_t * (x - sigma * slope) / alpha.clamp(min=1e-8) + sigma_t * slope
        return new, self.denoised(x, pred, i)


class Consistency(Preconditioned):
    """Song et al. 2023, algorithm 1: jump to the clean sample, noise it again."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws in every step, unless there is only one."""
        config, sigma = self.config, self.sigma(i)
        above = sigma - config.sigma_min  # 0 at the boundary, where the network has no say (appendix C)
        skip = config.sigma_data**2 / (above**2 + config.sigma_data**2)
        out = above * config.sigma_data / (sigma**2 + config.sigma_data**2).sqrt()
        x0 = out * pred + skip * x
        x0 = x0.clamp(-1, 1) if config.clip_denoised else x0
        if len(self.grid.timesteps) == 1:
            return x0, x0
        there = self.sigma(i + 1).clamp(config.sigma_min, config.sigma_max)
        width = (there**2 - config.sigma_min**2).clamp(min=0).sqrt() * config.s_noise
        return x0 + width * noise(), x0


class ScoreSdeVe(Exploding):
    """Song et al. 2021b, algorithms 2 and 4: at each level first `correct_steps` corrections, then a prediction.

    The network says the score. Each level is on the grid once for each evaluation, with the sigma that the network is
    told; `discrete` are the levels that the predictor walks, rising.
    """

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        low, high = (torch.tensor(float(self.config[name])).log().item() for name in ("sigma_min", "sigma_max"))
        self.discrete = torch.linspace(low, high, grid.steps).exp()

    scale = Solver.scale

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One of the corrections, or the prediction."""
        rounds = self.config.correct_steps + 1
        time = self.grid.levels[i // rounds]
        return self.correct(x, pred, noise) if (i + 1) % rounds else self.predict(x, pred, time, noise)

    def sigma(self, i: int) -> Tensor:
        """What the network is told at index i."""
        return self.grid.timesteps[i].cpu()

    def correct(self, x: Tensor, score: Tensor, noise: Noise) -> Pair:
        """Langevin dynamics to the signal-to-noise ratio `snr`."""
        drawn = noise()
        sizes = [v.flatten(1).norm(dim=1).mean() for v in (drawn, score)]
        width = 2 * (self.config.snr * sizes[0] / sizes[1]) ** 2
        mean = x + width * score
        return mean + (2 * width).sqrt() * drawn, mean

    def predict(self, x: Tensor, score: Tensor, time: Tensor, noise: Noise) -> Pair:
        """Reverse diffusion from a time in 0..1 to the level below; the last step's mean is the result."""
        k = int(time * (len(self.discrete) - 1))
        below = self.discrete[k - 1] if k else torch.tensor(0.0)
        square = self.discrete[k] ** 2 - below**2
        mean = x + square * score
        return mean + square.sqrt() * noise(), mean


class Wuerstchen(Solver):
    """Ho et al. 2020, eq. 7, from a time in 1..0 to the next; the grid's sigmas are the times, the end included."""

    def share(self, i: int) -> Tensor:
        """Share of signal (squared): a cosine (Nichol & Dhariwal 2021, eq. 17) of the time, which may be bent."""
        t, s, power = self.grid.levels[i], self.config.s, self.config.scaler
        t = 1 - (1 - t) ** power if power > 1 else t**power
        top, least = (((v + s) / (1 + s) * torch.pi / 2).cos() ** 2 for v in (t, torch.tensor(0.0)))
        return (top / least).clamp(0.0001, 0.9999)

    def level(self, i: int) -> Pair:
        """Variance-preserving."""
        return self.share(i).sqrt(), (1 - self.share(i)).sqrt()

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws in every step, though the one to time 0 has no use for it."""
        here, there = self.share(i), self.share(i + 1)
        kept, drawn = here / there, noise()
        new = (x - (1 - kept) / (1 - here).sqrt() * pred) / kept.sqrt()
        if self.grid.levels[i + 1] > 0:
            new = new + ((1 - kept) * (1 - there) / (1 - here)).sqrt() * drawn
        return new, self.denoised(x, pred, i)
