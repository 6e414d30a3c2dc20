"""Kandinsky 2.2: a prior imagines the embedding of a picture, a U-Net makes the picture of it alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autopipeline.families import callbacks, unclip
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.unclip import PRIOR_CALLBACK, PRIOR_STEPS, SIZE, STEPS, Components
from autopipeline.stage import Cond, Family, Run, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.text2image import Text2Image

_TENSORS = ("latents", "image_embeds", "negative_image_embeds")
_MASKED = (*_TENSORS, "masked_image", "mask_image")
_ONE = dict(num_images_per_prompt=1)
_DRAWS = dict(generator=None, latents=None, output_type="pil")
_AGAINST = dict(negative_prompt=None)
_TAIL = dict(return_dict=True) | PRIOR_CALLBACK | sd.CALLBACK

TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=dict(prompt=None) | _AGAINST | STEPS | _ONE | SIZE | PRIOR_STEPS | _DRAWS | callbacks.PARAMS | _TAIL,
        tensors=_TENSORS,
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=dict(prompt=None, image=None)
        | _AGAINST
        | STEPS
        | dict(strength=0.3)
        | _ONE
        | SIZE
        | PRIOR_STEPS
        | _DRAWS
        | callbacks.PARAMS
        | _TAIL,
        tensors=_TENSORS,
    ),
    "inpaint": TaskRow(
        task=unclip.Repaint,
        params=dict(prompt=None, image=None, mask_image=None)
        | _AGAINST
        | STEPS
        | _ONE
        | SIZE
        | PRIOR_STEPS
        | _DRAWS
        | _TAIL
        | callbacks.PARAMS,
        tensors=_MASKED,
    ),
}

_END = dict(output_type="pil", return_dict=True) | sd.CALLBACK | callbacks.PARAMS
_BEGUN = SIZE | STEPS | dict(strength=0.3) | _ONE | dict(generator=None)
_NOISE = SIZE | STEPS | _ONE | dict(generator=None, latents=None)

DECODER_TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=dict(image_embeds=None, negative_image_embeds=None) | _NOISE | _END,
        tensors=_TENSORS,
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=dict(image_embeds=None, image=None, negative_image_embeds=None) | _BEGUN | _END,
        tensors=_TENSORS,
    ),
    "inpaint": TaskRow(
        task=unclip.Repaint,
        params=dict(image_embeds=None, image=None, mask_image=None, negative_image_embeds=None) | _NOISE | _END,
        tensors=_MASKED,
    ),
}


def condition(run: Run, x: Tensor) -> Cond:
    """The embeddings of pictures are all that the U-Net sees."""
    return {"image_embeds": unclip.image_rows(run)}


def decoder_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of MoVQ."""
    return (unclip.decoder_stage(components, run, condition, {"image_embeds": "image_embeds"}),)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """Prior and decoder."""
    return unclip.chained(components, run, *decoder_stages(components, run))


_NONE: dict[str, Any] = {}

PRIOR = Family(
    key="kandinsky22-prior",
    stem="KandinskyV22Prior",
    slots=unclip.PRIOR_SLOTS,
    settings=_NONE,
    tasks={"text2image": unclip.PRIOR_ROW},
    stages=unclip.prior_stages,
    finish=unclip.prior_finish,
    check=unclip.prior_check,
    size=unclip.size,
)
DECODER = Family(
    key="kandinsky22-decoder",
    stem="KandinskyV22",
    slots=unclip.DECODER_SLOTS,
    settings=_NONE,
    tasks=DECODER_TASKS,
    stages=decoder_stages,
    finish=unclip.decoder_finish,
    check=unclip.decoder_check,
    read=unclip.decoder_read,
    size=unclip.size,
)
FAMILY = Family(
    key="kandinsky22",
    stem="KandinskyV22",
    slots=unclip.DECODER_SLOTS | unclip.LINKED_SLOTS,
    settings=_NONE,
    tasks=TASKS,
    stages=stages,
    finish=unclip.decoder_finish,
    check=unclip.check,
    read=callbacks.read,
    size=unclip.size,
    linked="prior",
)
