"""Schedulers: grid x parameterisation x solver; running state belongs to the run.

Names are looked up when they are used, so that listing them needs no torch; `autopipeline.stub` writes their types.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMED = {
    "continuous": "CMStochasticIterative CosineDPMSolverMultistep DDPMWuerstchen EDMDPMSolverMultistep EDMEuler IPNDM "
    "ScoreSdeVe",
    "discrete": "CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel LCM PNDM RePaint TCD "
    "UnCLIP",
    "exploding": "DPMPP2SAncestral DPMPP3MSDE DPMSolverSDE EulerAncestralDiscrete EulerDiscrete HeunDiscrete "
    "KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete Restart",
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM",
    "multistep": "DEISMultistep DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep SASolver "
    "UniPCMultistep",
}
HOMES = {f"{__name__}.named.{home}": [f"{name}Scheduler" for name in names.split()] for home, names in _NAMED.items()}
"""The public schedulers, by the modules that they live in."""
PUBLIC = {name: home for home, names in HOMES.items() for name in names} | dict.fromkeys(
    ("Grid", "Scheduler", "Solver", "Step"), f"{__name__}.scheduler"
)
PUBLIC["Noise"] = "autopipeline.noise"
__all__ = sorted(PUBLIC)  # type: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
