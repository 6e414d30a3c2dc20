"""Solvers: small rules for going from one noise level to the next. Each belongs to one run."""

from __future__ import annotations

from typing import Any

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

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the stride that the number of steps gives."""
        t = self.times[i]
        here, there = self.signal(t), self.signal(t - self.config.num_train_timesteps // self.grid.steps)
        x0 = self.denoised(x, pred, i)
        unclipped = clean(self.config, x, pred, *(v.to(x) for v in self.level(i)))
        direction = self._noise(x, pred, unclipped, here)
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


class Exploding(Solver):
    """On sigmas; x is the clean sample plus sigma times noise, and scaled only for the network."""

    def sigma(self, i: int) -> Tensor:
        """Noise at index i."""
        return self.grid.sigmas[i]  # type: ignore[index]

    def level(self, i: int) -> Pair:
        """All of the signal."""
        return torch.tensor(1.0), self.sigma(i)

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return x / (self.sigma(i) ** 2 + 1).sqrt().to(x)

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample."""
        return limited(self.config, clean(self.config, x, pred, *(v.to(x) for v in self.level(i))))


class Euler(Exploding):
    """Karras et al. 2022, algorithm 2 without churn."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Along the tangent."""
        here, there = self.sigma(i).to(x), self.sigma(i + 1).to(x)
        x0 = clean(self.config, x, pred, torch.ones_like(here), here)
        return x + (x - x0) / here * (there - here), x0


class EulerAncestral(Exploding):
    """Euler's step to a lower level, and noise up to the next one (Song et al. 2021b; k-diffusion)."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws in every step, the last included."""
        here, there = self.sigma(i), self.sigma(i + 1)
        up = (there**2 * (here**2 - there**2) / here**2).sqrt()
        down = (there**2 - up**2).sqrt()
        x0 = clean(self.config, x, pred, torch.ones_like(here).to(x), here.to(x))
        return x + (x - x0) / here.to(x) * (down - here).to(x) + noise() * up.to(x), x0


class Heun(Exploding):
    """Karras et al. 2022, algorithm 1: Euler's step, then the mean of both slopes; the grid has each level twice."""

    held: tuple[Tensor, Tensor, Tensor] | None = None  # x, slope, width of the first half

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One half of a step."""
        here = self.sigma(i).to(x)
        x0 = self.denoised(x, pred, i)
        slope = (x - x0) / here
        if self.held is None:
            width = self.sigma(i + 1).to(x) - here
            self.held = (x, slope, width)
            return x + slope * width, x0
        begun, before, width = self.held
        self.held = None
        return begun + (before + slope) / 2 * width, x0


class Multistep(Solver):
    """On sigmas; x keeps unit variance. Remembers what the network said at the last levels."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.seen: list[Tensor] = []

    def level(self, i: int) -> Pair:
        """Variance-preserving."""
        sigma = self.grid.sigmas[i]  # type: ignore[index]
        if self.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1).sqrt()
        return alpha, sigma * alpha

    def log_ratio(self, i: int) -> Tensor:
        """Lambda: the logarithm of signal over noise."""
        alpha, sigma = self.level(i)
        return alpha.log() - sigma.log()

    def converted(self, x: Tensor, pred: Tensor, i: int, as_clean: bool) -> tuple[Tensor, Tensor]:
        """What is remembered (the clean sample or the noise), and the clean sample."""
        alpha, sigma = (v.to(x) for v in self.level(i))
        x0 = clean(self.config, x, pred, alpha, sigma)
        if self.config.get("thresholding"):
            x0 = limited(self.config, x0)
        elif not as_clean and self.config.prediction_type == "epsilon":
            return pred, x0
        return (x0 if as_clean else (x - alpha * x0) / sigma), x0


