"""Solvers on the steps of training; x keeps unit variance."""

from __future__ import annotations

import torch
from torch import Tensor

from autopipeline.noise import Noise
from autopipeline.schedulers.grids import alphas_cumprod, betas
from autopipeline.schedulers.parameterisation import clean
from autopipeline.schedulers.scheduler import Grid, Pair, Scheduler, Solver


class Discrete(Solver):
    """On the steps of training; x keeps unit variance."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.product = alphas_cumprod(self.config)
        self.final = torch.tensor(1.0) if self.config.get("set_alpha_to_one", True) else self.product[0]
        self.times = [int(t) for t in grid.timesteps.tolist()]
        self.stride: int = self.config.num_train_timesteps // grid.steps

    def signal(self, t: int) -> Tensor:
        """Share of signal (squared) at a training step; before the first, that of a finished sample."""
        return self.product[t] if t >= 0 else self.final

    def shares(self, i: int) -> Pair:
        """Share of signal (squared) before and after a step of the stride that the number of steps gives."""
        return self.signal(self.times[i]), self.signal(self.times[i] - self.stride)

    def level(self, i: int) -> Pair:
        """Before the step."""
        share = self.shares(i)[0]
        return share.sqrt(), (1 - share).sqrt()

    def after(self, i: int) -> int:
        """The time to go to; -1 for the clean sample."""
        return self.times[i + 1] if i + 1 < len(self.times) else -1


def adams_bashforth(seen: list[Tensor]) -> Tensor:
    """Where the last one to four slopes lead, with equal steps."""
    weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[len(seen)]
    terms = [w * p for w, p in zip(weights, reversed(seen), strict=True)]
    return sum(terms[1:], terms[0]) / sum(weights)


def spread(here: Tensor, there: Tensor) -> Tensor:
    """Standard deviation of the noise of DDPM between two shares of signal (Song et al. 2021, eq. 16)."""
    return ((1 - there) / (1 - here) * (1 - here / there)).sqrt()


class DDIM(Discrete):
    """Song et al. 2021, eq. 12; eta in 0..1 adds the noise of DDPM."""

    use_clipped_model_output = False  # the noise that belongs to the limited clean sample

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws only with eta."""
        (here, there), x0 = self.shares(i), self.denoised(x, pred, i)
        direction = self.noise_in(x, pred, i)
        if self.use_clipped_model_output:
            direction = (x - here.sqrt() * x0) / (1 - here).sqrt()
        std = self.eta * spread(here, there) if self.eta else torch.tensor(0.0)
        new = there.sqrt() * x0 + (1 - there - std**2).sqrt() * direction
        return (new + std * noise() if self.eta > 0 else new), x0


class DDIMInverse(DDIM):
    """The same way backwards, from the clean sample to noise: to the time that the network is told."""

    def shares(self, i: int) -> Pair:
        """The time before is a stride lower."""
        there, here = super().shares(i)
        return here, there


class CogVideoXDDIM(DDIM):
    """DDIM whose configuration speaks of limits, but that knows none; nor does it add noise."""

    fixed = Solver.fixed | dict(clip_sample=False, eta=0.0)


