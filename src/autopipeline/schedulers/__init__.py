"""Schedulers: grid x parameterisation x solver; running state belongs to the run."""

from autopipeline.schedulers.named.discrete import DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler
from autopipeline.schedulers.named.edm import CosineDPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from autopipeline.schedulers.named.exploding import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from autopipeline.schedulers.named.ratios import (
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
)
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver, Step

__all__ = [
    "CosineDPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Grid",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "Noise",
    "PNDMScheduler",
    "SASolverScheduler",
    "Scheduler",
    "Solver",
    "Step",
    "UniPCMultistepScheduler",
]
