"""The tasks of Flux, alone and with control pictures: parameters, in the order and with the defaults users know."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from autopipeline.addons import controlnet_streams
from autopipeline.spaces import Packed
from autopipeline.stage import Run, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image, sampled_rows
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

PROMPTS = dict(prompt=None, prompt_2=None)
NEGATIVE = dict(negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0)
SIZE = dict(height=None, width=None)
STEPS = dict(num_inference_steps=28, sigmas=None)
DRAWS = dict(num_images_per_prompt=1, generator=None, latents=None)
EMBEDS = dict(prompt_embeds=None, pooled_prompt_embeds=None)
NEGATIVE_EMBEDS = dict(negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
LAST = dict(
    output_type="pil",
    return_dict=True,
    joint_attention_kwargs=None,
    callback_on_step_end=None,
    callback_on_step_end_tensor_inputs=("latents",),
    max_sequence_length=512,
)
TENSORS = ("latents", "prompt_embeds")


def guided_params(begin: dict[str, Any], scale: float, middle: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of a task with negative prompts, from those of its inputs."""
    after = dict(guidance_scale=scale) | (middle or {}) | DRAWS | EMBEDS | NEGATIVE_EMBEDS | LAST
    return PROMPTS | NEGATIVE | begin | STEPS | after


TEXT2IMAGE = TaskRow(task=Text2Image, params=guided_params(SIZE, 3.5), tensors=TENSORS)
IMAGE2IMAGE = TaskRow(
    task=SharedImage2Image, params=guided_params(dict(image=None) | SIZE | dict(strength=0.6), 7.0), tensors=TENSORS
)
INPAINT = TaskRow(
    task=Blend,
    params=guided_params(
        dict(image=None, mask_image=None, masked_image_latents=None)
        | SIZE
        | dict(padding_mask_crop=None, strength=0.6),
        7.0,
    ),
    tensors=TENSORS,
)


def plain_params(begin: dict[str, Any], scale: float, middle: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of a task without negative prompts."""
    return PROMPTS | begin | STEPS | dict(guidance_scale=scale) | (middle or {}) | DRAWS | EMBEDS | LAST


_CONTROL, _STRONG = dict(control_image=None), dict(strength=0.6)
_MASKS = dict(mask_image=None, masked_image_latents=None)


class MaskedFirst(Blend):
    """Users know pictures before which the posterior of the masked picture was drawn first of all, and never used."""

    def __init__(self, stage: Stage, run: Run) -> None:
        super().__init__(stage, run)
        space = cast(Packed, stage.space)
        pictures = sampled_rows(run, len(space.masked_pixels(run)[0]), self.apart)
        run.random.normal((pictures, space.channels, space.height, space.width), dtype=stage.dtype, device=stage.device)

    def _masked(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self._source()


CONTROL = {
    "text2image": TaskRow(task=Text2Image, params=plain_params(_CONTROL | SIZE, 3.5), tensors=TENSORS),
    "image2image": TaskRow(
        task=SharedImage2Image,
        params=plain_params(dict(image=None) | _CONTROL | SIZE | _STRONG, 7.0),
        tensors=TENSORS,
    ),
    "inpaint": TaskRow(
        task=MaskedFirst,
        params=plain_params(dict(image=None) | _CONTROL | _MASKS | SIZE | _STRONG, 7.0),
        tensors=TENSORS,
    ),
}
CONTROLNET = {
    "text2image": TaskRow(
        task=Text2Image,
        params=guided_params(SIZE, 7.0, controlnet_streams.params(picture=True)),
        tensors=(*TENSORS, "control_image"),
    ),
    "image2image": TaskRow(
        task=SharedImage2Image,
        params=plain_params(dict(image=None) | _CONTROL | SIZE | _STRONG, 7.0, controlnet_streams.params()),
        tensors=(*TENSORS, "control_image"),
    ),
    "inpaint": TaskRow(
        task=Blend,
        params=plain_params(
            dict(image=None) | _MASKS | _CONTROL | SIZE | _STRONG | dict(padding_mask_crop=None, sigmas=None),
            7.0,
            controlnet_streams.params(),
        ),
        tensors=(*TENSORS, "control_image", "mask", "masked_image_latents"),
        pasted=False,  # users know the part by itself
    ),
}
