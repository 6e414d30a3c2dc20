"""Names that people use for schedulers: what they mean, and that pipelines and the command line take them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny
from autopipeline import cli, samplers, schedulers
from autopipeline.samplers import LEVELS, SAMPLERS

SD = dict(tiny.BETAS, prediction_type="v_prediction", steps_offset=1)
PLAIN = [row.name for row in SAMPLERS if row.plain]
FLOW = [row.name for row in SAMPLERS if row.flow]
EDM = [row.name for row in SAMPLERS if row.edm]


@pytest.fixture(scope="module")
def sd(checkpoint: Callable[[str], Path]) -> ap.DiffusionPipeline:
    pipe = ap.StableDiffusionPipeline.from_pretrained(checkpoint("sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def current(name: str = "PNDMScheduler", **config: Any) -> schedulers.Scheduler:
    known = getattr(schedulers, name).defaults
    return getattr(schedulers, name)(**{key: value for key, value in (SD | config).items() if key in known})


def walked(scheduler: schedulers.Scheduler, steps: int = 6) -> torch.Tensor:
    """Where a run of steps ends, for a stand-in network."""
    grid = scheduler.grid(steps)
    solver = scheduler.solver(grid)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 4, generator=generator) * grid.init_noise_sigma
    for i in grid.indices:
        said = torch.tanh(0.3 * solver.scale(x, i))
        x = solver.step(x, said, i, lambda: torch.randn(1, 4, 4, 4, generator=generator)).x
    return x


@pytest.mark.parametrize("name", PLAIN)
def test_every_name_gives_a_scheduler_that_walks(name: str) -> None:
    before = current()
    made = samplers.scheduler(name, before)
    assert type(made).__name__ == samplers.find(name)[0].plain  # type: ignore[index]
    assert made.config["beta_end"] == SD["beta_end"]
    assert type(before) is schedulers.PNDMScheduler
    if made.config["prediction_type"] == "v_prediction":
        assert torch.isfinite(walked(made)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_a_name_means_the_same_after_any_other(name: str) -> None:
    alone = samplers.scheduler(name, current())
    for other in PLAIN:
        before = samplers.scheduler(other, current())
        after = samplers.scheduler(name, before)
        known = set(alone.defaults) & set(before.defaults) & {"algorithm_type", "solver_type", "solver_order"}
        assert {key: after.config[key] for key in known} == {key: alone.config[key] for key in known}, other


@pytest.mark.parametrize("name", FLOW)
def test_names_for_flow_models(name: str) -> None:
    made = samplers.scheduler(name, schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert type(made).__name__ == samplers.find(name)[0].flow  # type: ignore[index]
    assert made.config.get("flow_shift", made.config.get("shift")) == 3.0
    back = samplers.scheduler("Euler", made)
    assert type(back) is schedulers.FlowMatchEulerDiscreteScheduler
    assert torch.isfinite(walked(made)).all()


@pytest.mark.parametrize("name", EDM)
def test_names_for_edm_models(name: str) -> None:
    before = schedulers.EDMDPMSolverMultistepScheduler(sigma_max=60.0)
    made = samplers.scheduler(name + " Exponential", before)
    assert type(made).__name__ == samplers.find(name)[0].edm  # type: ignore[index]
    assert (made.config["sigma_max"], made.config["sigma_schedule"]) == (60.0, "exponential")


@pytest.mark.parametrize(
    ("spellings", "class_name", "config"),
    [
        (["Euler a", "euler_ancestral", "k_euler_a", "Euler Ancestral"], "EulerAncestralDiscreteScheduler", {}),
        (["DPM++ 2M", "dpmpp_2m", "sample_dpmpp_2m", "dpm++-2m"], "DPMSolverMultistepScheduler", {}),
        (
            ["DPM++ 2M SDE Karras", "dpmpp_2m_sde karras", "DPM++ 2m sde KARRAS"],
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        (["DPM2 a Karras", "dpm_2_ancestral karras"], "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        (["Euler SGM Uniform", "euler sgm_uniform"], "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        (["euler ddim_uniform"], "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        (["ddim", "DDIM"], "DDIMScheduler", {}),
        (["uni_pc", "UniPC", "unipc"], "UniPCMultistepScheduler", {}),
        (["PLMS", "pndm", "PNDMScheduler"], "PNDMScheduler", {}),
        (["EulerDiscreteScheduler", "euler-discrete", "euler"], "EulerDiscreteScheduler", {}),
        (["dpmsolver-multistep", "DPMSolverMultistep"], "DPMSolverMultistepScheduler", {}),
    ],
)
def test_spellings(spellings: list[str], class_name: str, config: dict[str, Any]) -> None:
    for name in spellings:
        made = samplers.scheduler(name, current())
        assert type(made).__name__ == class_name, name
        assert {key: made.config[key] for key in config} == config


def test_latents_are_not_clipped() -> None:
    """A configuration that says nothing of clipping belongs to a latent model; one that does is heeded."""
    assert samplers.scheduler("DDIM", current("EulerDiscreteScheduler")).config["clip_sample"] is False
    assert samplers.scheduler("DDPM", current("DDIMScheduler", clip_sample=True)).config["clip_sample"] is True


def test_a_name_says_the_whole_combination() -> None:
    """Without a word for the noise levels, those of an earlier name don't stay."""
    karras = samplers.scheduler("DPM++ 2M Karras", current())
    assert karras.config["use_karras_sigmas"]
    assert not samplers.scheduler("DPM++ 2M", karras).config["use_karras_sigmas"]


