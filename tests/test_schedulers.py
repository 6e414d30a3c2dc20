"""Every scheduler walks the way that the peer's scheduler of that name walks, step by step."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from autopipeline import schedulers

diffusers = pytest.importorskip("diffusers")

STEPS = 7
SHAPE = (2, 3, 4, 4)
NAMES = [
    name
    for name in schedulers.__all__
    if name.endswith("Scheduler") and name != "Scheduler" and hasattr(diffusers, name)
]
APART = [
    "CogVideoXDPMScheduler",
    "DDPMWuerstchenScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
]
WALKED = [name for name in NAMES if name not in APART]  # the others have a loop of their own: test_schedulers_apart.py
KINDS = ["epsilon", "sample", "v_prediction"]
SPACINGS = ["leading", "linspace", "trailing"]
LACKS = {  # prediction types that neither library's scheduler has
    "PNDMScheduler": ["sample"],
    "EDMDPMSolverMultistepScheduler": ["sample"],
    "EDMEulerScheduler": ["sample"],
    "KDPM2DiscreteScheduler": ["sample"],
    "KDPM2AncestralDiscreteScheduler": ["sample"],
    "DPMSolverSDEScheduler": ["sample"],
    "CosineDPMSolverMultistepScheduler": ["sample"],
}
CURVES = {"karras": dict(use_karras_sigmas=True), "exponential": dict(use_exponential_sigmas=True)} | {
    "beta": dict(use_beta_sigmas=True)
}
CURVED = [name for name in NAMES if "use_karras_sigmas" in getattr(schedulers, name).defaults]
NOT_NOISED = ["DDIMInverseScheduler", "IPNDMScheduler"]  # the peer's have no add_noise
SPACED = [name for name in NAMES if "timestep_spacing" in getattr(schedulers, name).defaults and name != "LCMScheduler"]
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
PLAIN = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True, noise_sampler_seed=3)
MIN = dict(final_sigmas_type="sigma_min")
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"]
SINGLE, INVERSE = "DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler"
DEIS, SA, COSINE = "DEISMultistepScheduler", "SASolverScheduler", "CosineDPMSolverMultistepScheduler"
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
ALONG = dict(mu=0.7, num_inference_steps=STEPS)  # with a shift from the size of the picture
EDM, EULER = "EDMDPMSolverMultistepScheduler", "EulerDiscreteScheduler"
EDM_EULER, LMS, SDE = "EDMEulerScheduler", "LMSDiscreteScheduler", "DPMSolverSDEScheduler"
HALVES = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", SDE)
CHURN = dict(s_churn=3.0, s_tmin=0.5, s_tmax=12.0, s_noise=1.1)

STEP_OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[(EULER, dict(prediction_type=kind), CHURN) for kind in KINDS],
    (EULER, {}, dict(s_churn=40.0)),
    (EULER, {}, dict(s_churn=0.0, s_noise=2.0)),
    *[(EDM_EULER, dict(prediction_type=kind), CHURN) for kind in ("epsilon", "v_prediction")],
    (EDM_EULER, dict(sigma_schedule="exponential"), dict(s_churn=40.0)),
    *[(LMS, dict(prediction_type=kind), dict(order=order)) for kind in KINDS for order in (1, 2, 3, 5)],
    (SDE, {}, dict(s_noise=0.0)),
    (SDE, dict(prediction_type="v_prediction"), dict(s_noise=1.1)),
]

EXTRAS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", dict(clip_sample=True, clip_sample_range=0.8)),
    ("DDIMScheduler", dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)),
    ("DDIMScheduler", dict(set_alpha_to_one=True, trained_betas=list(np.linspace(1e-4, 0.03, 1000)))),
    ("DDIMScheduler", dict(beta_schedule="squaredcos_cap_v2")),
    ("DDPMScheduler", dict(clip_sample=True)),
    ("DDPMScheduler", dict(thresholding=True)),
    ("DDPMScheduler", dict(beta_schedule="sigmoid")),
    *[("DDPMScheduler", dict(variance_type=kind)) for kind in ("fixed_small_log", "fixed_large")],
    *[("PNDMScheduler", dict(skip_prk_steps=False, prediction_type=kind)) for kind in ("epsilon", "v_prediction")],
    ("PNDMScheduler", dict(set_alpha_to_one=True)),
    *[("DDIMInverseScheduler", dict(set_alpha_to_one=one, steps_offset=0)) for one in (True, False)],
    ("DDIMInverseScheduler", dict(clip_sample=True, clip_sample_range=0.8)),
    ("DDIMParallelScheduler", dict(clip_sample=True)),
    ("DDPMParallelScheduler", dict(variance_type="fixed_large")),
    ("TCDScheduler", dict(clip_sample=True, thresholding=True)),
    *[("FlowMatchHeunDiscreteScheduler", dict(shift=shift)) for shift in (0.5, 3.0)],
    ("CMStochasticIterativeScheduler", dict(num_train_timesteps=201, clip_denoised=False)),
    ("CMStochasticIterativeScheduler", dict(sigma_min=0.01, sigma_max=20.0, sigma_data=1.0, s_noise=0.9, rho=5.0)),
    ("IPNDMScheduler", dict(trained_betas=[1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0])),
    *[
        (name, changes)
        for name in FLOWS
        for changes in (
            dict(shift=3.0),
            dict(shift_terminal=0.1),
            dict(shift=3.0, shift_terminal=0.02, use_beta_sigmas=True),
            dict(shift=2.0, invert_sigmas=True),
            dict(shift=7.0, use_karras_sigmas=True, invert_sigmas=True),
            dict(num_train_timesteps=500),
        )
    ],
    (FLOWS[0], dict(stochastic_sampling=True, shift=2.0)),
    ("LCMScheduler", dict(timestep_scaling=3.0, original_inference_steps=25)),
    ("LCMScheduler", dict(clip_sample=True)),
    (EULER, dict(interpolation_type="log_linear")),
    (EULER, MIN),
    (EULER, dict(timestep_type="continuous", prediction_type="v_prediction")),
    (EULER, dict(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True)),
    (EULER, dict(use_karras_sigmas=True, sigma_min=0.05, sigma_max=11.0)),
    (EULER, dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
    (EULER, dict(prediction_type="original_sample")),
    (EULER, dict(use_exponential_sigmas=True, sigma_min=0.05, sigma_max=11.0)),
    (EULER, dict(use_beta_sigmas=True, sigma_min=0.05) | MIN),
    (EULER, dict(beta_schedule="squaredcos_cap_v2", trained_betas=list(np.linspace(1e-4, 0.03, 1000)))),
    ("EulerAncestralDiscreteScheduler", ZERO_SNR | dict(timestep_spacing="leading", steps_offset=3)),
    ("HeunDiscreteScheduler", dict(clip_sample=True)),
    ("HeunDiscreteScheduler", dict(clip_sample=True, clip_sample_range=0.4, prediction_type="v_prediction")),
    *[("HeunDiscreteScheduler", dict(beta_schedule=kind)) for kind in ("squaredcos_cap_v2", "exp")],
    *[(name, dict(beta_schedule="linear", steps_offset=2, timestep_spacing="leading")) for name in (LMS, *HALVES)],
    *[(name, dict(trained_betas=list(np.linspace(1e-4, 0.03, 1000)))) for name in (LMS, *HALVES)],
    *[(name, dict(beta_schedule="squaredcos_cap_v2")) for name in (LMS, "KDPM2DiscreteScheduler")],
    (SDE, dict(noise_sampler_seed=[5, 6])),
    (EDM_EULER, dict(sigma_schedule="exponential")),
    (EDM_EULER, dict(sigma_min=0.01, sigma_max=20.0, sigma_data=1.0, rho=5.0, prediction_type="v_prediction") | MIN),
    *[(DPM, dict(solver_order=order, solver_type=kind)) for order in (1, 2, 3) for kind in ("midpoint", "heun")],
    *[(DPM, dict(algorithm_type="dpmsolver", solver_order=order) | MIN) for order in (1, 2, 3)],
    *[(DPM, dict(algorithm_type="sde-dpmsolver", solver_order=order) | MIN) for order in (1, 2)],
    *[(DPM, dict(algorithm_type="sde-dpmsolver++", solver_order=order)) for order in (1, 2, 3)],
    (DPM, dict(algorithm_type="sde-dpmsolver++", solver_type="heun", prediction_type="v_prediction")),
    (DPM, dict(algorithm_type="dpmsolver", prediction_type="sample", solver_type="heun") | MIN),
    (DPM, dict(lower_order_final=False, euler_at_final=True, solver_order=3)),
    (DPM, dict(lower_order_final=False, solver_order=3) | MIN),
    (DPM, dict(use_lu_lambdas=True)),
    (DPM, dict(lambda_min_clipped=-5.1)),
    (DPM, dict(thresholding=True, sample_max_value=1.5)),
    (DPM, dict(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)),
    *[(DPM, dict(use_karras_sigmas=True, **more)) for more in (MIN, dict(algorithm_type="sde-dpmsolver++"))],
    *[(EDM, dict(solver_order=order)) for order in (1, 2, 3)],
    *[(EDM, dict(solver_order=order, sigma_schedule="exponential")) for order in (1, 2, 3)],
    (EDM, dict(algorithm_type="sde-dpmsolver++", solver_type="heun")),
    (EDM, dict(sigma_min=0.01, sigma_max=20.0, sigma_data=1.0, rho=5.0, prediction_type="v_prediction") | MIN),
    *[(UNIPC, dict(solver_order=order)) for order in (1, 2, 3)],
    *[(UNIPC, dict(solver_order=order, solver_type="bh1") | MIN) for order in (1, 2, 3)],
    (UNIPC, dict(predict_x0=False) | MIN),
    (UNIPC, dict(predict_x0=False, prediction_type="v_prediction", solver_order=3) | MIN),
    (UNIPC, dict(disable_corrector=[0, 2])),
    (UNIPC, dict(lower_order_final=False, solver_order=3) | MIN),
    (UNIPC, dict(thresholding=True)),
    (UNIPC, dict(use_karras_sigmas=True, sigma_min=0.05, sigma_max=11.0)),
    (UNIPC, FLOW | dict(shift_terminal=0.1)),
    (UNIPC, FLOW | dict(use_karras_sigmas=True)),
    *[(name, FLOW | dict(flow_shift=shift)) for name in (DPM, SINGLE, DEIS, SA, UNIPC) for shift in (1.0, 3.0)],
    *[(name, dict(use_flow_sigmas=True, prediction_type="sample")) for name in (DPM, SINGLE, DEIS, SA, UNIPC)],
    *[(name, FLOW | MIN) for name in (DPM, SINGLE, UNIPC)],
    (DPM, dict(use_lu_lambdas=True, use_exponential_sigmas=True)),
    *[(SINGLE, dict(solver_order=order, solver_type=kind)) for order in (1, 2, 3) for kind in ("midpoint", "heun")],
    *[
        (SINGLE, dict(solver_order=order, solver_type=kind, algorithm_type=algorithm, lower_order_final=low) | MIN)
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
        for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")
        for low in (False, True)
    ],
    (SINGLE, dict(algorithm_type="dpmsolver", prediction_type="v_prediction") | MIN),
    (SINGLE, dict(lambda_min_clipped=-5.1)),
    (SINGLE, dict(thresholding=True, sample_max_value=1.5)),
    (SINGLE, dict(use_karras_sigmas=True) | MIN),
    *[
        (INVERSE, dict(solver_order=order, solver_type=kind, algorithm_type=algorithm))
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
        for algorithm in ("dpmsolver", "dpmsolver++")
    ],
    (INVERSE, dict(lower_order_final=False, solver_order=3)),
    (INVERSE, dict(euler_at_final=True)),
    (INVERSE, dict(lambda_min_clipped=-5.1)),
    (INVERSE, dict(thresholding=True)),
    *[(DEIS, dict(solver_order=order, lower_order_final=low)) for order in (1, 2, 3) for low in (False, True)],
    *[(DEIS, dict(solver_order=order, use_karras_sigmas=True)) for order in (1, 2, 3)],
    (DEIS, dict(thresholding=True, sample_max_value=1.5)),
    *[
        (SA, dict(predictor_order=before, corrector_order=after, algorithm_type=algorithm))
        for before in (1, 2, 3, 4)
        for after in (1, 2, 3, 4)
        for algorithm in ("data_prediction", "noise_prediction")
    ],
    (SA, dict(tau_func=lambda t: 0.3 + t / 1000)),
    (SA, dict(tau_func=lambda t: 0, predictor_order=3, lower_order_final=False)),
    (SA, dict(algorithm_type="noise_prediction", prediction_type="v_prediction")),
    (SA, dict(lambda_min_clipped=-5.1)),
    (SA, dict(thresholding=True)),
    *[(COSINE, dict(solver_order=order, solver_type=kind)) for order in (1, 2) for kind in ("midpoint", "heun")],
    (COSINE, dict(sigma_schedule="karras", euler_at_final=True, lower_order_final=False)),
    (COSINE, dict(prediction_type="epsilon", sigma_max=80.0, sigma_data=0.5)),
]


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """Stable Diffusion's betas and `changes`, as far as the class knows them."""
    known = getattr(schedulers, name).defaults
    common = PLAIN if name == "UnCLIPScheduler" else tiny.BETAS | PLAIN
    return {key: value for key, value in common.items() if key in known} | changes