class CogVideoXDPM(CogVideoXDDIM):
    """SDE-DPM-Solver++ (2M; Lu et al. 2022b) on DDIM's strides; of two draws, which later steps make, it takes one."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """The first step and the one to the clean sample are of first order."""
        here, there = self.shares(i)
        x0, drawn, width = self.denoised(x, pred, i), noise(), depth(there) - depth(here)
        lead = x0
        if self.said and self.times[i] >= self.stride:
            before = depth(here) - depth(self.signal(self.times[i - 1]))
            lead, drawn = x0 + (x0 - self.said[-1]) * (width / before / 2), noise()
        self.said = [x0]
        kept, new = ((1 - there) / (1 - here)).sqrt() * (-width).exp(), -(-2 * width).expm1()
        return kept * x + new * there.sqrt() * lead + ((1 - there) * new).sqrt() * drawn, x0


def depth(share: Tensor) -> Tensor:
    """Half the logarithm of signal over noise."""
    return (share / (1 - share)).log() / 2


class DDPM(Discrete):
    """Ho et al. 2020, eq. 7, with the variances of Nichol & Dhariwal 2021."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """To the next time of the grid; without noise from time 0."""
        t, after = self.times[i], self.after(i)
        here, there, beta = self.signal(t), self.signal(after), self.beta(t, after)
        x0 = self.denoised(x, pred, i)
        mean = there.sqrt() * beta / (1 - here) * x0 + (1 - beta).sqrt() * (1 - there) / (1 - here) * x
        return (mean + self.deviation(t, after, variance, self.config.variance_type) * noise() if t else mean), x0

    def beta(self, t: int, after: int) -> Tensor:
        """Variance that training added on the way from `after` to t."""
        return 1 - self.signal(t) / self.signal(after)

    def deviation(self, t: int, after: int, predicted: Tensor | None, kind: str | None) -> Tensor:
        """Of the noise on the way from t to `after`; `predicted`: what the network says of it, as `kind` has it.

        Without a kind, as in the configurations of other schedulers, it is the small one.
        """
        if kind in ("learned", "learned_range") and predicted is None:
            raise ValueError(f"variance_type={kind!r} needs a network that predicts the variance.")
        here, there, large = self.signal(t), self.signal(after), self.beta(t, after)
        small = ((1 - there) / (1 - here) * large).clamp(min=1e-20)
        if kind == "learned":
            return torch.as_tensor(predicted).float().sqrt()
        if kind == "learned_range":
            share = (torch.as_tensor(predicted).float() + 1) / 2
            return (0.5 * (share * large.log() + (1 - share) * small.log())).exp()
        return (large if kind and kind.startswith("fixed_large") else small).sqrt()


class DDPMParallel(DDPM):
    """The same over a fixed stride, whatever the grid."""

    def after(self, i: int) -> int:
        """A stride lower."""
        return self.times[i] - self.stride


class UnCLIP(DDPM):
    """DDPM as Ramesh et al. 2022 use it; `prev_timestep`, set before a step, is where to go instead."""

    prev_timestep: int | None = None

    def after(self, i: int) -> int:
        """The next time, or the one that was set."""
        return super().after(i) if self.prev_timestep is None else self.prev_timestep

    def beta(self, t: int, after: int) -> Tensor:
        """Without rounding between neighbours."""
        return betas(self.config)[t] if after == t - 1 else super().beta(t, after)


class PNDM(Discrete):
    """Liu et al. 2022: linear multistep on the noise, after a Runge-Kutta start unless it is skipped."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.start = 0 if self.config.skip_prk_steps else 12
        self.count = 0
        self.held: Tensor | None = None  # x that a compound step began with
        self.sum: Tensor | float = 0.0

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """One evaluation."""
        x0 = clean(self.config, x, pred, *self.level(i))
        rule = self._runge_kutta if self.count < self.start else self._multistep
        new = rule(x, pred, self.times[i])
        self.count += 1
        return new, x0

    def _runge_kutta(self, x: Tensor, pred: Tensor, t: int) -> Tensor:
        part = self.count % 4
        if part == 0:
            self.said.append(pred)
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
            pred, x = (pred + self.said[-1]) / 2, x if self.held is None else self.held
            return self._transfer(x, t, after, pred)
        self.said = [*self.said[-3:], pred]
        if self.count == 0:
            self.held = x
        return self._transfer(x, t, after, adams_bashforth(self.said))

    def _transfer(self, x: Tensor, t: int, after: int, pred: Tensor) -> Tensor:
        """Liu et al. 2022, eq. 9."""
        here, there = self.signal(t), self.signal(after)
        if self.config.prediction_type == "v_prediction":
            pred = here.sqrt() * pred + (1 - here).sqrt() * x
        width = here * (1 - there).sqrt() + (here * (1 - here) * there).sqrt()
        return (there / here).sqrt() * x - ((there - here) / width) * pred


class LCM(Discrete):
    """Luo et al. 2023: jump to the clean sample, noise it again."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """The last step is the clean sample itself."""
        scaled = self.times[i] * self.config.timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        x0 = out * self.denoised(x, pred, i) + skip * x
        return (self.noised(x0, noise(), i + 1) if self.after(i) >= 0 else x0), x0


class TCD(Discrete):
    """Zheng et al. 2024, algorithm 4: along the trajectory to a time below the next, then noise up to the next.

    `eta` (the paper's gamma) in 0..1 is how far below; `pred_noised_sample` is the last x before the noise.
    """

    eta = 0.3
    pred_noised_sample: Tensor | None = None

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """The last step goes to the first step of training, without noise."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} has to lie in 0..1.")
        t, last = max(self.after(i), 0), self.after(i) < 0
        there = self.signal(t)
        below = self.signal(int((torch.tensor(float(t)) * (1 - self.eta)).floor()))
        x0 = clean(self.config, x, pred, *self.level(i))
        new = below.sqrt() * x0 + (1 - below).sqrt() * self.noise_in(x, pred, i)
        self.pred_noised_sample = new
        if self.eta > 0 and not last:
            new = (there / below).sqrt() * new + (1 - there / below).sqrt() * noise()
        return new, x0


class RePaint(Discrete):
    """Lugmayr et al. 2022, algorithm 1: what the mask keeps comes from the original, and time jumps back now and then.

    `original_image` and `mask` (1 where the original stays) have to be set before the first step.
    """

    fixed = Solver.fixed | dict(clip_sample_range=1.0)
    original_image: Tensor | None = None
    mask: Tensor | None = None

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.betas, self.eta = betas(self.config), self.config.eta

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """A step, and the jump back that follows it."""
        if self.original_image is None or self.mask is None:
            raise ValueError("RePaintScheduler needs original_image and mask.")
        t, after, mask = self.times[i], self.after(i), self.mask.to(x)
        here, there = self.shares(i)
        x0, drawn, std = self.denoised(x, pred, i), noise(), self.eta * spread(here, there)
        new = there.sqrt() * x0 + (1 - there - std**2).sqrt() * pred + std * drawn
        known = there.sqrt() * self.original_image.to(x) + (1 - there).sqrt() * drawn
        new = mask * known + (1 - mask) * new
        for beta in self.betas[t : after + self.stride] if after > t else ():
            new = (1 - beta).sqrt() * new + beta.sqrt() * noise()  # a step of training back towards noise (eq. 2)
        return new, x0
