"""Solvers on the steps of training; x keeps unit variance."""

from __future__ import annotations

import torch
from torch import Tensor

from autopipeline.schedulers.grids import alphas_cumprod
from autopipeline.schedulers.parameterisation import clean, limited
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver

Pair = tuple[Tensor, Tensor]


class Discrete(Solver):
    """On the steps of training; x keeps unit variance."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.product = alphas_cumprod(self.config)
        whole = torch.tensor(1.0)
        self.final = whole if self.config.get("set_alpha_to_one", True) else self.product[0]
        self.times = [int(t) for t in grid.timesteps.tolist()]

    def signal(self, t: int) -> Tensor:
        """Share of signal (squared) at a training step; before the first, that of a finished sample."""
        return self.product[t] if t >= 0 else self.final

    def level(self, i: int) -> Pair:
        """By the training step at index i."""
        share = self.product[self.times[i]]
        return share.sqrt(), (1 - share).sqrt()

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample, within its limits."""
        return limited(self.config, clean(self.config, x, pred, *(v.to(x) for v in self.level(i))))


class DDIM(Discrete):
    """Song et al. 2021, eq. 12; eta in 0..1 adds the noise of DDPM."""

    eta = 0.0
    use_clipped_model_output = False  # the noise that belongs to the limited clean sample

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the stride that the number of steps gives."""
        t = self.times[i]
        here, there = self.signal(t), self.signal(t - self.config.num_train_timesteps // self.grid.steps)
        x0 = self.denoised(x, pred, i)
        unclipped = clean(self.config, x, pred, *(v.to(x) for v in self.level(i)))
        direction = self._noise(x, pred, unclipped, here)
        if self.use_clipped_model_output:
            direction = (x - here.sqrt().to(x) * x0) / (1 - here).sqrt().to(x)
        std = self.eta * ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
        new = there.sqrt().to(x) * x0 + (1 - there - std**2).sqrt().to(x) * direction
        return (new + std.to(x) * noise() if self.eta > 0 else new), x0

    def _noise(self, x: Tensor, pred: Tensor, x0: Tensor, share: Tensor) -> Tensor:
        """The noise in x, without a division where the network gives it."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return pred
        if kind == "v_prediction":
            return share.sqrt().to(x) * pred + (1 - share).sqrt().to(x) * x
        return (x - share.sqrt().to(x) * x0) / (1 - share).sqrt().to(x)


class DDPM(Discrete):
    """Ho et al. 2020, eq. 7, with the variances of Nichol & Dhariwal 2021."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """To the next time of the grid; without noise from time 0."""
        t = self.times[i]
        after = self.times[i + 1] if i + 1 < len(self.times) else -1
        here, there = self.product[t], self.product[after] if after >= 0 else torch.tensor(1.0)
        x0 = self.denoised(x, pred, i)
        beta = 1 - here / there
        mean = (there.sqrt() * beta / (1 - here)).to(x) * x0
        mean = mean + ((1 - beta).sqrt() * (1 - there) / (1 - here)).to(x) * x
        if t == 0:
            return mean, x0
        small = ((1 - there) / (1 - here) * beta).clamp(min=1e-20)
        return mean + self._deviation(small, beta, variance, x) * noise(), x0

    def _deviation(self, small: Tensor, large: Tensor, predicted: Tensor | None, x: Tensor) -> Tensor:
        kind = self.config["variance_type"]
        if kind in ("learned", "learned_range") and predicted is None:
            raise ValueError(f"variance_type={kind!r} needs a network that predicts the variance.")
        if kind == "learned":
            return predicted.float().sqrt()  # type: ignore[union-attr]
        if kind == "learned_range":
            share = (predicted.float() + 1) / 2  # type: ignore[union-attr]
            return (0.5 * (share * large.log().to(x) + (1 - share) * small.log().to(x))).exp()
        return (large if kind.startswith("fixed_large") else small).sqrt().to(x)


class PNDM(Discrete):
    """Liu et al. 2022: linear multistep on the noise, after a Runge-Kutta start unless it is skipped."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.start = 0 if self.config.skip_prk_steps else 12
        self.stride = self.config.num_train_timesteps // grid.steps
        self.count = 0
        self.seen: list[Tensor] = []
        self.held: Tensor | None = None  # x that a compound step began with
        self.sum: Tensor | float = 0.0

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One evaluation."""
        x0 = clean(self.config, x, pred, *(v.to(x) for v in self.level(i)))
        rule = self._runge_kutta if self.count < self.start else self._multistep
        new = rule(x, pred, self.times[i])
        self.count += 1
        return new, x0

    def _runge_kutta(self, x: Tensor, pred: Tensor, t: int) -> Tensor:
        part = self.count % 4
        if part == 0:
            self.seen.append(pred)
            self.held, self.sum = x, pred / 6
        elif part < 3:
            self.sum = self.sum + pred / 3
        else:
            pred = self.sum + pred / 6
        held = x if self.held is None else self.held
        before = t - (0 if self.count % 2 else self.stride // 2)
        return self._transfer(held, self.times[self.count // 4 * 4], before, pred)

    def _multistep(self, x: Tensor, pred: Tensor, t: int) -> Tensor:
        """Adams-Bashforth of the order that the history allows; the first step is done twice, as Heun does."""
        after = t - self.stride
        if self.count == 1:
            t, after = t + self.stride, t
            pred, x = (pred + self.seen[-1]) / 2, x if self.held is None else self.held
            return self._transfer(x, t, after, pred)
        self.seen = [*self.seen[-3:], pred]
        if self.count == 0:
            self.held = x
        weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[len(self.seen)]
        terms = [w * p for w, p in zip(weights, reversed(self.seen), strict=True)]
        return self._transfer(x, t, after, sum(terms[1:], terms[0]) / sum(weights))

    def _transfer(self, x: Tensor, t: int, after: int, pred: Tensor) -> Tensor:
        """Liu et al. 2022, eq. 9."""
        here, there = self.signal(t), self.signal(after)
        if self.config.prediction_type == "v_prediction":
            pred = here.sqrt().to(x) * pred + (1 - here).sqrt().to(x) * x
        width = here * (1 - there).sqrt() + (here * (1 - here) * there).sqrt()
        return (there / here).sqrt().to(x) * x - ((there - here) / width).to(x) * pred


class LCM(Discrete):
    """Luo et al. 2023: jump to the clean sample, noise it again."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last step is the clean sample itself."""
        scaled = self.times[i] * self.config.timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        x0 = out * self.denoised(x, pred, i) + skip * x
        if i == len(self.times) - 1:
            return x0, x0
        alpha, sigma = (v.to(x) for v in self.level(i + 1))
        return alpha * x0 + sigma * noise(), x0
