"""The public schedulers: a grid, a parameterisation and a solver under the names that checkpoints have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.schedulers import grids, solvers
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.scheduler import Grid, Scheduler, Solver

BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995)
CURVES = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)


class _OnTrainingSteps(Scheduler):
    """Times are steps of training."""

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Whole steps, evenly spaced."""
        own = timesteps if timesteps is not None else grids.spaced(self.config, steps or 1).round()
        whole = torch.from_numpy(np.array(own).astype(np.int64))
        return Grid(timesteps=whole.to(device), steps=steps or len(whole))


class DDIMScheduler(_OnTrainingSteps):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    defaults = (
        BETAS
        | dict(clip_sample=True, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon")
        | THRESHOLD
        | dict(clip_sample_range=1.0, sample_max_value=1.0, timestep_spacing="leading", rescale_betas_zero_snr=False)
    )
    takes_eta = True

    def solver(self, grid: Grid, *, eta: float = 0.0) -> Solver:
        """A solver for one run; eta in 0..1."""
        made = solvers.DDIM(self, grid)
        made.eta = eta
        return made


class DDPMScheduler(_OnTrainingSteps):
    """Denoising diffusion probabilistic models (Ho et al. 2020)."""

    defaults = (
        BETAS
        | dict(variance_type="fixed_small", clip_sample=True, prediction_type="epsilon")
        | THRESHOLD
        | dict(
            clip_sample_range=1.0,
            sample_max_value=1.0,
            timestep_spacing="leading",
            steps_offset=0,
            rescale_betas_zero_snr=False,
        )
    )
    solver_class = solvers.DDPM
    takes = ("timesteps",)


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods (Liu et al. 2022)."""

    defaults = BETAS | dict(
        skip_prk_steps=False,
        set_alpha_to_one=False,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
    )
    solver_class = solvers.PNDM

    def check(self) -> None:
        """Only predictions of noise or velocity."""
        super().check()
        if self.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"PNDMScheduler can't take prediction_type={self.config.prediction_type!r}.")

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """The second time is done twice; with a Runge-Kutta start, the first three steps take four evaluations."""
        steps = steps or 1
        rising = grids.spaced(self.config, steps).round()[::-1]
        if self.config.skip_prk_steps:
            falling = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        else:
            if steps < 4:
                raise ValueError("PNDMScheduler with Runge-Kutta steps needs at least 4 steps.")
            half = self.config.num_train_timesteps // steps // 2
            pairs = np.stack([rising[-4:], rising[-4:] + half], 1).reshape(-1)
            start = pairs[:-1].repeat(2)[1:-1][::-1]
            falling = np.concatenate([start, rising[:-3][::-1]])
        return Grid(timesteps=torch.from_numpy(falling.astype(np.int64).copy()).to(device), steps=steps)


class LCMScheduler(Scheduler):
    """Latent consistency models (Luo et al. 2023): a few of the steps that the model was distilled on."""

    defaults = (
        BETAS
        | dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            original_inference_steps=50,
            clip_sample=False,
            clip_sample_range=1.0,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type="epsilon",
        )
        | THRESHOLD
        | dict(sample_max_value=1.0, timestep_spacing="leading", timestep_scaling=10.0, rescale_betas_zero_snr=False)
    )
    solver_class = solvers.LCM
    takes = ("timesteps",)

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        **extra: Any,
    ) -> Grid:
        """`original_inference_steps`: of the distillation; `strength`: the share of them to choose from."""
        total = self.config.num_train_timesteps
        original = original_inference_steps or self.config.original_inference_steps
        if original > total:
            raise ValueError(f"original_inference_steps={original} has to be at most {total}.")
        if timesteps is not None:
            kept = max(len(timesteps) - min(int(len(timesteps) * strength), len(timesteps)), 0)
            falling = np.array(list(timesteps)[kept:])
        else:
            distilled = np.arange(1, int(original * strength) + 1)[::-1] * (total // original) - 1
            if not 1 <= (steps or 1) <= len(distilled):
                raise ValueError(
                    f"num_inference_steps={steps} has to be at most {len(distilled)}: "
                    f"original_inference_steps={original} times strength={strength}."
                )
            chosen = np.floor(np.linspace(0, len(distilled), steps or 1, endpoint=False)).astype(np.int64)
            falling = distilled[chosen]
        return Grid(timesteps=torch.from_numpy(falling.astype(np.int64)).to(device), steps=len(falling))


class _OnSigmas(Scheduler):
    """Times are levels of noise, told to the network as fractional steps of training; x is not scaled."""

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Evenly spaced, or along a curve, or own ones."""
        product = grids.alphas_cumprod(self.config, floor=2**-24)
        training = grids.ratio(product)
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float32)
            told = grids.to_timesteps(levels[:-1], training)
        else:
            told = np.array(timesteps, dtype=np.float32) if timesteps is not None else self._spaced(steps or 1)
            levels = np.interp(told, np.arange(len(training)), training)
            if self.config.get("interpolation_type") == "log_linear":
                levels = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), len(told) + 1))
            name = grids.curve_of(self.config)
            if name:
                levels = grids.curve(name, self.config, levels[0], levels[-1], len(told))
                told = grids.to_timesteps(levels, training)
            last = training[0] if self.config.get("final_sigmas_type") == "sigma_min" else 0.0
            levels = np.concatenate([levels, [last]])
        return self._grid(torch.from_numpy(levels.astype(np.float32)), told, steps, device)

    def _spaced(self, steps: int) -> Array:
        return grids.spaced(self.config, steps).astype(np.float32)

    def _grid(self, levels: torch.Tensor, told: Array, steps: int | None, device: Any) -> Grid:
        most = float(levels.max())
        scaled = self.config.timestep_spacing in ("linspace", "trailing")
        if self.config.get("timestep_type") == "continuous" and self.config.prediction_type == "v_prediction":
            times = 0.25 * levels[:-1].log()
        else:
            times = torch.from_numpy(told.astype(np.float32))
        return Grid(
            timesteps=times.to(device),
            sigmas=levels,
            steps=steps or len(told),
            init_noise_sigma=most if scaled else (most**2 + 1) ** 0.5,
        )


