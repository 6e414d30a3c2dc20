"""Schedulers: grid x parameterisation x solver; running state belongs to the run."""

from autopipeline.schedulers.named.continuous import (
    CMStochasticIterativeScheduler,
    DDPMWuerstchenScheduler,
    IPNDMScheduler,
    ScoreSdeVeScheduler,
)
from autopipeline.schedulers.named.discrete import (
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
    RePaintScheduler,
    TCDScheduler,
    UnCLIPScheduler,
)
from autopipeline.schedulers.named.edm import EDMDPMSolverMultistepScheduler
from autopipeline.schedulers.named.exploding import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from autopipeline.schedulers.named.flow import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler, Solver, Step

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "Grid",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "Noise",
    "PNDMScheduler",
    "RePaintScheduler",
    "Scheduler",
    "ScoreSdeVeScheduler",
    "Solver",
    "Step",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