def pair(name: str, **changes: Any) -> tuple[Any, Any]:
    config = config_of(name, **changes)
    return getattr(diffusers, name)(**config), getattr(schedulers, name)(**config)


def network(x: Tensor, t: Any) -> Tensor:
    """Stands in for a network: bounded, smooth, and different at every time."""
    return torch.tanh(0.3 * x + 0.1 * torch.sin(torch.as_tensor(t, dtype=torch.float32)))


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def noise_of(generator: torch.Generator) -> Any:
    return partial(torch.randn, SHAPE, generator=generator)


def peers_walk(scheduler: Any, begin: int = 0, picture: Tensor | None = None, **grid: Any) -> list[Tensor]:
    """Every (t, x) of the peer's own loop, from noise or from a noised picture."""
    eta, of_steps = grid.pop("eta", None), grid.pop("options", {})
    scheduler.set_timesteps(**(grid or dict(num_inference_steps=STEPS)))
    times, generator = scheduler.timesteps[begin:], torch.Generator().manual_seed(5)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    first = start() * getattr(scheduler, "init_noise_sigma", 1.0)
    x = first if picture is None else peers_noised(scheduler, picture, start(), times[0])
    trail = [x]
    takes = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = ({"generator": generator} if "generator" in takes else {}) | of_steps
    options |= {"eta": eta or 0.0} if "eta" in takes else {}
    for t in times:
        said = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        x = scheduler.step(said, t, x, **options, return_dict=False)[0]
        trail += [t.float(), x]
    return trail


