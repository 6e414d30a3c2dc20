"""Schedulers on levels of noise whose solvers go by the logarithm of signal over noise; x keeps unit variance."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.config import falling
from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array, shifted, stretched
from autopipeline.schedulers.named.keys import BETAS, CURVES, ENDS, FLOWS, RESCALED, SHIFTS, SPACED, SPACING, THRESHOLD
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Solver, Steps
from autopipeline.schedulers.solvers import multistep


class OnLogRatios(Scheduler):
    """Times are levels of noise, told to the network as whole steps of training.

    x keeps unit variance, or, with `use_flow_sigmas`, is (1 - sigma) clean + sigma noise (Lipman et al. 2023).
    """

    shifts: ClassVar[tuple[str, ...]] = ("exponential",)  # kinds of `time_shift_type`
    needs_mu: ClassVar[bool] = False  # with `use_dynamic_shifting`, where others go on with `flow_shift`
    flow_curves: ClassVar[tuple[str, ...]] = ()  # those that can be turned into levels of flows

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, *, mu: float | None = None, **extra: Any) -> Grid:
        """Evenly spaced with the end left out, or along a curve over all of training, or own ones."""
        own, shift = self.own, self._shift(mu)
        product = grids.alphas_cumprod(own, floor=2**-24)
        training, last = grids.ratio(product), self._last(product)
        name, flows, count = grids.curve_of(own), own.use_flow_sigmas, steps or len(timesteps or sigmas or ())
        if flows:
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
        end = self._final(levels, training[:last], plain=not (name or flows))
        return Grid.of(told, np.append(levels, end), whole=True)

    def _last(self, product: torch.Tensor) -> int:
        """How many steps of training have a ratio above `lambda_min_clipped`."""
        logs = (product.sqrt().log() - (1 - product).sqrt().log()).flip(0)
        return len(product) - int(torch.searchsorted(logs, float(self.own.get("lambda_min_clipped", -math.inf))))

    def _spaced(self, steps: int, last: int) -> Array:
        return grids.spaced(self.own, steps, beyond=1, last=last)

    def _ends(self, training: Array) -> tuple[float, float]:
        """Where a curve begins and ends."""
        return training[-1], training[0]

    def _rounds(self, name: str) -> bool:
        """Whether the times of a curve are rounded before they are cut."""
        return name == "karras"

    def _shift(self, mu: float | None) -> float:
        """The shift of flows: `flow_shift`, or the one that mu (from the size of the picture) stands for."""
        dynamic = self.own.get("use_dynamic_shifting")
        if mu is None:
            if dynamic and self.needs_mu:
                raise ValueError("use_dynamic_shifting needs mu, which stands for the size of the picture.")
            return self.config.flow_shift
        if not dynamic:
            raise ValueError(f"mu={mu} has no effect with {type(self).__name__} unless use_dynamic_shifting is set.")
        return mu if self.config.time_shift_type == "linear" else math.exp(mu)

    def _flow_levels(self, count: int, sigmas: Own, shift: float, training: Array) -> Array:
        """Evenly spaced from just below 1, then shifted (Esser et al. 2024, eq. 23)."""
        return shifted(1 - np.linspace(1, 1 / len(training), count + 1)[::-1], shift)[:-1]

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
        own = self.own
        name, flows, kind = grids.curve_of(own), own.use_flow_sigmas, own.prediction_type
        if flows and name and name not in self.flow_curves:
            raise ValueError(f"{type(self).__name__} can't use both use_flow_sigmas and the {name} curve.")
        if kind == ("v_prediction" if flows else "flow_prediction"):
            raise ValueError(f"prediction_type={kind!r} contradicts use_flow_sigmas={flows}.")
        if own.get("use_dynamic_shifting") and own.time_shift_type not in self.shifts:
            raise ValueError(f"time_shift_type={own.time_shift_type!r} has to be {' or '.join(self.shifts)}.")
        by_noise = own.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver", "noise_prediction")
        if kind == "flow_prediction" and (by_noise or not own.get("predict_x0", True)):
            raise ValueError("prediction_type='flow_prediction' gives clean samples, which solvers on noise can't use.")


SOLVER = (
    BETAS
    | dict(solver_order=2, prediction_type="epsilon", **THRESHOLD)
    | dict(algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True)
)
LEARNED = dict(lambda_min_clipped=-math.inf, variance_type=None)


class DPMSolverMultistepScheduler(OnLogRatios):
    """DPM-Solver++ (Lu et al. 2022b) and its relatives."""

    defaults = SOLVER | dict(
        euler_at_final=False, **CURVES, use_lu_lambdas=False, **FLOWS, **ENDS, **LEARNED, **SPACED, **SHIFTS
    )
    solver_class = multistep.DPMSolver
    takes = ("timesteps",)
    renamed = OnLogRatios.renamed | dict(
        algorithm_type={"deis": "dpmsolver++"}, solver_type=dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")
    )
    choices = OnLogRatios.choices | dict(
        algorithm_type=("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        solver_type=("midpoint", "heun"),
    )

    def check(self) -> None:
        """Known algorithms, in combinations that don't divide by zero."""
        super().check()
        kind, end = self.config.algorithm_type, self.own.get("final_sigmas_type")
        if not kind.endswith("++") and end == "zero":
            raise ValueError(f"algorithm_type={kind!r} needs final_sigmas_type='sigma_min', not 'zero'.")
        if kind == "sde-dpmsolver" and self.config.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no third order.")

    def _rounds(self, name: str) -> bool:
        return name in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"

    def _final(self, levels: Array, training: Array, plain: bool) -> float:
        return super()._final(levels, training, plain=True)


class DPMSolverSinglestepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ as published: steps of one evaluation make up one of `solver_order`.

    Lu et al. 2022a, algorithms 1 and 2; Lu et al. 2022b, algorithm 1.
    """

    defaults = SOLVER | dict(lower_order_final=False) | CURVES | FLOWS | ENDS | LEARNED | SHIFTS
    solver_class = multistep.Singlestep
    _rounds = OnLogRatios._rounds
    choices = DPMSolverMultistepScheduler.choices | dict(
        algorithm_type=("dpmsolver", "dpmsolver++", "sde-dpmsolver++"), solver_order=(1, 2, 3)
    )

    def _spaced(self, steps: int, last: int) -> Array:
        return np.linspace(0, last - 1, steps + 1)[:0:-1]


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver walked from the picture to noise, as in inversion for editing (Mokady et al. 2023)."""

    defaults = SOLVER | dict(euler_at_final=False) | CURVES | FLOWS | LEARNED | SPACING
    takes = ()
    _rounds = OnLogRatios._rounds

    def check(self) -> None:
        """Noise can't be added on a way that is itself the way to noise."""
        super().check()
        if self.config.algorithm_type.startswith("sde"):
            raise ValueError(f"algorithm_type={self.config.algorithm_type!r} can't be walked towards noise.")

    def _spaced(self, steps: int, last: int) -> Array:
        beyond = self.config.timestep_spacing != "trailing"
        return grids.spaced(self.own, steps + beyond, last=last)[::-1][:steps]

    def _ends(self, training: Array) -> tuple[float, float]:
        return training[0], training[-1]

    def _flow_levels(self, count: int, sigmas: Own, shift: float, training: Array) -> Array:
        return super()._flow_levels(count, sigmas, shift, training)[::-1]

    def _distinct(self, told: Array, levels: Array) -> tuple[Array, Array]:
        """Of levels that the network would be told by the same number, the first."""
        first = np.unique(told.astype(np.int64), return_index=True)[1]
        return told[first], levels[first]

    def _final(self, levels: Array, training: Array, plain: bool) -> float:
        return training[-1] if plain else levels[-1]


