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
from autopipeline.schedulers.named.edm import (
    CosineDPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
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
from autopipeline.schedulers.named.flow import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
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
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMPP2SAncestralScheduler",
    "DPMPP3MSDEScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "Grid",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "Noise",
    "PNDMScheduler",
    "RePaintScheduler",
    "RestartScheduler",
    "SASolverScheduler",
    "Scheduler",
    "ScoreSdeVeScheduler",
    "Solver",
    "Step",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
