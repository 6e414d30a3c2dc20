"""Schedulers: grid x parameterisation x solver; running state belongs to the run."""

from autopipeline.schedulers.named.discrete import DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler
from autopipeline.schedulers.named.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from autopipeline.schedulers.named.exploding import (
    DPMPP2SAncestralScheduler,
    DPMPP3MSDEScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    RestartScheduler,
)
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver, Step

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMPP2SAncestralScheduler",
    "DPMPP3MSDEScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "Grid",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "Noise",
    "PNDMScheduler",
    "RestartScheduler",
    "Scheduler",
    "Solver",
    "Step",
    "UniPCMultistepScheduler",
]