def peers_noised(scheduler: Any, picture: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(picture, noise, t[None])
    return scheduler.scale_noise(picture, t[None], noise)


def our_walk(scheduler: Any, begin: int = 0, picture: Tensor | None = None, **grid: Any) -> list[Tensor]:
    """The same with ours."""
    eta, of_steps = grid.pop("eta", 0.0), grid.pop("options", {})
    steps = grid.pop("num_inference_steps", None if grid.keys() & {"timesteps", "sigmas"} else STEPS)
    walked = scheduler.grid(steps, **grid).window(begin)
    of_steps |= {"seed": 5} if "seed" in scheduler.solver_class.options else {}
    solver, noise = scheduler.solver(walked, eta=eta, **of_steps), noise_of(torch.Generator().manual_seed(5))
    x = start() * walked.init_noise_sigma if picture is None else solver.noised(picture, start(), begin)
    trail = [x]
    for i in walked.indices:
        t = walked.timesteps[i]
        x = solver.step(x, network(solver.scale(x, i), t), i, noise).x
        trail += [t.float(), x]
    return trail


def assert_same(expected: list[Tensor], actual: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(actual) == len(expected)
    for theirs, ours in zip(expected, actual, strict=True):
        assert torch.isfinite(theirs).all()
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def test_every_public_scheduler_is_tried() -> None:
    assert {"DDIM", "DDPM", "PNDM", "LCM", "UniPCMultistep"} < {name.removesuffix("Scheduler") for name in NAMES}
    assert set(CURVED) >= {EULER, "HeunDiscreteScheduler", DPM, UNIPC}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in WALKED for kind in KINDS if "prediction_type" in getattr(schedulers, name).defaults],
)
def test_predictions_and_spacings(name: str, kind: str) -> None:
    """Each prediction type with each spacing, the whole way down."""
    if kind in LACKS.get(name, []):
        with pytest.raises(ValueError, match="prediction_type"):
            getattr(schedulers, name)(**config_of(name, prediction_type=kind))
        return
    if name == "EulerAncestralDiscreteScheduler" and kind == "sample":
        pytest.skip("the peer has not built it")
    spacings = SPACINGS[::2] if name == "DDIMInverseScheduler" else SPACINGS
    for spacing in spacings if name in SPACED else [None]:
        own = dict(timestep_spacing=spacing) if spacing else {}
        peer, ours = pair(name, prediction_type=kind, **own)
        assert_same(peers_walk(peer), our_walk(ours))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", CURVED)
def test_curves_of_sigmas(name: str, curve: str) -> None:
    """Each curve with each spacing and prediction type."""
    for spacing, kind in itertools.product(SPACINGS, ("epsilon", "v_prediction")):
        changes = dict(timestep_spacing=spacing, prediction_type=kind)
        known = getattr(schedulers, name).defaults
        peer, ours = pair(name, **{key: value for key, value in changes.items() if key in known}, **CURVES[curve])
        assert_same(peers_walk(peer), our_walk(ours))


