"""Schedulers: grid x parameterisation x solver; running state belongs to the run."""

from autopipeline.schedulers.named.discrete import DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler
from autopipeline.schedulers.named.edm import EDMDPMSolverMultistepScheduler
from autopipeline.schedulers.named.exploding import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler
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
