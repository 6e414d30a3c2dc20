"""The stateful interface gives what the peer's scheduler of that name gives, call by call."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopipeline import schedulers
from autopipeline.errors import CheckpointError
from test_schedulers import DPM, EULER, LACKS, NAMES, assert_same, config_of, network, pair, start

diffusers = pytest.importorskip("diffusers")

STEPS = 7
UNLIKE = ["ScoreSdeVeScheduler", "CogVideoXDPMScheduler"]  # steps of two kinds, or told more: test_schedulers_apart.py
PUBLISHED = [name for name in NAMES if hasattr(diffusers, name) and name not in UNLIKE]
BETAS = [name for name in PUBLISHED if "beta_schedule" in getattr(schedulers, name).defaults]
LACKING = [("UnCLIPScheduler", "v_prediction")]
WRONG_VELOCITY = [EULER]  # the peer reads the figures of training at the indices of the grid


def more_of(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What a step can't do without."""
    takes = inspect.signature(scheduler.step).parameters
    known = dict(generator=generator, original_image=start(3), mask=(start(4) > 0).float())
    return {key: value for key, value in known.items() if key in takes}


def size_of(scheduler: Any) -> Any:
    return getattr(scheduler, "init_noise_sigma", 1.0)


def noised(scheduler: Any, picture: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(picture, noise, times)
    return scheduler.scale_noise(picture, times, noise)


def walk(scheduler: Any, begin: int = 0, *, told: bool = True, as_output: bool = True, **options: Any) -> list[Tensor]:
    """Every output of a loop as scripts write it; with `begin`, as image-to-image does."""
    scheduler.set_timesteps(options.pop("steps", STEPS))
    times, generator = scheduler.timesteps[begin:], torch.Generator().manual_seed(5)
    ends = scheduler.timesteps.numel() > STEPS and type(scheduler).__name__ == "DDPMWuerstchenScheduler"
    times = times[:-1] if ends else times  # where the peer tells the end as well
    if told and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    x = start() * size_of(scheduler)
    if begin:
        x = noised(scheduler, start(9), start(), times[:1])
    trail = [x]
    for t in times:
        said = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        batch = t.expand(len(x)) if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t
        made = scheduler.step(said, batch, x, return_dict=as_output, **options, **more_of(scheduler, generator))
        trail += list(made.values() if as_output else made)
        x = made[0]
    return trail


@pytest.mark.parametrize("name", PUBLISHED)
def test_signatures(name: str) -> None:
    """The same names in the same order, and the same defaults where both have one."""
    for what in ("set_timesteps", "step"):
        theirs, ours = (
            inspect.signature(getattr(getattr(library, name)(), what)).parameters for library in (diffusers, schedulers)
        )
        assert list(ours) == list(theirs)
        for key, parameter in theirs.items():
            if parameter.default is not inspect.Parameter.empty:
                assert ours[key].default == parameter.default


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_loops(name: str, kind: str) -> None:
    known = "prediction_type" in getattr(schedulers, name).defaults
    if kind in LACKS.get(name, []) or (not known and kind != "epsilon") or (name, kind) in LACKING:
        pytest.skip("there is no such prediction")
    peer, ours = pair(name, **(dict(prediction_type=kind) if known else {}))
    assert_same(walk(peer), walk(ours))
    assert ours.num_inference_steps == getattr(peer, "num_inference_steps", STEPS)
    theirs = torch.as_tensor(peer.timesteps).to(ours.timesteps)[: len(ours.timesteps)]
    assert torch.allclose(ours.timesteps, theirs, atol=1e-3)
    assert ours.order == getattr(peer, "order", 1)
    assert float(size_of(ours)) == pytest.approx(float(size_of(peer)), rel=1e-5)
    if hasattr(ours, "sigmas") and getattr(peer, "sigmas", ours.sigmas[:0]).shape == ours.sigmas.shape:
        assert torch.allclose(ours.sigmas, peer.sigmas.float(), rtol=1e-4, atol=1e-5)
    if hasattr(peer, "step_index"):
        assert ours.step_index == peer.step_index


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("skipped", [2, 5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_image_to_image(name: str, skipped: int, told: bool) -> None:
    """From a noised picture, with and without set_begin_index."""
    peer, ours = pair(name)
    if not (hasattr(peer, "add_noise") or hasattr(peer, "scale_noise")) or name == "RePaintScheduler":
        pytest.skip("the peer adds no noise")
    begin = skipped * ours.order
    assert_same(walk(peer, begin, told=told), walk(ours, begin, told=told))


@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs(name: str) -> None:
    """By name, by attribute and by position, or as a tuple."""
    peer, ours = pair(name)
    theirs, output = _first(peer), _first(ours)
    assert list(output) == list(theirs)
    assert output.prev_sample is output["prev_sample"] is output[0]
    assert output[:1] == (output[0],)
    assert_same(list(theirs.to_tuple()), list(output.to_tuple()))
    assert_same(walk(peer, as_output=False), walk(ours, as_output=False))
    with pytest.raises(AttributeError, match="no 'other'"):
        _ = output.other


def _first(scheduler: Any) -> Any:
    scheduler.set_timesteps(STEPS)
    t, x = scheduler.timesteps[0].reshape(-1), start() * size_of(scheduler)
    t = t if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else t[0]
    said = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
    return scheduler.step(said, t, x, **more_of(scheduler, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNLIKE])
def test_copies_go_on_where_the_walk_stands(name: str, how: Any) -> None:
    ours = getattr(schedulers, name)(**config_of(name))
    ours.set_timesteps(STEPS)
    times = ours.timesteps

    def go_on(scheduler: Any, x: Tensor, some: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        for t in some:
            said = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(said, t, x, **more_of(scheduler, generator)).prev_sample
        return x

    half = go_on(ours, start() * ours.init_noise_sigma, times[:3], 1)
    other = how(ours)
    assert other.step_index == ours.step_index
    ends = [go_on(scheduler, half, times[3:], 2) for scheduler in (ours, other)]
    assert torch.equal(*ends)
    assert torch.isfinite(ends[0]).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_add_noise_at_a_batch_of_times(name: str) -> None:
    peer, ours = pair(name)
    if not hasattr(peer, "add_noise") or name == "RePaintScheduler":
        pytest.skip("the peer has none")
    picture, noise = start(1), start(2)
    for scheduler in (peer, ours):
        scheduler.set_timesteps(STEPS)
    for rows in ([0, 3], [5, 1], [2, 2]):
        theirs, own = (s.add_noise(picture, noise, torch.as_tensor(s.timesteps)[rows]) for s in (peer, ours))
        assert torch.allclose(own, theirs, atol=1e-5, rtol=1e-5)
        if hasattr(peer, "get_velocity") and name not in WRONG_VELOCITY:
            theirs, own = (s.get_velocity(picture, noise, torch.as_tensor(s.timesteps)[rows]) for s in (peer, ours))
            assert torch.allclose(own, theirs, atol=1e-5)
    half = ours.add_noise(picture.half(), noise.half(), ours.timesteps[:2])
    assert half.dtype == torch.float16


@pytest.mark.parametrize("name", PUBLISHED)
def test_add_noise_before_any_times_are_set(name: str) -> None:
    """As training loops do, at any step of training."""
    peer, ours = pair(name)
    turned = {DPM, "UniPCMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler"}
    turned |= {"SASolverScheduler", "DPMSolverMultistepInverseScheduler"}
    turned |= {"RePaintScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
    turned |= {"DPMSolverSDEScheduler"}
    if name not in BETAS or not hasattr(peer, "add_noise") or peer.timesteps is None or name in turned:
        pytest.skip("the peer has no such times, or keeps its levels the other way round")
    times = torch.tensor([17, 801])
    assert torch.equal(ours.timesteps.unique(), torch.as_tensor(peer.timesteps).to(ours.timesteps).unique())
    theirs, own = (s.add_noise(start(1), start(2), times) for s in (peer, ours))
    assert torch.allclose(own, theirs, atol=1e-4, rtol=1e-5)


def test_velocities_of_levels_are_those_of_training() -> None:
    """The peer's are those of other times here."""
    _, euler = pair(EULER)
    _, plain = pair("DDPMScheduler")
    times = torch.tensor([400.0, 3.0])
    theirs, own = (s.get_velocity(start(1), start(2), times) for s in (plain, euler))
    assert torch.allclose(own, theirs, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_begin_index(name: str) -> None:
    """It rules add_noise before the first step; after that, the position does; new times undo it."""
    peer, ours = pair(name)
    if not hasattr(peer, "set_begin_index"):
        pytest.skip("the peer has none")
    for scheduler in (peer, ours):
        scheduler.set_timesteps(STEPS)
        assert (scheduler.begin_index, scheduler.step_index) == (None, None)
        scheduler.set_begin_index(2)
        assert scheduler.begin_index == 2
    if hasattr(peer, "add_noise"):
        theirs, own = (s.add_noise(start(1), start(2), torch.as_tensor(s.timesteps)[[0, 0]]) for s in (peer, ours))
        assert torch.allclose(own, theirs, atol=1e-5, rtol=1e-5)
    ours.set_timesteps(STEPS)
    assert (ours.begin_index, ours.step_index) == (None, None)
    if hasattr(peer, "index_for_timestep"):
        for own, t in zip(ours.timesteps, peer.timesteps, strict=True):
            rounded = abs(float(own - t)) > 0 or name.startswith("KDPM2Ancestral")  # twice the same, or nearly
            assert abs(ours.index_for_timestep(own) - peer.index_for_timestep(t)) <= rounded


@pytest.mark.parametrize("name", BETAS)
def test_figures_of_training(name: str) -> None:
    peer, ours = pair(name)
    for what in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(peer, what):
            assert torch.allclose(getattr(ours, what), getattr(peer, what), rtol=1e-5)
    ours.alphas_cumprod = ours.alphas_cumprod.double()
    assert ours.alphas_cumprod.dtype == torch.float64


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_steps_at_times_off_the_grid(name: str) -> None:
    peer, ours = pair(name)
    for t in (1, 333, 998):
        if name == "DDIMScheduler":
            for scheduler in (peer, ours):
                scheduler.set_timesteps(20)
        steps = [
            s.step(network(start(), t), t, start(), generator=torch.Generator().manual_seed(1)) for s in (peer, ours)
        ]
        assert_same(*[list(step.to_tuple()) for step in steps])


@pytest.mark.parametrize("options", [dict(eta=0.7), dict(use_clipped_model_output=True)], ids=str)
def test_options_of_ddim(options: dict[str, Any]) -> None:
    peer, ours = pair("DDIMScheduler", clip_sample=True, clip_sample_range=0.5)
    assert_same(walk(peer, **options), walk(ours, **options))


@pytest.mark.parametrize("name", ["DDIMScheduler", DPM])
def test_own_noise(name: str) -> None:
    changes = dict(algorithm_type="sde-dpmsolver++") if name == DPM else {}
    peer, ours = pair(name, **changes)
    options: dict[str, Any] = dict(variance_noise=start(8)) | (dict(eta=1.0) if name == "DDIMScheduler" else {})
    results = []
    for scheduler in (peer, ours):
        scheduler.set_timesteps(STEPS)
        t = scheduler.timesteps[0]
        results.append([scheduler.step(network(start(), t), t, start(), **options).prev_sample])
    assert_same(*results)
    with pytest.raises(ValueError, match="not both"):
        ours.step(start(), t, start(), generator=torch.Generator(), **options)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variances(kind: str) -> None:
    peer, ours = pair("DDPMScheduler", variance_type=kind)
    results = []
    for scheduler in (peer, ours):
        scheduler.set_timesteps(STEPS)
        said, t = torch.cat([start(1), start(2).abs()], 1), scheduler.timesteps[2]
        results.append(list(scheduler.step(said, t, start(), generator=torch.Generator().manual_seed(1)).to_tuple()))
    assert_same(*results)


def test_one_generator_for_each_sample() -> None:
    peer, ours = pair("DDPMScheduler")
    results = []
    for scheduler in (peer, ours):
        scheduler.set_timesteps(STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        t = scheduler.timesteps[0]
        results.append([scheduler.step(network(start(), t), t, start(), generator=generators).prev_sample])
    assert_same(*results)


@pytest.mark.parametrize("name", PUBLISHED)
def test_compatible_classes(name: str) -> None:
    peer, ours = pair(name)
    theirs = {made.__name__ for made in peer.compatibles}
    assert {made.__name__ for made in ours.compatibles} == theirs & set(NAMES)
    assert ours.has_compatibles
    assert ours.config_name == peer.config_name


@pytest.mark.parametrize("name", NAMES)
def test_configurations_on_disk(name: str, tmp_path: Path) -> None:
    ours = getattr(schedulers, name)()
    ours.save_config(tmp_path / "scheduler")
    said = type(ours).load_config(tmp_path, subfolder="scheduler")
    assert said["_class_name"] == name
    read, unused = type(ours).from_pretrained(
        tmp_path, subfolder="scheduler", return_unused_kwargs=True, num_train_timesteps=500, other=1
    )
    unused.pop("num_train_timesteps", None)
    assert unused == dict(other=1)
    assert dict(read.config) == {key: read.config[key] for key in ours.defaults}
    assert "num_train_timesteps" not in ours.defaults or (read.config.num_train_timesteps, len(read)) == (500, 500)
    assert type(ours).load_config(tmp_path / "scheduler", return_unused_kwargs=True, other=1) == (said, dict(other=1))
    with pytest.raises(CheckpointError):
        type(ours).load_config(tmp_path)


def test_attributes() -> None:
    """Of anyone's own, of the configuration (deprecated), and those that aren't there."""
    ours = schedulers.DDIMScheduler()
    ours.model_outputs = [1]
    assert ours.model_outputs == [1]
    ours.register_to_config(other=5)
    assert ours.config.other == 5
    with pytest.warns(FutureWarning, match="config.other"):
        assert ours.other == 5
    with pytest.raises(AttributeError, match="'DDIMScheduler' object has no attribute 'sigmas_'"):
        _ = ours.sigmas_
    assert not hasattr(ours, "sigmas")
    assert not hasattr(schedulers.EDMDPMSolverMultistepScheduler(), "betas")


@pytest.mark.parametrize("name", PUBLISHED)
def test_half_precision_draws_the_same_noise(name: str) -> None:
    """A first step in bfloat16 and its noise: the peer's, within what bfloat16 holds."""
    known = getattr(schedulers, name).defaults
    changes = dict(algorithm_type="sde-dpmsolver++") if name == DPM and "algorithm_type" in known else {}
    results = []
    for scheduler in pair(name, **changes):
        scheduler.set_timesteps(STEPS)
        x, t = (start() * size_of(scheduler)).bfloat16(), scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        batch = t.expand(len(x)) if name == "DDPMWuerstchenScheduler" else t
        more = more_of(scheduler, torch.Generator().manual_seed(3))
        results.append(scheduler.step(network(x, t).bfloat16(), batch, x, **more)[0])
    assert_same(*[[result.float()] for result in results], tolerance=0.05)


def test_times_and_levels_can_be_replaced() -> None:
    _, ours = pair(EULER)
    ours.set_timesteps(STEPS)
    ours.sigmas = ours.sigmas * 2
    ours.timesteps = ours.timesteps + 0.5
    step = ours.step(network(start(), 1), ours.timesteps[0], start())
    levels = ours.sigmas
    assert torch.allclose(step.prev_sample, start() + network(start(), 1) * (levels[1] - levels[0]), atol=1e-4)


def test_the_shell_says_what_it_cannot_do() -> None:
    ours = schedulers.LCMScheduler()
    ours.set_timesteps(4)
    with pytest.raises(IndexError, match="timestep=3 "):
        ours.step(start(), 3, start())
    with pytest.raises(TypeError):
        ours.step(start(), 3, start(), eta=1.0)
    ours.step(start(), ours.timesteps[-1], start())
    with pytest.raises(IndexError, match="has done its last step"):
        ours.step(start(), ours.timesteps[-1], start())
    pndm = schedulers.PNDMScheduler()
    with pytest.raises(ValueError, match="step_prk"):
        pndm.step_plms(start(), 1, start())