@pytest.mark.parametrize(
    "name", [name for name in WALKED if "rescale_betas_zero_snr" in getattr(schedulers, name).defaults]
)
def test_zero_terminal_signal(name: str) -> None:
    peer, ours = pair(name, **ZERO_SNR)
    assert_same(peers_walk(peer), our_walk(ours))


def told(value: object) -> str:
    """A case's name, the same in every process that runs tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("name", "changes"), EXTRAS, ids=told)
def test_other_options(name: str, changes: dict[str, Any]) -> None:
    peer, ours = pair(name, **changes)
    assert_same(peers_walk(peer), our_walk(ours))


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 20, 50])
@pytest.mark.parametrize("name", WALKED)
def test_numbers_of_steps(name: str, steps: int) -> None:
    """Short and long ways; multistep solvers change their order with the number of steps."""
    if name == "PNDMScheduler" and steps == 1:
        pytest.skip("the peer can't")
    if name == "CMStochasticIterativeScheduler" and steps > 40:
        pytest.skip("it has 40 levels")
    peer, ours = pair(name)
    assert_same(peers_walk(peer, num_inference_steps=steps), our_walk(ours, num_inference_steps=steps))


@pytest.mark.parametrize("name", [EULER, "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", DPM, UNIPC])
def test_a_network_that_knows_the_picture_gets_there(name: str) -> None:
    """With predictions of the clean sample that are always the same one, the way ends at it."""
    scheduler = getattr(schedulers, name)(**config_of(name, prediction_type="sample"))
    grid, picture = scheduler.grid(STEPS), start(4)
    solver, x = scheduler.solver(grid), start() * grid.init_noise_sigma
    for i in grid.indices:
        step = solver.step(x, picture, i, noise_of(torch.Generator().manual_seed(1)))
        assert torch.equal(step.x0, picture)
        x = step.x
    assert torch.allclose(x, picture, atol=1e-5)


def test_variance_in_logarithms_is_the_same_variance() -> None:
    """The peer takes the root of a negative logarithm here."""
    plain, logs = (pair("DDPMScheduler", variance_type=kind)[1] for kind in ("fixed_large", "fixed_large_log"))
    assert_same(our_walk(plain), our_walk(logs))


@pytest.mark.parametrize(("name", "changes", "options"), STEP_OPTIONS, ids=str)
def test_options_of_the_steps(name: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    peer, ours = pair(name, **changes)
    assert_same(peers_walk(peer, options=options), our_walk(ours, options=options))


@pytest.mark.parametrize("name", NAMES)
def test_options_that_a_class_lacks_are_refused(name: str) -> None:
    scheduler = getattr(schedulers, name)(**config_of(name))
    with pytest.raises(ValueError, match="has no option 'warmth'"):
        scheduler.solver(scheduler.grid(STEPS), warmth=1.0)


def test_churn_draws_only_where_it_adds_noise() -> None:
    """Within its limits; without churn, never."""
    scheduler = schedulers.EulerDiscreteScheduler(**config_of(EULER))
    grid = scheduler.grid(STEPS)
    for options in ({}, CHURN):
        noise = Mock(return_value=start(7))
        solver, x = scheduler.solver(grid, **options), start() * grid.init_noise_sigma
        for i in grid.indices:
            x = solver.step(x, network(x, i), i, noise).x
        within = sum(0.5 <= sigma <= 12 for sigma in grid.sigmas[:-1].tolist())
        assert noise.call_count == (within if options else 0)


def test_a_brownian_path_of_ones_own_noise() -> None:
    """Without a seed of its own, the path follows the run's generator."""
    scheduler = schedulers.DPMSolverSDEScheduler(**config_of(SDE, noise_sampler_seed=None))
    first, again = our_walk(scheduler), our_walk(scheduler)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = schedulers.DPMSolverSDEScheduler(**config_of(SDE, noise_sampler_seed=4))
    assert not torch.allclose(our_walk(other)[-1], first[-1])


def test_seeds_for_each_picture() -> None:
    """A picture does not depend on its neighbours; their numbers have to agree."""
    both, alone = (
        schedulers.DPMSolverSDEScheduler(**config_of(SDE, noise_sampler_seed=seeds)) for seeds in ([5, 6], [6])
    )
    grid = both.grid(STEPS)
    x = start() * grid.init_noise_sigma
    together = both.solver(grid).step(x, network(x, 5), 0, start).x
    noise = lambda: start()[:1]  # noqa: E731
    assert torch.allclose(alone.solver(grid).step(x[1:], network(x[1:], 5), 0, noise).x, together[1:])
    with pytest.raises(ValueError, match="2 seeds were given for 1 pictures"):
        both.solver(grid).step(x[:1], x[:1], 0, noise)


def test_without_torchsde_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    scheduler = schedulers.DPMSolverSDEScheduler(**config_of(SDE))
    with pytest.raises(ImportError, match=r"pip install 'autopipeline\[sde\]'"):
        our_walk(scheduler)


def test_own_sigmas_of_edm_are_levels() -> None:
    """The peer reads them as shares of its curve; here the curve's own levels give the curve's own walk."""
    scheduler = schedulers.EDMEulerScheduler()
    levels = scheduler.grid(STEPS).sigmas.tolist()
    assert_same(our_walk(scheduler), our_walk(scheduler, sigmas=levels))


def test_a_step_that_single_precision_leaves_nothing_of() -> None:
    """The peer's levels are not numbers here: between far levels, the difference of their squares rounds to 0."""
    ours = schedulers.KDPM2AncestralDiscreteScheduler(beta_schedule="squaredcos_cap_v2")
    assert all(torch.isfinite(x).all() for x in our_walk(ours, num_inference_steps=4))


