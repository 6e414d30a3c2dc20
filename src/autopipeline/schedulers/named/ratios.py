"""More schedulers on levels of noise: single steps, the way up, exponential integrators and SDE solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import BETAS, CURVES, FLOWS, SHIFTS, THRESHOLD
from autopipeline.schedulers.named.multistep import (
    LEARNED,
    SOLVER,
    SPACING,
    DPMSolverMultistepScheduler,
    OnLogRatios,
)
from autopipeline.schedulers.solvers import adams, multistep


class DPMSolverSinglestepScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++ as published: steps of one evaluation make up one of `solver_order`.

    Lu et al. 2022a, algorithms 1 and 2; Lu et al. 2022b, algorithm 1.
    """

    defaults = (
        SOLVER | dict(lower_order_final=False) | CURVES | FLOWS | dict(final_sigmas_type="zero") | LEARNED | SHIFTS
    )
    solver_class = multistep.Singlestep
    algorithms = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")

    def check(self) -> None:
        """Orders that there are."""
        super().check()
        if self.config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order={self.config.solver_order} has to be 1, 2 or 3.")

    def _spaced(self, steps: int, last: int) -> Array:
        return np.linspace(0, last - 1, steps + 1)[:0:-1]

    def _rounds(self, name: str) -> bool:
        return name == "karras"


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver walked from the picture to noise, as in inversion for editing (Mokady et al. 2023)."""

    defaults = SOLVER | dict(euler_at_final=False) | CURVES | FLOWS | LEARNED | SPACING
    takes = ()

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

    def _rounds(self, name: str) -> bool:
        return name == "karras"

    def _flow_levels(self, count: int, sigmas: Sequence[float] | None, shift: float, training: Array) -> Array:
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
    solver_class = adams.DEIS

    def _configure(self, given: Any) -> None:
        own = {"algorithm_type": "deis"} if given.get("algorithm_type") in ("dpmsolver", "dpmsolver++") else {}
        others = ("midpoint", "heun", "bh1", "bh2")
        own |= {"solver_type": "logrho"} if given.get("solver_type") in others else {}
        super()._configure(dict(given) | own)

    def check(self) -> None:
        """The one kind that there is, in orders 1 to 3."""
        super().check()
        for key, able in {"algorithm_type": ("deis",), "solver_type": ("logrho",), "solver_order": (1, 2, 3)}.items():
            if self.config[key] not in able:
                raise ValueError(f"{key}={self.config[key]!r} has to be {' or '.join(map(repr, able))}.")


class SASolverScheduler(OnLogRatios):
    """SA-Solver (Xue et al. 2023): stochastic Adams methods.

    `tau_func` says how much noise there is on the way at a timestep; without it, 1 from 200 to 800 and 0 elsewhere.
    """

    defaults = (
        BETAS
        | dict(predictor_order=2, corrector_order=2, prediction_type="epsilon", tau_func=None)
        | THRESHOLD
        | dict(sample_max_value=1.0, algorithm_type="data_prediction", lower_order_final=True)
        | CURVES
        | FLOWS
        | LEARNED
        | SPACING
    )
    solver_class = adams.SASolver

    def check(self) -> None:
        """Known kinds, in orders 1 to 4."""
        super().check()
        if self.config.algorithm_type not in ("data_prediction", "noise_prediction"):
            raise ValueError("algorithm_type has to be 'data_prediction' or 'noise_prediction'.")
        for key in ("predictor_order", "corrector_order"):
            if self.config[key] not in (1, 2, 3, 4):
                raise ValueError(f"{key}={self.config[key]!r} has to be 1, 2, 3 or 4.")
        if self.config.tau_func is not None and not callable(self.config.tau_func):
            raise ValueError(f"tau_func={self.config.tau_func!r} has to be a function of the timestep.")
        if self.config.algorithm_type == "noise_prediction":
            self.check_flow("algorithm_type", "noise_prediction")
