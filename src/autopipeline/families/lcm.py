"""Latent Consistency Models (Luo et al. 2023): Stable Diffusion in a few steps, the guidance scale as an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autopipeline.families import stable_diffusion as sd
from autopipeline.guidance import Unguided
from autopipeline.stage import Family, Run, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from torch import Tensor

    from autopipeline.schedulers import Grid

_REST = (
    dict(original_inference_steps=None, timesteps=None, guidance_scale=8.5)
    | dict(num_images_per_prompt=1, generator=None, latents=None, prompt_embeds=None)
    | sd.LAST
    | dict(clip_skip=None)
    | sd.CALLBACK
)
_TENSORS = ("latents", "denoised", "prompt_embeds", "w_embedding")

TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, height=None, width=None, num_inference_steps=4) | _REST,
    tensors=_TENSORS,
)
IMAGE2IMAGE = TaskRow(
    task=Image2Image,
    params=dict(prompt=None, image=None, num_inference_steps=4, strength=0.8) | _REST,
    tensors=_TENSORS,
)
INPAINT = TaskRow(
    task=Inpaint,
    params=dict(prompt=None, image=None, mask_image=None, masked_image_latents=None, height=None, width=None)
    | dict(padding_mask_crop=None, num_inference_steps=4, strength=1.0)
    | _REST,
    tensors=(*_TENSORS, "mask", "masked_image_latents"),
)


def stages(components: Mapping[str, Any], run: Run) -> tuple[Stage, ...]:
    """Stable Diffusion's stage: one branch, the scheduler takes `strength` itself, the last clean picture leaves."""
    scheduler = components["scheduler"]

    def schedule(run: Run) -> Grid:
        own = run["timesteps"]
        extra = {"original_inference_steps": run["original_inference_steps"], "strength": run.get("strength", 1.0)}
        steps = None if own is not None else run["num_inference_steps"]
        return scheduler.grid(steps, timesteps=own, device=components["unet"].device, **extra)

    (stage,) = sd.stages(components, run)
    return (
        replace(
            stage,
            schedule=schedule,
            guide=_unguided,
            emit=_clean if run.get("mask_image") is None else stage.emit,  # there, what is kept is in x alone
            public={**stage.public, "timestep_cond": "w_embedding"},
        ),
    )


def _unguided(run: Run) -> Unguided:
    return Unguided()


def _clean(x: Tensor, x0: Tensor) -> Tensor:
    return x0


def check(components: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """What Stable Diffusion refuses, and a U-Net that does not take the guidance scale."""
    sd.check(components, args)
    if "original_inference_steps" not in components["scheduler"].defaults:  # a config keeps keys of other classes
        raise ValueError(
            "A latent consistency model needs LCMScheduler; "
            f"{type(components['scheduler']).__name__} does not know the steps that it was distilled on."
        )
    if components["unet"].config.time_cond_proj_dim is None:
        raise ValueError(
            "This unet does not take the guidance scale as an input (time_cond_proj_dim is null), so it is no LCM; "
            "load the checkpoint as a StableDiffusionPipeline, with LCMScheduler if it was distilled as a LoRA."
        )


FAMILY = Family(
    key="lcm",
    stem="LatentConsistencyModel",
    slots=sd.SLOTS,
    settings={"requires_safety_checker": True},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=sd.finish,
    check=check,
    size=sd.default_size,
    adopt=sd.adopt,
)
