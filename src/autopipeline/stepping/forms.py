"""What single published classes have beside `set_timesteps` and `step`: steps of their own kinds, and figures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from autopipeline.stepping.stateful import Output, Stateful, drawn

if TYPE_CHECKING:
    from autopipeline.schedulers.scheduler import Solver


class RowByRow(Stateful):
    """For parallel sampling (Shih et al. 2023), where the rows of a batch stand at times of their own."""

    row_solver: ClassVar[type[Any] | None] = None  # where it is another than that of a whole walk

    def batch_step_no_noise(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, eta: float = 0.0, *, steps: int | None = None
    ) -> Tensor:
        """Each row's step from its own time, in a walk of a number of `steps`, without the noise."""
        if eta:
            raise ValueError(f"eta={eta} has to be 0 without noise.")
        grid = self.grid_at(timesteps, int(steps or self.num_inference_steps or self.config["num_train_timesteps"]))
        solver = self.row_solver(self, grid) if self.row_solver else self.solver(grid)
        halves = model_output.chunk(2, 1) if model_output.shape[1] == 2 * sample.shape[1] else (model_output, None)
        rows: list[Tensor] = []
        for i in range(len(sample)):
            x, said, variance = (None if whole is None else whole[i : i + 1] for whole in (sample, *halves))
            rows.append(solver.step(x, said, i, partial(torch.zeros_like, x), variance).x)  # type: ignore[arg-type]
        return torch.cat(rows)


class UnCLIP(Stateful):
    """UnCLIP's variance can be asked for."""

    def _get_variance(
        self, timestep: int, prev_timestep: int | None = None, predicted_variance: Any = None, variance_type: Any = None
    ) -> Any:
        """Of the noise of a step: its root, or with a prediction of it in -1..1 its logarithm."""
        solver: Any = self.solver(self.grid_at(torch.tensor([timestep]), 1))
        after = timestep - 1 if prev_timestep is None else prev_timestep
        kind = variance_type or self.config.variance_type
        made = solver.deviation(timestep, after, predicted_variance, kind)
        return made if kind == "fixed_small_log" else 2 * made.log()


class _Compound(Protocol):
    """PNDM's solver."""

    times: list[int]
    said: list[Tensor]
    start: int
    count: int


class PNDM(Stateful):
    """PNDM's Runge-Kutta start and what follows can be stepped apart."""

    pndm_order = 4

    @property
    def _pndm(self) -> _Compound:
        return self.walk.solver  # type: ignore[return-value]

    def locate(self, timestep: Any) -> tuple[Solver, int]:
        """At the time it is told; what was said before counts."""
        self._pndm.times.append(int(timestep))
        return self.walk.solver, len(self._pndm.times) - 1

    @property
    def prk_timesteps(self) -> Tensor:
        """Times of the Runge-Kutta start."""
        return self.timesteps[: 0 if self.config.skip_prk_steps else 12]

    @property
    def plms_timesteps(self) -> Tensor:
        """Times of the linear multistep method."""
        return self.timesteps[len(self.prk_timesteps) :]

    def step_prk(self, *args: Any, **keywords: Any) -> Any:
        """A step of the Runge-Kutta start, whatever was before."""
        return self._step_as(12, *args, **keywords)

    def step_plms(self, *args: Any, **keywords: Any) -> Any:
        """A step of the linear multistep method; the start has to be over."""
        if not self.config.skip_prk_steps and not self.ets:
            raise ValueError("PNDMScheduler with Runge-Kutta steps begins with step_prk.")
        return self._step_as(0, *args, **keywords)

    def _step_as(self, start: int, *args: Any, **keywords: Any) -> Any:
        solver, usual = self._pndm, self._pndm.start
        solver.start = solver.count + start
        result = self.step(*args, **keywords)
        solver.start = usual
        return result

    @property
    def ets(self) -> list[Tensor]:
        """What the network said in the last steps."""
        return self._pndm.said

    @ets.setter
    def ets(self, seen: list[Tensor]) -> None:
        self._pndm.said = seen


class IPNDM(Stateful):
    """IPNDM's figures of training are shares of noise."""

    @property
    def betas(self) -> Tensor:
        """Shares of noise."""
        own = self.config.trained_betas
        return self.sigmas if own is None else torch.tensor(own, dtype=torch.float32)


class ScoreSdeVe(Stateful):
    """ScoreSdeVe's two kinds of step; levels go by evaluations, times by steps."""

    kept: Tensor | None = None

    @property
    def timesteps(self) -> Tensor:  # type: ignore[override]
        """The times of the walk, one for each step."""
        return self.walk.grid.levels

    @property
    def sigmas(self) -> Tensor:  # type: ignore[override]
        """The levels of the walk, one for each step, or those of `set_sigmas`."""
        return self._levels if self.kept is None else self.kept

    @property
    def _levels(self) -> Tensor:
        return self.walk.grid.timesteps[:: self.config.correct_steps + 1]

    def set_sigmas(self, num_inference_steps: int) -> None:
        """Keep the levels of the times that are set (all of training, if none are), and set times."""
        self.kept = self._levels
        self.set_timesteps(num_inference_steps=num_inference_steps)

    def step_pred(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """The predictor's step from a time."""
        time, noise = torch.as_tensor(timestep).flatten()[0].float(), partial(drawn, sample, generator)
        return self._said(self.walk.solver.predict(sample, model_output, time, noise), return_dict)  # type: ignore[attr-defined]

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        """One correction."""
        noise = partial(drawn, sample, generator)
        return self._said(self.walk.solver.correct(sample, model_output, noise), return_dict)  # type: ignore[attr-defined]

    def _said(self, made: tuple[Tensor, Tensor], as_output: bool) -> Any:
        return Output(prev_sample=made[0], prev_sample_mean=made[1]) if as_output else made


class CogVideoXDPM(Stateful):
    """A step that is told what the one before gave."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: Any,
        timestep_back: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        """One step from a time, knowing the time before it and the clean sample that was predicted there."""
        if eta or use_clipped_model_output or variance_noise is not None:
            raise ValueError(
                "eta, use_clipped_model_output and variance_noise have no effect on CogVideoXDPMScheduler."
            )
        told = [float(t) for t in (timestep_back, timestep) if t is not None]
        solver: Any = self.solver(replace(self.walk.grid, timesteps=torch.tensor(told)))
        if old_pred_original_sample is not None and timestep_back is not None:
            solver.said = [old_pred_original_sample.float()]
        made = solver.step(sample, model_output, len(told) - 1, partial(drawn, sample, generator))
        values = dict(prev_sample=made.x, pred_original_sample=made.x0)
        return Output(values) if return_dict else tuple(values.values())