@pytest.mark.parametrize(
    ("name", "before", "sentence"),
    [
        ("eula", "PNDMScheduler", "There is no scheduler 'eula'; the nearest are Euler"),
        ("DPM++ 2N", "PNDMScheduler", "There is no scheduler 'DPM++ 2N'; the nearest are DPM++ 2"),
        ("", "PNDMScheduler", "There is no scheduler ''."),
        ("++", "PNDMScheduler", "There is no scheduler '++'"),
        ("DDIM Karras", "PNDMScheduler", "DDIMScheduler has no Karras noise levels; it can have Normal, SGM Uniform"),
        ("UniPC", "EDMDPMSolverMultistepScheduler", "UniPC does not fit a model of the kind of Karras et al. 2022"),
        (
            "Euler a",
            "FlowMatchEulerDiscreteScheduler",
            "Euler a does not fit a model of the flow-matching kind",
        ),
    ],
)
def test_names_that_mean_nothing(name: str, before: str, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        samplers.scheduler(name, current(before))
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize("row", SAMPLERS, ids=lambda row: row.name)
def test_labels_are_names_again(row: samplers.Sampler) -> None:
    made = samplers.scheduler(row.name, current())
    label = samplers.label(type(made).__name__, made.config)
    again = samplers.scheduler(label, current())
    assert (type(again), dict(again.config)) == (type(made), dict(made.config))
    if "use_karras_sigmas" in made.defaults:
        assert samplers.label(type(made).__name__, made.config | {"use_karras_sigmas": True}).endswith(" Karras")


CALL = dict(num_inference_steps=5, seed=3, output_type="np", height=32, width=32)


def test_a_call_takes_a_scheduler(sd: Any) -> None:
    """By name or as an object, for this call alone; or one for each prompt."""
    own = sd.scheduler
    named = sd("a cat", scheduler="DPM++ 2M Karras", **CALL).images
    made = samplers.scheduler("DPM++ 2M Karras", own)
    given = sd("a cat", scheduler=made, **CALL).images
    plain = sd("a cat", **CALL).images
    assert sd.scheduler is own
    assert np.array_equal(named, given)
    assert not np.array_equal(named, plain)
    each = sd(["a cat", "a cat"], scheduler=["DPM++ 2M Karras", "DDIM"], **(CALL | dict(seed=[3, 3]))).images
    assert np.allclose(each[0], named[0], atol=1e-5)
    assert not np.allclose(each[1], each[0], atol=1e-2)


def test_a_call_refuses_what_is_no_scheduler(sd: ap.DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="scheduler=7 has to be a scheduler, or the name of one"):
        sd("a cat", scheduler=7, **CALL)
    with pytest.raises(ValueError, match="There is no scheduler 'eula'"):
        sd("a cat", scheduler="eula", **CALL)


def test_eight_threads_with_different_schedulers_on_one_pipeline(sd: Any) -> None:
    """The pictures of one after the other."""
    names = ["Euler", "Euler a", "DPM++ 2M Karras", "DPM++ 2M SDE", "UniPC", "DDIM", "PLMS", "Heun"]
    calls = [CALL | dict(scheduler=name, num_inference_steps=4 + k, seed=k) for k, name in enumerate(names)]
    serial = [sd("a cat", **call).images for call in calls]
    together: list[Any] = [None] * len(calls)

    def work(k: int) -> None:
        together[k] = sd("a cat", **calls[k]).images

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone, beside in zip(serial, together, strict=True):
        assert np.array_equal(alone, beside)


def test_the_command_line_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schedulers"]) == 0
    shown = capsys.readouterr().out
    for row in SAMPLERS:
        assert row.name in shown
        assert (row.plain or "") in shown
    assert all(word in shown for word in LEVELS)
    assert cli.run(["schedulers", "--json"]) == 0
    assert '"DPM++ 2M SDE Heun"' in capsys.readouterr().out


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_flow_families_take_every_name_that_is_for_flows(family: str, checkpoint: Callable[[str], Path]) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(family))
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a cat", **CALL).images
    for name in FLOW:
        picture = pipe("a cat", scheduler=name, **CALL).images
        assert np.isfinite(picture).all()
        assert (name == "Euler") == np.array_equal(picture, plain)
    with pytest.raises(ValueError, match="Euler a does not fit a model of the flow-matching kind"):
        pipe("a cat", scheduler="Euler a", **CALL)