def test_keys_of_other_classes_change_nothing() -> None:
    """What a configuration keeps for another class is not this class's."""
    kept = dict(rescale_betas_zero_snr=True, final_sigmas_type="sigma_min", clip_sample=True, thresholding=True)
    for name in (
        LMS,
        "KDPM2DiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "PNDMScheduler",
        "IPNDMScheduler",
        SA,
    ):
        known = {key: value for key, value in kept.items() if key not in getattr(schedulers, name).defaults}
        plain = config_of(name)
        peer, ours = (getattr(library, name).from_config(plain | known) for library in (diffusers, schedulers))
        assert_same(peers_walk(peer), our_walk(ours))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_eta(name: str, eta: float, kind: str) -> None:
    peer, ours = pair(name, prediction_type=kind)
    assert_same(peers_walk(peer, eta=eta), our_walk(ours, eta=eta))


@pytest.mark.parametrize("name", [name for name in NAMES if not getattr(schedulers, name).takes_eta])
def test_eta_is_refused_elsewhere(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    with pytest.raises(ValueError, match="DDIMScheduler"):
        scheduler.solver(scheduler.grid(STEPS), eta=0.5)


@pytest.mark.parametrize("skipped", [1, 3, 6])
@pytest.mark.parametrize("name", [name for name in WALKED if name not in NOT_NOISED])
def test_starting_part_way(name: str, skipped: int) -> None:
    """Image-to-image: a noised picture, from a later time of the same grid."""
    peer, ours = pair(name)
    begin = skipped * ours.order
    assert ours.order == peer.order
    expected, actual = (walk(s, begin, start(9)) for walk, s in ((peers_walk, peer), (our_walk, ours)))
    assert_same(expected, actual)


@pytest.mark.parametrize("name", [name for name in WALKED if name not in NOT_NOISED])
def test_noised_is_add_noise(name: str) -> None:
    """A clean sample at every level of the grid; after the last one, itself."""
    peer, ours = pair(name)
    peer.set_timesteps(STEPS)
    grid = ours.grid(STEPS)
    solver = ours.solver(grid)
    picture, noise = start(1), start(2)
    for i, t in enumerate(peer.timesteps):
        peer.set_timesteps(STEPS)
        if hasattr(peer, "set_begin_index"):
            peer.set_begin_index(i)
        expected = peers_noised(peer, picture, noise, t)
        assert torch.allclose(solver.noised(picture, noise, i), expected, atol=1e-5, rtol=1e-5)
    assert solver.noised(picture, noise, len(grid.timesteps)) is picture


OWN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[
        (name, {}, dict(timesteps=times))
        for name in ("DDPMScheduler", EULER, "HeunDiscreteScheduler", "LCMScheduler", DPM)
        for times in ([999, 759, 519, 259], [900, 850, 340, 300, 7], [999, 0])
    ],
    (EULER, {}, dict(sigmas=[14.6, 6.0, 2.5, 0.7, 0.1, 0.0])),
    (EULER, dict(timestep_spacing="trailing"), dict(sigmas=[10.0, 1.0, 0.0])),
    (DPM, dict(solver_order=3), dict(timesteps=[900, 850, 340, 300, 100, 7])),
    *[("TCDScheduler", {}, dict(timesteps=times, eta=0.3)) for times in ([999, 759, 519, 259], [999, 0])],
    ("TCDScheduler", {}, dict(num_inference_steps=4, original_inference_steps=70)),
    ("TCDScheduler", {}, dict(num_inference_steps=4, strength=0.6, eta=0.7)),
    ("CMStochasticIterativeScheduler", {}, dict(timesteps=[22, 0])),
    *[
        (name, changes, own)
        for name in FLOWS
        for changes in ({}, dict(shift=3.0), dict(shift=3.0, shift_terminal=0.1, use_karras_sigmas=True))
        for own in (
            dict(sigmas=[1.0, 0.8, 0.3]),
            dict(timesteps=[1000.0, 700.5, 30.0]),
            dict(timesteps=[1000.0, 700.5, 30.0], sigmas=[0.9, 0.8, 0.3], num_inference_steps=3),
        )
    ],
    *[
        (name, dict(use_dynamic_shifting=True, time_shift_type=kind) | changes, dict(mu=0.9) | own)
        for name in FLOWS
        for kind in ("exponential", "linear")
        for changes in ({}, dict(shift_terminal=0.1), dict(use_exponential_sigmas=True), dict(invert_sigmas=True))
        for own in (dict(num_inference_steps=5), dict(sigmas=[1.0, 0.8, 0.3]))
    ],
    *[(SINGLE, dict(solver_order=order), dict(timesteps=[900, 850, 340, 300, 100, 7])) for order in (1, 2, 3)],
    *[(name, FLOW | dict(use_dynamic_shifting=True), ALONG) for name in (DPM, SINGLE, DEIS, UNIPC)],
    (UNIPC, FLOW | dict(use_dynamic_shifting=True, time_shift_type="linear"), ALONG),
    (UNIPC, FLOW | dict(flow_shift=3.0), dict(sigmas=np.array([1.0, 0.8, 0.5, 0.3, 0.05]))),
    (UNIPC, FLOW, dict(sigmas=np.array([0.7]))),
]


@pytest.mark.parametrize(("name", "changes", "own"), OWN, ids=str)
def test_own_times(name: str, changes: dict[str, Any], own: dict[str, Any]) -> None:
    peer, ours = pair(name, **changes)
    assert_same(peers_walk(peer, **own), our_walk(ours, **own))


