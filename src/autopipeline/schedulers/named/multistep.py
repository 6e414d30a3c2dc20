"""Schedulers on levels of noise that remember what the network said; x keeps unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import BETAS, CURVES, THRESHOLD
from autopipeline.schedulers.scheduler import Grid, Scheduler
from autopipeline.schedulers.solvers import multistep


class _OnLogRatios(Scheduler):
    """Times are levels of noise, told to the network as whole steps of training; x keeps unit variance."""

    rounds_curves: tuple[str, ...] = ()

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Evenly spaced with the end left out, or along a curve over all of training, or own ones."""
        product = grids.alphas_cumprod(self.config, floor=2**-24)
        training = grids.ratio(product)
        least = training[0]
        name = grids.curve_of(self.config)
        if timesteps is not None:
            told = np.array(timesteps).astype(np.int64)
        else:
            told = grids.spaced(self.config, steps or 1, beyond=1, last=self._last(product)).round().astype(np.int64)
        if name:
            levels = grids.curve(name, self.config, training[-1], training[0], len(told))
            told = grids.to_timesteps(levels, training)
            told = told.round() if self._rounds(name) else told
            least = self._least(levels, training)
        else:
            levels = np.interp(told, np.arange(len(training)), training)
        last = least if self.config.final_sigmas_type == "sigma_min" else 0.0
        levels = np.concatenate([levels, [last]]).astype(np.float32)
        whole = torch.from_numpy(told.astype(np.int64))
        return Grid(timesteps=whole.to(device), sigmas=torch.from_numpy(levels), steps=len(whole))

    def _last(self, product: torch.Tensor) -> int:
        return self.config.num_train_timesteps

    def _rounds(self, name: str) -> bool:
        return name == "karras"

    def _least(self, levels: Array, training: Array) -> float:
        return levels[-1]

    def check(self) -> None:
        """Flow sigmas come with the transformer families."""
        super().check()
        if self.config.get("use_flow_sigmas"):
            raise ValueError(f"{type(self).__name__} with use_flow_sigmas is not built in this version.")


def own_solver(given: Any) -> dict[str, str]:
    """The nearest kinds of DPM-Solver for those that configurations of DEIS and UniPC name."""
    own = {"algorithm_type": "dpmsolver++"} if given.get("algorithm_type") == "deis" else {}
    return own | ({"solver_type": "midpoint"} if given.get("solver_type") in ("logrho", "bh1", "bh2") else {})


class DPMSolverMultistepScheduler(_OnLogRatios):
    """DPM-Solver++ (Lu et al. 2022b) and its relatives."""

    defaults = (
        BETAS
        | dict(solver_order=2, prediction_type="epsilon")
        | THRESHOLD
        | dict(
            sample_max_value=1.0,
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            lower_order_final=True,
            euler_at_final=False,
        )
        | CURVES
        | dict(
            use_lu_lambdas=False,
            use_flow_sigmas=False,
            flow_shift=1.0,
            final_sigmas_type="zero",
            lambda_min_clipped=-float("inf"),
            variance_type=None,
            timestep_spacing="linspace",
            steps_offset=0,
            rescale_betas_zero_snr=False,
            use_dynamic_shifting=False,
            time_shift_type="exponential",
        )
    )
    solver_class = multistep.DPMSolver
    takes = ("timesteps",)

    def _configure(self, given: Any) -> None:
        super()._configure(dict(given) | own_solver(given))

    def check(self) -> None:
        """Known algorithms, in combinations that don't divide by zero."""
        super().check()
        kind, end = self.config.algorithm_type, self.config.final_sigmas_type
        if kind not in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"):
            raise ValueError(f"algorithm_type={kind!r} is not known.")
        if self.config.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type={self.config.solver_type!r} has to be 'midpoint' or 'heun'.")
        if not kind.endswith("++") and end == "zero":
            raise ValueError(f"algorithm_type={kind!r} needs final_sigmas_type='sigma_min', not 'zero'.")
        if kind == "sde-dpmsolver" and self.config.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no third order.")

    def _last(self, product: torch.Tensor) -> int:
        logs = (product.sqrt().log() - (1 - product).sqrt().log()).flip(0)
        return self.config.num_train_timesteps - int(torch.searchsorted(logs, self.config.lambda_min_clipped))

    def _rounds(self, name: str) -> bool:
        return name in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"

    def _least(self, levels: Array, training: Array) -> float:
        return training[0]


class UniPCMultistepScheduler(_OnLogRatios):
    """UniPC (Zhao et al. 2023)."""

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
        | dict(
            use_flow_sigmas=False,
            flow_shift=1.0,
            timestep_spacing="linspace",
            steps_offset=0,
            final_sigmas_type="zero",
            rescale_betas_zero_snr=False,
            use_dynamic_shifting=False,
            time_shift_type="exponential",
            sigma_min=None,
            sigma_max=None,
            shift_terminal=None,
        )
    )
    solver_class = multistep.UniPC

    def _configure(self, given: Any) -> None:
        kind = given.get("solver_type")
        super()._configure(dict(given) | ({"solver_type": "bh2"} if kind in ("midpoint", "heun", "logrho") else {}))

    def check(self) -> None:
        """Known kinds, in combinations that don't divide by zero."""
        super().check()
        if self.config.solver_type not in ("bh1", "bh2"):
            raise ValueError(f"solver_type={self.config.solver_type!r} has to be 'bh1' or 'bh2'.")
        if self.config.solver_p is not None:
            raise ValueError("UniPCMultistepScheduler with another predictor (solver_p) is not supported.")
        unstable = self.config.solver_type == "bh1" or not self.config.predict_x0
        if unstable and self.config.final_sigmas_type == "zero":
            raise ValueError("solver_type='bh1' and predict_x0=False need final_sigmas_type='sigma_min', not 'zero'.")
        ends_high = self.config.solver_order > 1 and not self.config.lower_order_final
        if ends_high and self.config.final_sigmas_type == "zero":
            raise ValueError("lower_order_final=False needs final_sigmas_type='sigma_min', not 'zero'.")
