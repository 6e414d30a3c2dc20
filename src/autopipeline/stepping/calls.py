"""How scripts call the published classes: signatures of `set_timesteps` and `step`, and what a step gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

DEFAULTS: Mapping[str, Any] = dict(
    return_dict=True, use_clipped_model_output=False, strength=1.0, order=4, jump_length=10, jump_n_sample=10
) | dict(eta=0.0, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0)
"""Of the keywords that are not None by default."""
CHURN = "s_churn s_tmin s_tmax s_noise"
KARRAS = (
    *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "EulerAncestralDiscrete"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep"),
    *("UniPCMultistep", "DPMSolverSDE", "EDMEuler"),
)
"""Classes that can take over the configurations of one another, and of all others but those alone."""
ALONE = (
    *("DDIMInverse", "DDPMWuerstchen", "UnCLIP", "RePaint", "IPNDM", "LCM", "TCD", "CMStochasticIterative"),
    *("ScoreSdeVe", "EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
)


class Call(NamedTuple):
    """One class: keywords of a step, those of set_timesteps, and what a step gives beside the sample.

    `at_any_time`: each step is taken at the time it is told, with `to_next` to the next one of the grid; otherwise a
    step follows the one before, and times say where the walk begins. `unknown_is_last`: a time that is not on the grid
    counts as its last one, instead of being an error. `draws_in_single`: noise is drawn in single precision, whatever
    the network's. `noises_by_step`: add_noise goes by steps of training, wherever the walk stands.
    """

    step: str = "generator return_dict"
    grid: str = ""
    gives: str = ""
    at_any_time: bool = False
    to_next: bool = False
    unknown_is_last: bool = False
    draws_in_single: bool = False
    noises_by_step: bool = False

    def keywords(self, what: str) -> dict[str, Any]:
        """Of `step` or `set_timesteps`, with their defaults."""
        words = self.step if what == "step" else self.grid
        if what != "step" and "device" not in words:
            words = "num_inference_steps device " + words
        pairs = [word.partition("=") for word in words.split()]
        return {name: float(value) if value else DEFAULTS.get(name) for name, _, value in pairs}


CLEAN, DENOISED = "pred_original_sample", "denoised"
CALLS: Mapping[str, Call] = {
    "DDIM": Call("eta use_clipped_model_output generator variance_noise return_dict", "", CLEAN, at_any_time=True),
    "CogVideoXDDIM": Call(
        "eta use_clipped_model_output generator variance_noise return_dict", "", CLEAN, at_any_time=True
    ),
    "CogVideoXDPM": Call(gives=CLEAN, at_any_time=True),
    "DDIMInverse": Call("return_dict", "", CLEAN, at_any_time=True),
    "DDPM": Call(grid="timesteps", gives=CLEAN, at_any_time=True, to_next=True),
    "DDPMWuerstchen": Call(grid="num_inference_steps timesteps device"),
    "UnCLIP": Call("prev_timestep generator return_dict", "", CLEAN, at_any_time=True),
    "RePaint": Call(
        "original_image mask generator return_dict",
        "num_inference_steps jump_length jump_n_sample device",
        CLEAN,
        at_any_time=True,
    ),
    "PNDM": Call("return_dict"),
    "IPNDM": Call("return_dict"),
    "LCM": Call(grid="original_inference_steps timesteps strength", gives=DENOISED),
    "TCD": Call("eta=0.3 generator return_dict", "original_inference_steps timesteps strength", "pred_noised_sample"),
    "CMStochasticIterative": Call(grid="timesteps"),
    "ScoreSdeVe": Call(grid="num_inference_steps sampling_eps device"),
    "EulerDiscrete": Call(f"{CHURN} generator return_dict", "timesteps sigmas", CLEAN),
    "EulerAncestralDiscrete": Call(gives=CLEAN),
    "HeunDiscrete": Call("return_dict", "num_train_timesteps timesteps", CLEAN),
    "LMSDiscrete": Call("order return_dict", "", CLEAN),
    "KDPM2Discrete": Call("return_dict", "num_train_timesteps", CLEAN),
    "KDPM2AncestralDiscrete": Call(grid="num_train_timesteps", gives=CLEAN),
    "DPMSolverSDE": Call("return_dict s_noise", "num_train_timesteps", CLEAN),
    "EDMEuler": Call(f"{CHURN} generator return_dict pred_original_sample", "sigmas", CLEAN),
    "EDMDPMSolverMultistep": Call(unknown_is_last=True),
    "CosineDPMSolverMultistep": Call(unknown_is_last=True),
    "DPMSolverMultistep": Call(
        "generator variance_noise return_dict", "mu timesteps", unknown_is_last=True, draws_in_single=True
    ),
    "DPMSolverMultistepInverse": Call("generator variance_noise return_dict", unknown_is_last=True),
    "DPMSolverSinglestep": Call(grid="mu timesteps", unknown_is_last=True),
    "DEISMultistep": Call("return_dict", "mu", unknown_is_last=True),
    "UniPCMultistep": Call("return_dict", "sigmas mu", unknown_is_last=True),
    "SASolver": Call(unknown_is_last=True, noises_by_step=True),
    "FlowMatchEulerDiscrete": Call(f"{CHURN} generator per_token_timesteps return_dict", "sigmas mu timesteps"),
    "FlowMatchHeunDiscrete": Call(f"{CHURN} generator return_dict"),
    "FlowMatchLCM": Call(grid="sigmas mu timesteps"),
}