@pytest.mark.parametrize("name", NAMES)
def test_own_times_are_taken_where_the_peer_takes_them(name: str) -> None:
    peer, ours = pair(name)
    able = set(inspect.signature(peer.set_timesteps).parameters) & {"timesteps", "sigmas"}
    if name == UNIPC:
        for refuses in (peer.set_timesteps, ours.grid):  # for flows alone
            with pytest.raises(ValueError, match="use_flow_sigmas"):
                refuses(sigmas=[2.0, 0.0])
    assert set(ours.takes) == able
    for what, values in dict(timesteps=[900, 400, 10], sigmas=[9.0, 2.0, 0.0]).items():
        if what not in able:
            with pytest.raises(ValueError, match=f"{name} takes no own {what}"):
                ours.grid(**{what: values})


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (EULER, {}, dict(timesteps=[10, 900])),
    ("DDPMScheduler", {}, dict(timesteps=[10, 900])),
    ("DDPMScheduler", {}, dict(timesteps=[500, 500])),
    ("DDPMScheduler", {}, dict(timesteps=[1000, 10])),
    ("DDPMScheduler", {}, dict(timesteps=[])),
    ("DDPMScheduler", {}, dict(timesteps=[5, -1])),
    (EULER, dict(use_karras_sigmas=True), dict(timesteps=[900, 10])),
    (DPM, dict(use_exponential_sigmas=True), dict(timesteps=[900, 10])),
    (DPM, dict(use_lu_lambdas=True), dict(timesteps=[900, 10])),
    ("HeunDiscreteScheduler", dict(use_beta_sigmas=True), dict(timesteps=[900, 10])),
    (
        EULER,
        dict(timestep_type="continuous", prediction_type="v_prediction"),
        dict(timesteps=[900, 10]),
    ),
    (EULER, {}, dict(sigmas=[1.0, 2.0, 0.0])),
    (EULER, {}, dict(sigmas=[])),
    (EULER, {}, dict(sigmas=[float("nan"), 0.0])),
    (EULER, {}, dict(sigmas=[2.0, -1.0])),
    (EULER, {}, dict(timesteps=[900, 10], sigmas=[2.0, 0.0])),
    (EULER, {}, dict(steps=5, sigmas=[2.0, 0.0])),
    (EULER, {}, {}),
    (EDM_EULER, {}, dict(sigmas=[0.0, 0.5, 1.0])),
    *[(name, FLOW, dict(timesteps=[900, 10])) for name in (DPM, SINGLE)],
    *[(UNIPC, FLOW, dict(sigmas=sigmas)) for sigmas in ([0.5, 0.8], [1.2, 0.5], [0.5, 0.0], [])],
    (UNIPC, FLOW | dict(use_karras_sigmas=True), dict(sigmas=[0.8, 0.5])),
    (UNIPC, FLOW | dict(use_dynamic_shifting=True), dict(steps=5)),
    (UNIPC, FLOW | dict(shift_terminal=0.1), dict(steps=1)),
    *[(name, FLOW, dict(steps=5, mu=0.5)) for name in (DPM, SA, UNIPC)],
    ("LCMScheduler", {}, dict(steps=51)),
    ("LCMScheduler", {}, dict(steps=4, original_inference_steps=1001)),
    ("PNDMScheduler", dict(skip_prk_steps=False), dict(steps=3)),
    (FLOWS[0], dict(use_dynamic_shifting=True), dict(steps=5)),
    (FLOWS[0], dict(shift_terminal=0.1), dict(steps=1)),
    (FLOWS[0], dict(use_exponential_sigmas=True), dict(sigmas=[1.0, 0.0])),
    *[(FLOWS[0], {}, own) for own in ({}, dict(steps=2, sigmas=[1.0]), dict(timesteps=[900, 10], sigmas=[1.0]))],
    *[(FLOWS[0], {}, dict(sigmas=sigmas)) for sigmas in ([], [0.2, 0.5], [1.2, 0.5], [0.5, -0.1], [float("nan")])],
    *[(FLOWS[0], {}, dict(timesteps=times)) for times in ([], [1, 5], [1001, 5], [5, -1])],
    ("FlowMatchHeunDiscreteScheduler", {}, dict(sigmas=[1.0, 0.5])),
    ("CMStochasticIterativeScheduler", {}, dict(steps=41)),
    ("CMStochasticIterativeScheduler", {}, dict(timesteps=[40, 0])),
    ("TCDScheduler", {}, dict(steps=51)),
    ("IPNDMScheduler", dict(trained_betas=[1.0, 0.5, 0.0]), dict(steps=5)),
    ("UnCLIPScheduler", {}, dict(steps=1)),
    *[("DDPMWuerstchenScheduler", {}, dict(timesteps=times)) for times in ([], [1.0], [0.5, 0.5], [1.1, 0.5])],
    *[("DDIMScheduler", {}, dict(steps=steps)) for steps in (0, -1, 1001, 2.5, True, "5")],
]


