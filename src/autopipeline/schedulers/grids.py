"""Noise grids: how much noise there is at each training step, and which of the steps are taken.

Spacings: Lin et al. 2023, table 2. Curves: Karras et al. 2022, eq. 5; Lu et al. 2022b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autopipeline.quadrature import Array, beta_quantile

Config = Mapping[str, Any]


def betas(config: Config) -> Tensor:
    """Variance added at each training step, (T,)."""
    count, kind = config["num_train_timesteps"], config["beta_schedule"]
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    low, high = config.get("beta_start", 0.0), config.get("beta_end", 1.0)  # some schedules have none
    if kind == "linear":
        return torch.linspace(low, high, count)
    if kind == "scaled_linear":
        exact = torch.float64 if "snr_shift_scale" in config else torch.float32  # the last signal is next to nothing
        return torch.linspace(low**0.5, high**0.5, count, dtype=exact) ** 2
    if kind == "sigmoid":
        return torch.linspace(-6, 6, count).sigmoid() * (high - low) + low
    bars: dict[str, Callable[[float], float]] = {
        "squaredcos_cap_v2": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
        "exp": lambda u: math.exp(u * -12.0),
    }
    level = [bars[kind](k / count) for k in range(count + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(level)])


def alphas_cumprod(config: Config, floor: float | None = None) -> Tensor:
    """Share of signal (squared) left after each training step, (T,).

    With `snr_shift_scale`, signal over noise is divided by that (Zheng et al. 2024).
    With `rescale_betas_zero_snr` the last step is noise alone (Lin et al. 2023, algorithm 1); `floor` keeps it from
    being exactly that where a solver divides by it.
    """
    product = (1 - betas(config)).cumprod(0)
    scale = config.get("snr_shift_scale", 1.0)
    product = product if scale == 1 else product / (scale + (1 - scale) * product)
    if not config.get("rescale_betas_zero_snr"):
        return product
    root = product.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    squares = root**2
    ratios = torch.cat([squares[:1], squares[1:] / squares[:-1]])
    product = (1 - (1 - ratios)).cumprod(0)
    if floor is not None:
        product[-1] = floor
    return product


def ratio(product: Tensor) -> Array:
    """Noise over signal at each training step, rising, (T,)."""
    return (((1 - product) / product) ** 0.5).numpy()


def spaced(config: Config, steps: int, *, beyond: int = 0, last: int | None = None) -> Array:
    """Training steps to take, falling, as floats; `beyond` leaves out that many at the end of a longer grid."""
    total: int = config["num_train_timesteps"]
    last = last or total
    spacing = config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + beyond)[::-1][:steps].copy()
    if spacing == "leading":
        stride = last // (steps + beyond)
        return np.arange(steps + beyond)[::-1][:steps] * float(stride) + config["steps_offset"]
    if spacing == "trailing":
        return np.arange(last, 0, -total / steps).round() - 1
    raise ValueError(f"timestep_spacing={spacing!r} has to be 'linspace', 'leading' or 'trailing'.")


def curve_of(config: Config) -> str | None:
    """The curve that replaces the sigmas of the spacing, if any."""
    keys = {"karras": "use_karras_sigmas", "lu": "use_lu_lambdas"}
    keys |= {"exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
    return next((name for name, key in keys.items() if config.get(key)), None)


def curve(name: str, config: Config, high: float, low: float, steps: int, rho: float = 7.0) -> Array:
    """Sigmas from high to low along a named curve."""
    if name != "lu":
        high, low = config.get("sigma_max") or high, config.get("sigma_min") or low
    high, low = float(high), float(low)
    ramp = np.linspace(0, 1, steps)
    if name == "karras":
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if name in ("exponential", "lu"):
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return low + beta_quantile(1 - ramp) * (high - low)


def twice(points: Array, looks: Array | None = None) -> Array:
    """Beginnings of steps and second looks in turn; looks at the ends of the steps, unless they are given."""
    return np.stack([points[:-1], points[1:] if looks is None else looks], 1).reshape(-1)


def to_timesteps(sigmas: Array, training: Array) -> Array:
    """Where each sigma stands among the sigmas of training, interpolated in the logarithm."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(training), np.arange(len(training)))


def shifted(sigmas: Any, shift: float) -> Any:
    """Esser et al. 2024, eq. 23: more of the steps where there is much noise, as larger pictures need."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: Array, last: float | None) -> Array:
    """Levels of flows, stretched so that the last one is `shift_terminal`, if any."""
    if last and sigmas[-1] >= 1:
        raise ValueError("shift_terminal has no effect on a grid that ends with noise alone; use more steps.")
    return 1 - (1 - sigmas) * (1 - last) / (1 - sigmas[-1]) if last else sigmas
