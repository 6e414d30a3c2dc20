"""The names that people use for schedulers, such as "DPM++ 2M SDE Karras": a solver, and which noise levels it walks.

The names are those of A1111 and its relatives; k-diffusion's and ComfyUI's spellings, and class names, mean the same.
The tables import nothing heavy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autopipeline.schedulers import Scheduler

Changes = Mapping[str, Any]


class Sampler(NamedTuple):
    """A named solver: its class for each formulation that a model can have, and what is set in its configuration."""

    name: str
    plain: str | None  # the class for models that predict noise or velocity
    config: Changes = MappingProxyType({})
    aliases: tuple[str, ...] = ()
    flow: str | None = None  # the class for flow-matching models
    edm: str | None = None  # the class for models in the preconditioning of Karras et al. 2022


_DPM, _EDM = "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"
_SINGLE, _FLOW = "DPMSolverSinglestepScheduler", "FlowMatch{}Scheduler"
_SDE, _HEUN = {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}
_THIRD = {"solver_order": 3}

SAMPLERS: tuple[Sampler, ...] = (
    Sampler("Euler", "EulerDiscreteScheduler", flow=_FLOW.format("EulerDiscrete"), edm="EDMEulerScheduler"),
    Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    Sampler("Heun", "HeunDiscreteScheduler", flow=_FLOW.format("HeunDiscrete")),
    Sampler("LMS", "LMSDiscreteScheduler"),
    Sampler("DPM2", "KDPM2DiscreteScheduler", aliases=("dpm 2", "kdpm2")),
    Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", aliases=("dpm 2 a", "kdpm2 a")),
    Sampler("DPM++ 2M", _DPM, aliases=("dpmsolver++", "dpmsolver"), flow=_DPM, edm=_EDM),
    Sampler("DPM++ 2M SDE", _DPM, _SDE, flow=_DPM, edm=_EDM),
    Sampler("DPM++ 2M SDE Heun", _DPM, _SDE | _HEUN, flow=_DPM, edm=_EDM),
    Sampler("DPM++ 3M", _DPM, _THIRD, flow=_DPM, edm=_EDM),
    Sampler("DPM++ 3M SDE", "DPMPP3MSDEScheduler"),
    Sampler("DPM++ 2S", _SINGLE, flow=_SINGLE),
    Sampler("DPM++ 2S a", "DPMPP2SAncestralScheduler"),
    Sampler("DPM++ SDE", "DPMSolverSDEScheduler"),
    Sampler("UniPC", "UniPCMultistepScheduler", aliases=("uni pc", "uni pc bh2"), flow="UniPCMultistepScheduler"),
    Sampler("DEIS", "DEISMultistepScheduler", flow="DEISMultistepScheduler"),
    Sampler("SA-Solver", "SASolverScheduler", flow="SASolverScheduler"),
    Sampler("Restart", "RestartScheduler"),
    Sampler("DDIM", "DDIMScheduler"),
    Sampler("DDPM", "DDPMScheduler"),
    Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}, aliases=("pndm",)),
    Sampler("LCM", "LCMScheduler", flow=_FLOW.format("LCM")),
    Sampler("TCD", "TCDScheduler"),
)
LEVELS: Mapping[str, Changes] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
    "Lu": {"use_lu_lambdas": True},
    "Normal": {"timestep_spacing": "linspace"},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "DDIM Uniform": {"timestep_spacing": "leading"},
}
"""The words that may follow a solver's name, and what they set: which noise levels are walked."""