class DEISMultistepScheduler(OnLogRatios):
    """DEIS (Zhang & Chen 2023), with polynomials in the logarithm of the noise."""

    defaults = SOLVER | dict(algorithm_type="deis", solver_type="logrho") | CURVES | FLOWS | SPACING | SHIFTS
    solver_class = multistep.DEIS
    renamed = OnLogRatios.renamed | dict(
        algorithm_type=dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        solver_type=dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    )
    choices = OnLogRatios.choices | dict(algorithm_type=("deis",), solver_type=("logrho",), solver_order=(1, 2, 3))


class UniPCMultistepScheduler(OnLogRatios):
    """UniPC (Zhao et al. 2023); `solver_p` is a scheduler that predicts in the place of UniP."""

    defaults = (
        BETAS
        | dict(solver_order=2, prediction_type="epsilon", **THRESHOLD, predict_x0=True)
        | dict(solver_type="bh2", lower_order_final=True, disable_corrector=(), solver_p=None, **CURVES, **FLOWS)
        | dict(**SPACING, **ENDS, **RESCALED, **SHIFTS, sigma_min=None, sigma_max=None, shift_terminal=None)
    )
    solver_class = multistep.UniPC
    takes = ("sigmas",)
    shifts = ("exponential", "linear")
    needs_mu = True
    flow_curves = ("karras",)
    renamed = OnLogRatios.renamed | dict(solver_type=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"))
    choices = OnLogRatios.choices | dict(solver_type=("bh1", "bh2"))

    def check(self) -> None:
        """Known kinds, in combinations that don't divide by zero."""
        super().check()
        config = self.config
        if config.solver_p is not None and not isinstance(config.solver_p, Scheduler):
            raise ValueError(f"solver_p has to be a scheduler, not {config.solver_p!r}.")
        unstable = config.solver_type == "bh1" or not config.predict_x0
        if unstable and config.final_sigmas_type == "zero":
            raise ValueError("solver_type='bh1' and predict_x0=False need final_sigmas_type='sigma_min', not 'zero'.")
        if config.shift_terminal is not None and not config.use_flow_sigmas:
            raise ValueError("shift_terminal needs use_flow_sigmas=True.")

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
        if not falling(own, 0, 1) or own[-1] == 0:
            raise ValueError("Own sigmas of a flow have to be in descending order, at most 1 and above 0.")

    def _flow_levels(self, count: int, sigmas: Own, shift: float, training: Array) -> Array:
        """Evenly spaced from 1, or own ones; shifted, and stretched to end at `shift_terminal`."""
        if name := grids.curve_of(self.own):
            levels = grids.curve(name, self.config, *self._ends(training), count)
            return levels / (levels + 1)
        even = np.linspace(1, 1 / len(training), count + 1)[:-1] if sigmas is None else np.array(sigmas)
        levels = stretched(shifted(even, shift), self.config.shift_terminal)
        # without any signal there is no ratio of signal to noise
        return np.where(np.arange(count) > 0, levels, np.where(abs(levels - 1) < 1e-6, levels - 1e-6, levels))


class SASolverScheduler(OnLogRatios):
    """SA-Solver (Xue et al. 2023): stochastic Adams methods.

    `tau_func` says how much noise there is on the way at a timestep; without it, 1 from 200 to 800 and 0 elsewhere.
    """

    defaults = (
        BETAS
        | dict(predictor_order=2, corrector_order=2, prediction_type="epsilon", tau_func=None, **THRESHOLD)
        | dict(algorithm_type="data_prediction", lower_order_final=True, **CURVES, **FLOWS, **LEARNED, **SPACING)
    )
    solver_class = multistep.SASolver
    choices = OnLogRatios.choices | dict(
        algorithm_type=("data_prediction", "noise_prediction"),
        predictor_order=(1, 2, 3, 4),
        corrector_order=(1, 2, 3, 4),
    )

    def check(self) -> None:
        """A function of the timestep, if any."""
        super().check()
        if self.config.tau_func is not None and not callable(self.config.tau_func):
            raise ValueError(f"tau_func={self.config.tau_func!r} has to be a function of the timestep.")