@pytest.mark.parametrize(("name", "changes", "own"), REFUSED, ids=str)
def test_impossible_times(name: str, changes: dict[str, Any], own: dict[str, Any]) -> None:
    scheduler = getattr(schedulers, name)(**config_of(name, **changes))
    with pytest.raises(ValueError) as raised:
        scheduler.grid(**own)
    assert str(raised.value).endswith(".")


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    (EULER, dict(use_karras_sigmas=True, use_beta_sigmas=True)),
    (DPM, dict(algorithm_type="dpmsolver")),
    (DPM, dict(algorithm_type="other")),
    (DPM, dict(solver_type="other")),
    (UNIPC, dict(solver_type="other")),
    ("DDIMScheduler", dict(beta_schedule="other")),
    ("DDIMScheduler", dict(timestep_spacing="other")),
    ("DDIMScheduler", dict(prediction_type="other")),
    (EULER, dict(interpolation_type="other")),
    (EULER, dict(final_sigmas_type="other")),
    (UNIPC, dict(final_sigmas_type="other")),
    (UNIPC, dict(lower_order_final=False, solver_order=3)),
    (FLOWS[0], dict(time_shift_type="other")),
    (FLOWS[0], dict(use_karras_sigmas=True, use_beta_sigmas=True)),
    (FLOWS[1], dict(scale_factors=[1.5, 2.0])),
    (FLOWS[1], dict(scale_factors=[2.0] * 6, upscale_mode="other")),
    ("DDIMInverseScheduler", dict(timestep_spacing="linspace")),
    ("UnCLIPScheduler", dict(variance_type="fixed_large")),
    ("UnCLIPScheduler", dict(prediction_type="v_prediction")),
    ("UnCLIPScheduler", dict(beta_schedule="linear")),
    *[(name, dict(prediction_type="sample")) for name in (*HALVES, EDM_EULER)],
    *[(name, dict(prediction_type="other")) for name in (LMS, *HALVES, EDM_EULER)],
    *[(name, dict(use_karras_sigmas=True, use_beta_sigmas=True)) for name in (LMS, *HALVES)],
    *[(name, dict(timestep_spacing="other")) for name in (LMS, *HALVES)],
    (EDM_EULER, dict(sigma_schedule="other")),
    (EDM_EULER, dict(final_sigmas_type="other")),
    (UNIPC, dict(shift_terminal=0.1)),
    (UNIPC, dict(solver_p="other")),
    (UNIPC, FLOW | dict(predict_x0=False) | MIN),
    *[(SINGLE, dict(algorithm_type=kind)) for kind in ("dpmsolver", "sde-dpmsolver", "other")],
    *[(name, FLOW | dict(algorithm_type="dpmsolver") | MIN) for name in (DPM, SINGLE)],
    (SINGLE, dict(solver_type="other")),
    (SINGLE, dict(solver_order=4)),
    *[(DEIS, dict(algorithm_type=kind)) for kind in ("sde-dpmsolver++", "other")],
    (DEIS, dict(solver_type="other")),
    (SA, dict(algorithm_type="other")),
    (SA, FLOW | dict(algorithm_type="noise_prediction")),
    (SA, dict(tau_func=0.5)),
    *[(SA, {key: 0}) for key in ("predictor_order", "corrector_order")],
    *[(SA, {key: 5, "lower_order_final": False}) for key in ("predictor_order", "corrector_order")],
    (COSINE, dict(solver_order=3)),
    (COSINE, dict(solver_type="other")),
    (COSINE, dict(sigma_schedule="other")),
]
NO_NUMBERS: list[tuple[str, dict[str, Any]]] = [
    *[(INVERSE, dict(algorithm_type=kind)) for kind in ("sde-dpmsolver", "sde-dpmsolver++")],
    *[(name, FLOW | CURVES["karras"]) for name in (DPM, SINGLE, DEIS, SA)],
    *[(UNIPC, FLOW | CURVES[curve]) for curve in ("exponential", "beta")],
]


@pytest.mark.parametrize(("name", "changes"), CONFIGS, ids=str)
def test_impossible_configurations(name: str, changes: dict[str, Any]) -> None:
    """What the peer refuses, sooner or later, is refused here too."""
    for walk, library in ((peers_walk, diffusers), (our_walk, schedulers)):
        errors: tuple[type[Exception], ...] = (ValueError,)
        if library is diffusers:
            errors += (NotImplementedError, torch.linalg.LinAlgError, AssertionError, TypeError, NameError)
            errors += (AttributeError, IndexError)
        with pytest.raises(errors):
            walk(getattr(library, name)(**config_of(name, **changes)))


@pytest.mark.parametrize(("name", "changes"), NO_NUMBERS, ids=str)
def test_configurations_that_give_no_numbers(name: str, changes: dict[str, Any]) -> None:
    """What the peer makes NaN of is refused here."""
    peer = getattr(diffusers, name)(**config_of(name, **changes))
    assert not torch.isfinite(peers_walk(peer)[-1]).all()
    with pytest.raises(ValueError, match="can't"):
        getattr(schedulers, name)(**config_of(name, **changes))


@pytest.mark.parametrize("name", [DPM, SINGLE, DEIS, SA])
def test_flows_and_velocities_go_together(name: str) -> None:
    for changes in (
        dict(prediction_type="flow_prediction"),
        dict(use_flow_sigmas=True, prediction_type="v_prediction"),
    ):
        with pytest.raises(ValueError, match="contradicts use_flow_sigmas"):
            getattr(schedulers, name)(**changes)


@pytest.mark.parametrize("other", [DPM, SINGLE, DEIS])
@pytest.mark.parametrize("begin", [0, 2])
def test_unipc_with_another_predictor(other: str, begin: int) -> None:
    betas, spacing = dict(tiny.BETAS), dict(timestep_spacing="trailing") if other in SPACED else {}
    pairs = [
        getattr(lib, UNIPC)(**betas, **spacing, solver_p=getattr(lib, other)(**betas, **spacing))
        for lib in (diffusers, schedulers)
    ]
    assert_same(peers_walk(pairs[0], begin, start(9)), our_walk(pairs[1], begin, start(9)))


def test_a_predictor_with_other_times_is_refused(tmp_path: Path) -> None:
    scheduler = schedulers.UniPCMultistepScheduler(solver_p=schedulers.DEISMultistepScheduler(num_train_timesteps=500))
    with pytest.raises(ValueError, match="other timesteps"):
        scheduler.solver(scheduler.grid(STEPS))
    for unwritten in (scheduler, schedulers.SASolverScheduler(tau_func=lambda t: 0.5)):
        assert unwritten.__class__.__name__ in repr(unwritten)
        with pytest.raises(TypeError, match=r"can't be written to scheduler_config\.json"):
            unwritten.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", [DPM, SINGLE, INVERSE, SA])
@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_a_learned_variance_is_left_out(name: str, kind: str) -> None:
    """The network gives twice the channels."""
    peer, ours = pair(name, variance_type=kind)
    peer.set_timesteps(STEPS)
    grid, x = ours.grid(STEPS), start()
    solver, noise = ours.solver(grid), noise_of(torch.Generator().manual_seed(5))
    said = network(x, 500)
    new = solver.step(x, torch.cat([said, start(3)], 1), 0, noise).x
    whole = said if name == SA else torch.cat([said, start(3)], 1)  # the peer's SA-Solver draws noise for all channels
    options = dict(generator=torch.Generator().manual_seed(5))
    theirs = peer.step(whole, peer.timesteps[0], x, **options, return_dict=False)[0]
    assert torch.allclose(new, theirs, rtol=1e-5, atol=1e-5)


def test_brownian_noise_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"pip install 'autopipeline\[sde\]'"):
        our_walk(schedulers.CosineDPMSolverMultistepScheduler())


