"""Schedulers on levels of noise that remember what the network said; x keeps unit variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import BETAS, CURVES, FLOWS, SHIFTS, THRESHOLD
from autopipeline.schedulers.scheduler import Grid, Scheduler, Solver
from autopipeline.schedulers.solvers import multistep


class OnLogRatios(Scheduler):
    """Times are levels of noise, told to the network as whole steps of training.

    x keeps unit variance, or, with `use_flow_sigmas`, is (1 - sigma) clean + sigma noise (Lipman et al. 2023).
    """

    shifts = ("exponential",)  # kinds of `time_shift_type`
    flow_curves: tuple[str, ...] = ()  # those that can be turned into levels of flows

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        mu: float | None = None,
        **extra: Any,
    ) -> Grid:
        """Evenly spaced with the end left out, or along a curve over all of training, or own ones."""
        config = self.own
        product = grids.alphas_cumprod(config, floor=2**-24)
        training, last = grids.ratio(product), self._last(product)
        name, shift = grids.curve_of(config), self._shift(mu)
        count = steps or len(timesteps or sigmas or ())
        if config["use_flow_sigmas"]:
            levels = self._flow_levels(count, sigmas, shift, training)
            told = levels * len(training)
        elif name:
            levels = grids.curve(name, self.config, *self._ends(training), count)
            told = grids.to_timesteps(levels, training)
            told = told.round() if self._rounds(name) else told
        else:
            told = np.array(timesteps) if timesteps is not None else self._spaced(count, last).round()
            levels = np.interp(told.astype(np.int64), np.arange(len(training)), training)
        told, levels = self._distinct(told, levels)
        plain = name is None and not config["use_flow_sigmas"]
        levels = np.append(levels, self._final(levels, training[:last], plain)).astype(np.float32)
        whole = torch.from_numpy(told.astype(np.int64))
        return Grid(timesteps=whole.to(device), sigmas=torch.from_numpy(levels), steps=len(whole))

    def _last(self, product: torch.Tensor) -> int:
        """How many steps of training have a ratio above `lambda_min_clipped`."""
        logs = (product.sqrt().log() - (1 - product).sqrt().log()).flip(0)
        least = self.own.get("lambda_min_clipped", -math.inf)
        return len(product) - int(torch.searchsorted(logs, float(least)))

    def _spaced(self, steps: int, last: int) -> Array:
        return grids.spaced(self.own, steps, beyond=1, last=last)

    def _ends(self, training: Array) -> tuple[float, float]:
        """Where a curve begins and ends."""
        return training[-1], training[0]

    def _rounds(self, name: str) -> bool:
        return name == "karras"

    def _shift(self, mu: float | None) -> float:
        """The shift of flows: `flow_shift`, or the one that mu (from the size of the picture) stands for."""
        if mu is None:
            return self.config.flow_shift
        if not self.own.get("use_dynamic_shifting"):
            raise ValueError(f"mu={mu} has no effect with {type(self).__name__} unless use_dynamic_shifting is set.")
        return mu if self.config.time_shift_type == "linear" else math.exp(mu)

    def _flow_levels(self, count: int, sigmas: Sequence[float] | None, shift: float, training: Array) -> Array:
        """Evenly spaced from just below 1, then shifted (Esser et al. 2024, eq. 23)."""
        even = 1 - np.linspace(1, 1 / len(training), count + 1)
        return shifted(even[::-1], shift)[:-1]

    def _distinct(self, told: Array, levels: Array) -> tuple[Array, Array]:
        return told, levels

    def _final(self, levels: Array, training: Array, plain: bool) -> float:
        """The level after the last step."""
        if self.own.get("final_sigmas_type") == "zero":
            return 0.0
        return training[0] if plain else levels[-1]

    def _check_timesteps(self, own: list[float]) -> None:
        super()._check_timesteps(own)
        if self.config.use_flow_sigmas:
            raise ValueError("Own timesteps and use_flow_sigmas contradict each other.")

    def check(self) -> None:
        """Flows with what belongs to them."""
        super().check()
        own, kind = self.own, self.config.prediction_type
        name, flows = grids.curve_of(own), own["use_flow_sigmas"]
        if flows and name and name not in self.flow_curves:
            raise ValueError(f"{type(self).__name__} can't use both use_flow_sigmas and the {name} curve.")
        if kind == ("v_prediction" if flows else "flow_prediction"):
            raise ValueError(f"prediction_type={kind!r} contradicts use_flow_sigmas={flows}.")
        if own.get("use_dynamic_shifting") and own["time_shift_type"] not in self.shifts:
            raise ValueError(f"time_shift_type={own['time_shift_type']!r} has to be {' or '.join(self.shifts)}.")

    def check_flow(self, key: str, value: Any) -> None:
        """A flow gives the clean sample, which solvers on noise have no use for."""
        if self.config.prediction_type == "flow_prediction":
            raise ValueError(f"prediction_type='flow_prediction' can't be used with {key}={value!r}.")


def shifted(sigmas: Array, shift: float) -> Array:
    """Levels of flows, moved towards noise (Esser et al. 2024, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def own_solver(given: Any) -> dict[str, str]:
    """The nearest kinds of DPM-Solver for those that configurations of DEIS and UniPC name."""
    own = {"algorithm_type": "dpmsolver++"} if given.get("algorithm_type") == "deis" else {}
    return own | ({"solver_type": "midpoint"} if given.get("solver_type") in ("logrho", "bh1", "bh2") else {})


SOLVER = (
    BETAS
    | dict(solver_order=2, prediction_type="epsilon")
    | THRESHOLD
    | dict(sample_max_value=1.0, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True)
)
LEARNED = dict(lambda_min_clipped=-math.inf, variance_type=None)
SPACING = dict(timestep_spacing="linspace", steps_offset=0)


class DPMSolverMultistepScheduler(OnLogRatios):
    """DPM-Solver++ (Lu et al. 2022b) and its relatives."""

    defaults = (
        SOLVER
        | dict(euler_at_final=False)
        | CURVES
        | dict(use_lu_lambdas=False)
        | FLOWS
        | dict(final_sigmas_type="zero")
        | LEARNED
        | SPACING
        | dict(rescale_betas_zero_snr=False)
        | SHIFTS
    )
    solver_class = multistep.DPMSolver
    takes = ("timesteps",)
    algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

    def _configure(self, given: Any) -> None:
        super()._configure(dict(given) | own_solver(given))

    def check(self) -> None:
        """Known algorithms, in combinations that don't divide by zero."""
        super().check()
        kind, end = self.config.algorithm_type, self.own.get("final_sigmas_type")
        if kind not in self.algorithms:
            raise ValueError(f"algorithm_type={kind!r} has to be {', '.join(self.algorithms)}.")
        if self.config.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type={self.config.solver_type!r} has to be 'midpoint' or 'heun'.")
        if not kind.endswith("++") and end == "zero":
            raise ValueError(f"algorithm_type={kind!r} needs final_sigmas_type='sigma_min', not 'zero'.")
        if kind == "sde-dpmsolver" and self.config.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no third order.")
        if not kind.endswith("++"):
            self.check_flow("algorithm_type", kind)

    def _rounds(self, name: str) -> bool:
        return name in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"

    def _final(self, levels: Array, training: Array, plain: bool) -> float:
        return super()._final(levels, training, plain=True)


class UniPCMultistepScheduler(OnLogRatios):
    """UniPC (Zhao et al. 2023); `solver_p` is a scheduler that predicts in the place of UniP."""

    defaults = (
        BETAS
        | dict(solver_order=2, prediction_type="epsilon")
        | THRESHOLD
        | dict(
            sample_max_value=1.0,
            predict_x0=True,
            solver_type="bh2",
            lower_order_final=True,
            disable_corrector=(),
            solver_p=None,
        )
        | CURVES
        | FLOWS
        | SPACING
        | dict(final_sigmas_type="zero", rescale_betas_zero_snr=False)
        | SHIFTS
        | dict(sigma_min=None, sigma_max=None, shift_terminal=None)
    )
    solver_class = multistep.UniPC
    takes = ("sigmas",)
    shifts = ("exponential", "linear")
    flow_curves = ("karras",)

    def _configure(self, given: Any) -> None:
        kind = given.get("solver_type")
        super()._configure(dict(given) | ({"solver_type": "bh2"} if kind in ("midpoint", "heun", "logrho") else {}))

    def check(self) -> None:
        """Known kinds, in combinations that don't divide by zero."""
        super().check()
        config = self.config
        if config.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type={config.solver_type!r} has to be 'bh1' or 'bh2'.")
        if config.solver_p is not None and not isinstance(config.solver_p, Scheduler):
            raise ValueError(f"solver_p has to be a scheduler, not {config.solver_p!r}.")
        unstable = config.solver_type == "bh1" or not config.predict_x0
        if unstable and config.final_sigmas_type == "zero":
            raise ValueError("solver_type='bh1' and predict_x0=False need final_sigmas_type='sigma_min', not 'zero'.")
        if config.shift_terminal is not None and not config.use_flow_sigmas:
            raise ValueError("shift_terminal needs use_flow_sigmas=True.")
        if not config.predict_x0:
            self.check_flow("predict_x0", False)

    def solver(self, grid: Grid, **options: Any) -> Solver:
        """A solver for one run; a configuration on the way to another class need not have one."""
        ends_high = self.config.solver_order > 1 and not self.config.lower_order_final
        if ends_high and self.config.final_sigmas_type == "zero":
            raise ValueError("lower_order_final=False needs final_sigmas_type='sigma_min', not 'zero'.")
        return super().solver(grid, **options)

    def _check_sigmas(self, own: list[float]) -> None:
        if not self.config.use_flow_sigmas:
            raise ValueError(f"{type(self).__name__} takes no own sigmas without use_flow_sigmas.")
        if grids.curve_of(self.own):
            raise ValueError("Own sigmas and a curve of sigmas contradict each other.")
        if not own or own != sorted(set(own), reverse=True) or not 0 < own[-1] <= own[0] <= 1:
            raise ValueError("Own sigmas of a flow have to be in descending order, at most 1 and above 0.")

    def _shift(self, mu: float | None) -> float:
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting needs mu, which stands for the size of the picture.")
        return super()._shift(mu)

    def _flow_levels(self, count: int, sigmas: Sequence[float] | None, shift: float, training: Array) -> Array:
        """Evenly spaced from 1, or own ones; shifted, and stretched to end at `shift_terminal`."""
        if name := grids.curve_of(self.own):
            levels = grids.curve(name, self.config, *self._ends(training), count)
            return levels / (levels + 1)
        even = np.linspace(1, 1 / len(training), count + 1)[:-1] if sigmas is None else np.array(sigmas)
        levels = shifted(even, shift)
        if end := self.config.shift_terminal:
            if levels[-1] == 1:
                raise ValueError("shift_terminal needs two steps or more.")
            levels = 1 - (1 - levels) * (1 - end) / (1 - levels[-1])
        # without any signal there is no ratio of signal to noise
        return np.where(np.arange(count) > 0, levels, np.where(abs(levels - 1) < 1e-6, levels - 1e-6, levels))