class EulerDiscreteScheduler(_OnSigmas):
    """Euler's method (Karras et al. 2022)."""

    defaults = (
        BETAS
        | dict(prediction_type="epsilon", interpolation_type="linear")
        | CURVES
        | dict(
            sigma_min=None,
            sigma_max=None,
            timestep_spacing="linspace",
            timestep_type="discrete",
            steps_offset=0,
            rescale_betas_zero_snr=False,
            final_sigmas_type="zero",
        )
    )
    solver_class = solvers.Euler
    takes = ("timesteps", "sigmas")

    def _check_timesteps(self, own: list[float]) -> None:
        super()._check_timesteps(own)
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            raise ValueError("Own timesteps are steps of training, which timestep_type='continuous' does not have.")


class EulerAncestralDiscreteScheduler(_OnSigmas):
    """Euler's method with fresh noise in every step."""

    defaults = BETAS | dict(
        prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False
    )
    solver_class = solvers.EulerAncestral


class HeunDiscreteScheduler(_OnSigmas):
    """Heun's method (Karras et al. 2022): two evaluations a step."""

    defaults = (
        BETAS
        | dict(beta_start=0.00085, beta_end=0.012, prediction_type="epsilon")
        | CURVES
        | dict(clip_sample=False, clip_sample_range=1.0, timestep_spacing="linspace", steps_offset=0)
    )
    solver_class = solvers.Heun
    order = 2
    takes = ("timesteps",)

    def _grid(self, levels: torch.Tensor, told: Array, steps: int | None, device: Any) -> Grid:
        twice = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        return super()._grid(twice, np.concatenate([told[:1], told[1:].repeat(2)]), steps or len(told), device)


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


def _own_solver(given: Any) -> dict[str, str]:
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
    solver_class = solvers.DPMSolver
    takes = ("timesteps",)

    def _configure(self, given: Any) -> None:
        super()._configure(dict(given) | _own_solver(given))

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


class EDMDPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        sigma_schedule="karras",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        rho=7.0,
        solver_order=2,
        thresholding=False,
        dynamic_thresholding_ratio=0.995,
        sample_max_value=1.0,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        final_sigmas_type="zero",
    )
    solver_class = solvers.EDM

    def _configure(self, given: Any) -> None:
        super()._configure(dict(given) | _own_solver(given))

    def check(self) -> None:
        """Known algorithms, curves and predictions."""
        super().check()
        able = {
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "sigma_schedule": ("karras", "exponential"),
            "prediction_type": ("epsilon", "v_prediction"),
            "final_sigmas_type": ("zero", "sigma_min"),
        }
        for name, values in able.items():
            if self.config[name] not in values:
                raise ValueError(f"{name}={self.config[name]!r} has to be {' or '.join(map(repr, values))}.")

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Sigmas along the curve; the network is told a quarter of their logarithm."""
        config, count = self.config, steps or 1
        levels = grids.curve(config.sigma_schedule, config, config.sigma_max, config.sigma_min, count, config.rho)
        sigma = torch.from_numpy(levels.astype(np.float32))
        last = config.sigma_min if config.final_sigmas_type == "sigma_min" else 0.0
        return Grid(
            timesteps=(0.25 * sigma.log()).to(device),
            sigmas=torch.cat([sigma, torch.tensor([last])]),
            steps=count,
            init_noise_sigma=(config.sigma_max**2 + 1) ** 0.5,
        )


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
    solver_class = solvers.UniPC

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