def test_seeds_of_brownian_noise() -> None:
    """One path for each sample, and the same one for the same generator."""
    scheduler = schedulers.CosineDPMSolverMultistepScheduler()
    grid, x = scheduler.grid(STEPS), start() * 500

    def last(seed: Any, rows: slice, generator: int = 1) -> Tensor:
        solver, y = scheduler.solver(grid, seed=seed), x[rows]
        draw = partial(torch.randn, y.shape, generator=torch.Generator().manual_seed(generator))
        for i in grid.indices:
            y = solver.step(y, network(solver.scale(y, i), 0.5), i, draw).x
        return y

    both = last([3, 4], slice(2))
    for k, seed in enumerate((3, 4)):
        assert torch.allclose(last([seed], slice(k, k + 1)), both[k : k + 1], atol=1e-6)
    assert torch.equal(last(None, slice(2)), last(None, slice(2)))
    assert not torch.allclose(last(None, slice(2)), last(None, slice(2), 2), atol=1e-2)
    with pytest.raises(ValueError, match="3 seeds"):
        last([1, 2, 3], slice(2))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_refused_by_the_class_and_kept_by_from_config(name: str) -> None:
    for library in (diffusers, schedulers):
        if name != "DDIMInverseScheduler" or library is schedulers:  # the peer's class takes any key
            with pytest.raises(TypeError, match="some_key"):
                getattr(library, name)(some_key=1)
        kept = getattr(library, name).from_config({**config_of(name), "some_key": 1})
        assert kept.config["some_key"] == 1


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_from_config_across_classes(first: str, second: str) -> None:
    """Shared keys go over, defaults do not, and what the second class lacks comes back with the first."""
    changes = dict(prediction_type="v_prediction", timestep_spacing="trailing", num_train_timesteps=500)
    known = getattr(schedulers, first).defaults
    if "UnCLIPScheduler" in (first, second):
        changes.pop("prediction_type")  # neither library's walks velocities
    if second == "UnCLIPScheduler" and "beta_schedule" in known:
        for library, scheduler in zip((diffusers, schedulers), pair(first), strict=True):
            with pytest.raises(ValueError, match="beta_schedule"):
                getattr(library, second).from_config(scheduler.config)
        return
    pairs = pair(first, **{key: value for key, value in changes.items() if key in known})
    there = [getattr(lib, second).from_config(s.config) for lib, s in zip((diffusers, schedulers), pairs, strict=True)]
    back = [getattr(lib, first).from_config(s.config) for lib, s in zip((diffusers, schedulers), there, strict=True)]
    for name, (theirs, ours) in ((second, there), (first, back)):
        for key in getattr(schedulers, name).defaults:
            assert comparable(ours.config[key]) == comparable(theirs.config[key]), key
    assert {key: back[1].config[key] for key in known} == {key: pairs[1].config[key] for key in known}


def comparable(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_peers(name: str) -> None:
    """The same parameters in the same order with the same defaults."""
    theirs, ours = (dict(inspect.signature(getattr(library, name)).parameters) for library in (diffusers, schedulers))
    theirs.pop("kwargs", None)
    assert {key: comparable(p.default) for key, p in ours.items()} == {
        key: comparable(p.default) for key, p in theirs.items()
    }
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_saved_configurations_go_both_ways(name: str, tmp_path: Path) -> None:
    changes = dict(beta_end=0.013) if "beta_end" in getattr(schedulers, name).defaults else {}
    peer, ours = pair(name, **changes)
    peer.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    read = getattr(schedulers, name).from_pretrained(tmp_path / "theirs")
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    for key in ours.defaults:
        assert comparable(theirs.config[key]) == comparable(ours.config[key]) == comparable(read.config[key])


@pytest.mark.parametrize("name", WALKED)
def test_two_runs_share_one_scheduler(name: str) -> None:
    """Steps of two runs, one of them part-way down another grid, taken in turn: the same as one after the other."""
    scheduler = getattr(schedulers, name)(**config_of(name))
    before = dict(scheduler.config)

    def run(steps: int, seed: int) -> Any:
        grid = scheduler.grid(steps).window(scheduler.order * (steps - 5))
        solver, noise, x = scheduler.solver(grid), noise_of(torch.Generator().manual_seed(seed)), start(seed)
        for i in grid.indices:
            x = solver.step(x, network(solver.scale(x, i), grid.timesteps[i]), i, noise).x
            yield x

    serial = [list(run(5, 1)), list(run(8, 2))]
    turns = list(itertools.zip_longest(run(5, 1), run(8, 2)))
    for k, alone in enumerate(serial):
        together = [turn[k] for turn in turns if turn[k] is not None]
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert dict(scheduler.config) == before


@pytest.mark.parametrize("name", WALKED)
def test_half_precision_is_computed_in_single(name: str) -> None:
    """A step on float16 is the float32 step, cast back once."""
    _, ours = pair(name)
    grid = ours.grid(STEPS)
    x = start().half() * grid.init_noise_sigma
    said = network(x, 500).half()
    results = []
    for dtype in (torch.float16, torch.float32):
        noise = noise_of(torch.Generator().manual_seed(1))
        results.append(ours.solver(grid).step(x.to(dtype), said.to(dtype), 0, noise))
    half, single = results
    assert (half.x.dtype, half.x0.dtype) == (torch.float16, torch.float16)
    assert torch.equal(half.x, single.x.half())


def test_configurations_cannot_be_changed() -> None:
    config = schedulers.DDIMScheduler().config
    for change in (lambda: config.update(beta_end=1), lambda: setattr(config, "beta_end", 1)):
        with pytest.raises(TypeError, match="from_config"):
            change()


@pytest.mark.parametrize("name", NAMES)
def test_no_keyword_of_a_grid_is_ignored(name: str) -> None:
    scheduler = getattr(schedulers, name)(**config_of(name))
    with pytest.raises(TypeError, match=f"{name} takes no warmth"):
        scheduler.grid(STEPS, warmth=1.0)
