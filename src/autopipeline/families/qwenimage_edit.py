"""Qwen-Image-Edit (Qwen team 2025): a picture stands beside the prompt, and its latents beside those of the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux, qwenimage
from autopipeline.families.qwenimage import DRAWS, EMBEDS, LAST, SIZE, STEPS, TENSORS, Texts
from autopipeline.spaces import factor
from autopipeline.stage import Cond, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import repeat_to
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

_ALL = {**qwenimage.SLOTS, "processor": Slot(("Qwen2VLProcessor",), optional=True)}
SLOTS = {name: _ALL[name] for name in ("vae", "text_encoder", "tokenizer", "processor", "transformer", "scheduler")}
BEFORE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
INSTRUCTION = 64
"""Tokens of `BEFORE`, whose states are dropped."""
LOOK = "<|vision_start|><|image_pad|><|vision_end|>"
AREA = 1024 * 1024
"""Pixels that a picture is scaled to."""

_BEGIN, _TEXTS = dict(image=None), dict(prompt=None, negative_prompt=None)
_SCALE: dict[str, Any] = dict(true_cfg_scale=4.0)
_MASK = dict(mask_image=None, masked_image_latents=None)


class Repaint(Blend):
    """The picture that is kept outside the mask is the one to look at, too."""

    def condition(self) -> Cond:
        """Its latents (B, L, C)."""
        return {"reference": self._source()}


EDIT = TaskRow(
    task=Text2Image,
    params=_BEGIN | _TEXTS | _SCALE | SIZE | STEPS | DRAWS | EMBEDS | LAST,
    tensors=TENSORS,
)
INPAINT = TaskRow(
    task=Repaint,
    params=_BEGIN
    | _TEXTS
    | _MASK
    | _SCALE
    | SIZE
    | dict(padding_mask_crop=None, strength=0.6)
    | STEPS
    | DRAWS
    | EMBEDS
    | LAST,
    tensors=TENSORS,
)


def scaled(size: tuple[int, int], area: int = AREA) -> tuple[int, int]:
    """Height and width of about so many pixels, in the proportions of `size` (width, height)."""
    ratio = size[0] / size[1]
    width = (area * ratio) ** 0.5
    return round(width / ratio / 32) * 32, round(width / 32) * 32


def sizes(pictures: Any) -> list[tuple[int, int]]:
    """Width and height of each picture; TypeError for what is none."""
    found = [size for size in images.sizes(pictures) if size is not None and all(size)]
    if not found or len(found) < len(images.sizes(pictures)):
        raise TypeError("image has to be a PIL picture, an array, a tensor or a path, or a list of such.")
    return found


def fitted(picture: Any, height: int, width: int) -> Picture:
    """One picture at that size."""
    pixels = images.pixels(picture, height, width, multiple=1)
    if len(pixels) > 1:
        raise ValueError("Several pictures have to be given as a list, not as one array.")
    return images.to_output(pixels, "pil")[0]


def encode(components: Components, texts: list[str], looks: Sequence[Picture]) -> Texts:
    """The text encoder's last hidden states for texts with marks where it looks at pictures."""
    encoder, processor = components["text_encoder"], components["processor"]
    if encoder is None or processor is None:
        raise ValueError("This checkpoint has no text_encoder with a processor; pass prompt_embeds.")
    whole = [f"{BEFORE}{text}{qwenimage.AFTER}" for text in texts]
    return qwenimage.states(encoder, processor(whole, looks), INSTRUCTION)


def beside(stage: Stage, references: Sequence[Tensor]) -> Stage:
    """The stage whose network looks at pictures (P, 3, H, W), at their most likely latents."""

    def condition(run: Run, x: Tensor) -> Cond:
        cond = stage.condition(run, x)
        rows = [
            repeat_to(stage.space.encode(pixels, None).to(stage.device, stage.dtype), len(x), "image")
            for pixels in references
        ]
        return cond | {"reference": torch.cat(rows, 1).repeat(len(cond["rotary"]) // len(x), 1, 1)}

    return replace(stage, condition=condition)


def grid(components: Components, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture."""
    step = 2 * factor(components["vae"])
    return height // step, width // step


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents, beside those of the picture that `read` scaled."""
    many: list[Picture] = list(run["image"]) if isinstance(run["image"], list) else [run["image"]]
    looks = many * run.prompts if len(many) == 1 else many

    def texts(components: Components, run: Run) -> list[Texts]:
        return qwenimage.branches(run, lambda texts: encode(components, [LOOK + text for text in texts], looks))

    width, height = many[0].size
    stage = qwenimage.stage(components, flux.packed(components, run), texts, grid(components, height, width))
    if run.get("mask_image") is not None:
        return (stage,)
    return (beside(stage, [images.pixels(many, height, width, multiple=2 * factor(components["vae"]))]),)


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Pictures scaled to about a million pixels; the result has that size, unless the call says another."""
    args = qwenimage.read(components, args)
    image, mask = args["image"], args.get("mask_image")
    many: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    made = [scaled(size) for size in sizes(many)]
    pictures = [fitted(picture, *size) for picture, size in zip(many, made, strict=True)]
    args["image"] = pictures if isinstance(image, list | tuple) else pictures[0]
    if mask is not None:
        images.same_size(image, mask)
        _warn_of_size(args, made)
        args |= dict(height=None, width=None)
        if args["padding_mask_crop"] is not None:
            args["mask_image"] = fitted(mask, *made[0]).convert("L")
    return args | default_size(components, args, made)


def default_size(components: Components, args: Mapping[str, Any], made: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Height and width of the result where the call says none: a list where the pictures differ."""
    step = 2 * factor(components["vae"])
    found: dict[str, Any] = {}
    for side, lengths in zip(("height", "width"), zip(*made, strict=True), strict=True):
        rounded = [length // step * step for length in lengths]
        given = args[side]
        found[side] = given if given is not None else rounded if len(set(made)) > 1 else rounded[0]
    return found


def _warn_of_size(args: Mapping[str, Any], made: Sequence[tuple[int, int]]) -> None:
    for side, length in zip(("height", "width"), made[0], strict=True):
        if args[side] not in (None, length):
            warnings.warn(f"{side}={args[side]} has no effect on inpainting; {length} are made.", stacklevel=3)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    qwenimage.check_texts(components, args)
    flux.check_size(components, args)
    if args["max_sequence_length"] != LAST["max_sequence_length"]:
        warnings.warn("max_sequence_length has no effect here: no text is cut.", stacklevel=2)
    given, wanted = args.get("image"), prompts.count(args)
    if isinstance(given, list) and len(given) not in (1, wanted):
        raise ValueError(f"There are {len(given)} pictures for {wanted} prompts; give one, or one for each.")


FAMILY = replace(
    qwenimage.FAMILY,
    key="qwenimage-edit",
    stem="QwenImageEdit",
    slots=SLOTS,
    tasks={"image2image": EDIT, "inpaint": INPAINT},
    stages=stages,
    check=check,
    read=read,
    variants={},
    addons={},
)