_OWN = (
    *("algorithm_type", "solver_type", "solver_order", "predict_x0"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)
"""What a name decides: keys that don't go over from another solver's configuration."""


def bare(name: str) -> str:
    """A name without what spellings differ in: case, separators, "++" or "pp", "ancestral" or "a"."""
    words = name.lower().replace("++", "pp").replace("ancestral", "a")
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(sample|k)[ _-]", "", words))


def _known() -> dict[str, tuple[Sampler, str]]:
    """Every name that means a sampler, by its bare form: alone, and with each word for the noise levels."""
    found: dict[str, tuple[Sampler, str]] = {}
    for sampler in SAMPLERS:
        for name in (sampler.name, *sampler.aliases):
            for word in ("", *LEVELS):
                found.setdefault(bare(f"{name} {word}"), (sampler, word))
    return found


def find(name: str) -> tuple[Sampler, str] | None:
    """The sampler and the word for its noise levels that a name means; None where it is none of these names."""
    return _known().get(bare(name)) if name.strip() else None


def scheduler(name: str, current: Scheduler) -> Scheduler:
    """The scheduler that a name means, for the model that `current` belongs to (its betas, prediction type, shift).

    `name` is a sampler's, in any spelling, or a class name or its beginning ("ddim", "DPMSolverMultistep"). A sampler's
    name says the whole combination: without a word for them, noise levels are the plain ones.

    Raises ValueError for a name that means nothing (with the nearest), and for a combination that can't be.
    """
    from autopipeline import schedulers

    found = find(name)
    if found is None:
        return getattr(schedulers, _class_name(name)).from_config(current.config)
    sampler, word = found
    kind = formulation(current.config)
    class_name = {"flow": sampler.flow, "edm": sampler.edm}.get(kind, sampler.plain)
    if class_name is None:
        able = [row.name for row in SAMPLERS if getattr(row, kind)]
        raise ValueError(f"{sampler.name} does not fit a model of the {KINDS[kind]}; it takes {', '.join(able)}.")
    target = getattr(schedulers, class_name)
    changes = {key: target.defaults[key] for key in _OWN if key in target.defaults}
    if "clip_sample" in target.defaults and "clip_sample" not in current.config:
        changes["clip_sample"] = False  # the classes' own default is for pixels; latents don't end at 1
    changes |= dict(sampler.config) | _levels(target, word) | _flow(target, current.config, kind)
    return target.from_config(current.config, **changes)


def label(class_name: str, config: Mapping[str, Any]) -> str:
    """What people call a scheduler, from its class and configuration; the class name where they have no word for it."""
    for row in sorted(SAMPLERS, key=lambda row: -len(row.config)):
        own = class_name in (row.plain, row.flow, row.edm)
        if own and all(config.get(key) == value for key, value in row.config.items()):
            words = [word for word in ("Karras", "Exponential", "Beta", "Lu") if _has(config, word)]
            return " ".join([row.name, *words])
    return class_name.removesuffix("Scheduler")


def _has(config: Mapping[str, Any], word: str) -> bool:
    return bool(config.get(next(iter(LEVELS[word])))) or config.get("sigma_schedule") == word.lower()


KINDS = {
    "plain": "usual kind",
    "flow": "flow-matching kind",
    "edm": "kind of Karras et al. 2022 (EDM)",
}


def formulation(config: Mapping[str, Any]) -> str:
    """What a model was trained for, from its scheduler's configuration: "plain", "flow" or "edm"."""
    if "sigma_data" in config:
        return "edm"
    flows = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return "flow" if flows or ("shift" in config and "beta_start" not in config) else "plain"


def _levels(target: Any, word: str) -> dict[str, Any]:
    wanted = LEVELS[word] if word else {}
    if "sigma_schedule" in target.defaults and word in ("Karras", "Exponential"):
        return {"sigma_schedule": word.lower()}
    for key in wanted:
        if key not in target.defaults:
            able = [other for other, sets in LEVELS.items() if set(sets) <= set(target.defaults)]
            can = f"it can have {', '.join(able)}" if able else "it has levels of its own"
            raise ValueError(f"{target.__name__} has no {word} noise levels; {can}.")
    return dict(wanted)


def _flow(target: Any, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a solver for any formulation has to be told of a flow-matching model."""
    if kind != "flow" or "use_flow_sigmas" not in target.defaults:
        return {}
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _class_name(name: str) -> str:
    """The scheduler class that a name means: its class name, or the beginning of it in any spelling."""
    from autopipeline import schedulers

    def short(text: str) -> str:
        return bare(text).removesuffix("scheduler").replace("discrete", "")

    able = {short(known): known for known in schedulers.__all__ if known.endswith("Scheduler") and known != "Scheduler"}
    wanted = short(name)
    starts = [known for known in able if known.startswith(wanted)]
    if wanted in able:
        return able[wanted]
    if wanted and starts:
        return able[min(starts, key=len)]
    names = {bare(row.name): row.name for row in SAMPLERS} | able
    near = difflib.get_close_matches(wanted, names, 3, 0.3)
    nearest = f"; the nearest are {', '.join(names[match] for match in near)}" if near else ""
    raise ValueError(f"There is no scheduler {name!r}{nearest}.")