class DPMSolver(Multistep):
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), as ODE or SDE, orders 1 to 3."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the order that the history and the end of the grid allow."""
        kind = self.config.algorithm_type
        said, x0 = self.converted(x, pred, i, kind.endswith("++"))
        self.seen = [*self.seen[1 - self.config.solver_order :], said] if self.config.solver_order > 1 else [said]
        drawn = noise() if kind.startswith("sde") else None
        return self._update(x, i, min(self._order(i), len(self.seen)), drawn), x0

    def _order(self, i: int) -> int:
        """Lower orders at the end of short grids, which are unstable otherwise."""
        config, left = self.config, len(self.grid.timesteps) - 1 - i
        short = config.lower_order_final and len(self.grid.timesteps) < 15
        if left == 0 and (config.euler_at_final or short or config.final_sigmas_type == "zero"):
            return 1
        return min(config.solver_order, 2) if left == 1 and short else config.solver_order

    def _update(self, x: Tensor, i: int, order: int, noise: Tensor | None) -> Tensor:
        h = self.log_ratio(i + 1) - self.log_ratio(i)
        carry, first, second, third, spread = self._weights(h, i, order)
        new = carry.to(x) * x + first.to(x) * self.seen[-1]
        slopes = self._slopes(h, i, order)
        for weight, slope in zip((second, third), slopes, strict=False):
            new = new + weight.to(x) * slope
        return new if noise is None else new + spread.to(x) * noise

    def _weights(self, h: Tensor, i: int, order: int) -> tuple[Tensor, ...]:
        """Of x, of the last prediction, of its first and second difference, and of the noise."""
        (alpha_s, sigma_s), (alpha, sigma) = self.level(i), self.level(i + 1)
        midpoint = order == 2 and self.config.solver_type == "midpoint"
        kind = self.config.algorithm_type
        double = 2.0 if kind.startswith("sde") else 1.0
        if kind.endswith("++"):
            carry = sigma / sigma_s * (torch.exp(-h) if double == 2 else 1)
            grown = -torch.expm1(-double * h)  # 1 - exp(-h), or with 2 h
            first = alpha * grown
            second = first / 2 if midpoint else alpha * (1 - grown / (double * h))
            sign = 1.5 - double  # the reference implementation has -1/2 for the SDE
            third = alpha * ((grown - double * h) / (double * h) ** 2 + sign)
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


class EDM(DPMSolver):
    """DPM-Solver++ over x with all of its signal, in the preconditioning of Karras et al. 2022, table 1."""

    def level(self, i: int) -> Pair:
        """All of the signal."""
        return torch.tensor(1.0), self.grid.sigmas[i]  # type: ignore[index]

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance, for data of the standard deviation sigma_data."""
        return x / (self.level(i)[1] ** 2 + self.config.sigma_data**2).sqrt().to(x)

    def converted(self, x: Tensor, pred: Tensor, i: int, as_clean: bool) -> tuple[Tensor, Tensor]:
        """The clean sample: a share of x, and what the network says of the rest."""
        sigma, data = self.level(i)[1], self.config.sigma_data
        size = (sigma**2 + data**2).sqrt()
        sign = -1.0 if self.config.prediction_type == "v_prediction" else 1.0
        x0 = (data / size).to(x) ** 2 * x + (sign * sigma * data / size).to(x) * pred
        x0 = limited(self.config, x0)
        return x0, x0


class UniPC(Multistep):
    """Zhao et al. 2023: a predictor, and a corrector that reuses the next evaluation."""

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.before: Tensor | None = None  # x that the last step began with
        self.order = 1

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Correct the last step with what the network says now, then predict the next."""
        config = self.config
        said, x0 = self.converted(x, pred, i, config.predict_x0)
        if self.before is not None and i - 1 not in config.disable_corrector:
            x = self._update(self.before, i - 1, self.order, said)
        self.seen = [*self.seen, said][-config.solver_order :]
        left = len(self.grid.timesteps) - i if config.lower_order_final else config.solver_order
        self.order, self.before = min(config.solver_order, left, len(self.seen)), x
        return self._update(x, i, self.order, None), x0

    def _update(self, x: Tensor, i: int, order: int, said: Tensor | None) -> Tensor:
        """From index i to i + 1; with what the network says there, the corrector."""
        h = self.log_ratio(i + 1) - self.log_ratio(i)
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
