"""Schedulers: grid x parameterisation x solver; running state belongs to the run."""

from autopipeline.schedulers.named import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver, Step

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Grid",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "Noise",
    "PNDMScheduler",
    "Scheduler",
    "Solver",
    "Step",
    "UniPCMultistepScheduler",
]
