"""Kandinsky 3 (Arkhipkin et al. 2023): a U-Net in MoVQ's latents, led by T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import callbacks
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.once import once
from autopipeline.families.schedules import schedule
from autopipeline.families.unclip import MovqSpace
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
LENGTH, STEP = 128, 8
"""Tokens of a text; what the sides of latents are multiples of, as the U-Net halves them three times."""

SLOTS = {
    "tokenizer": Slot(("T5Tokenizer",), optional=True),
    "text_encoder": Slot(("T5EncoderModel",), optional=True),
    "unet": Slot(("Kandinsky3UNet",)),
    "scheduler": Slot(("Scheduler",)),
    "movq": Slot(("VQModel",)),
}
_STEPS = dict(num_inference_steps=25, guidance_scale=3.0, negative_prompt=None, num_images_per_prompt=1)
_SIZE = dict(height=1024, width=1024)
_EMBEDS = dict(prompt_embeds=None, negative_prompt_embeds=None, attention_mask=None, negative_attention_mask=None)
_LAST = dict(output_type="pil", return_dict=True)
_START, _DRAWS = dict(prompt=None), dict(generator=None)
_TENSORS = ("latents", "prompt_embeds", "attention_mask")
TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=_START | _STEPS | _SIZE | _DRAWS | _EMBEDS | _LAST | dict(latents=None) | callbacks.PARAMS | sd.CALLBACK,
        tensors=_TENSORS,
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=_START
        | dict(image=None, strength=0.3)
        | _STEPS
        | _DRAWS
        | _EMBEDS
        | _LAST
        | callbacks.PARAMS
        | sd.CALLBACK,
        tensors=_TENSORS,
    ),
    "inpaint": TaskRow(
        task=Blend,
        params=_START
        | dict(image=None, mask_image=None, height=None, width=None, strength=0.8)
        | _STEPS
        | _DRAWS
        | _EMBEDS
        | _LAST
        | dict(latents=None)
        | sd.CALLBACK,
        tensors=(*_TENSORS, "mask", "masked_image_latents"),
    ),
}


class Space(MovqSpace):
    """MoVQ's latents; without a picture to begin with, sides are rounded up to whole multiples."""

    __slots__ = ()

    def latent_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents."""
        return -(-height // STEP**2) * STEP, -(-width // STEP**2) * STEP


class Source(MovqSpace):
    """The same for pictures to begin with, whose sides are rounded down to whole multiples."""

    __slots__ = ()

    def latent_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents."""
        whole = self.factor * STEP
        return height // whole * STEP, width // whole * STEP

    def pixels(self, run: Run, image: Any) -> Tensor:
        """At the size of the result, or their own; of several, each for all results of its prompt."""
        given, sides = self._given(image), (run.get("height"), run.get("width"))
        x = images.pixels(image, *sides, multiple=self.factor * STEP, cubic=True) if given is None else given
        return x if len(x) == 1 or run.batch % len(x) else prompts.each(x, run.batch // len(x))


def guide(run: Run) -> Guidance:
    """Guidance for scales above 1, which say how far to go beyond the prompt: 1 less than elsewhere."""
    return ClassifierFree(1 + run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str]) -> tuple[Tensor, Tensor]:
    """T5's states (P, LENGTH, E), zeros where the mask (P, LENGTH) is 0."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds and attention_mask.")
    ids = prompts.long_tokens(tokenizer, texts, LENGTH)
    mask = tokenizer.mask(ids).to(encoder.device)
    return prompts.finite(encoder(ids.to(encoder.device), mask), "text_encoder") * mask[..., None], mask


def text_rows(components: Components, run: Run) -> Cond:
    """States (branches * B, T, E), masks (branches * B, T) and how many tokens are averaged (branches * B,).

    Texts are cut after the longest prompt; where every picture has its seed, each row ends with its own.
    """
    states, mask = run["prompt_embeds"], run["attention_mask"]
    counted = torch.full((run.prompts,), LENGTH if states is None else states.shape[1])
    if states is None:
        states, mask = encode(components, prompts.rows(run["prompt"], run.prompts, "prompt"))
        counted = (mask.sum(1) + 1).clamp(max=LENGTH)
        longest = int(counted.max())
        states, mask = states[:, :longest], mask[:, :longest]
    branches = [(states, mask)]
    if "negative" in guide(run).branches:
        branches.insert(0, _negative(components, run, states))
    apart, times = run.random.apart, run.batch // run.prompts
    counted = counted.to(mask.device) if apart else torch.full_like(counted, states.shape[1]).to(mask.device)
    inside = torch.arange(states.shape[1], device=mask.device) < counted[:, None]
    masks = [each * inside for _, each in branches]
    return {
        "encoder_hidden_states": torch.cat([prompts.each(rows.to(states), times) for rows, _ in branches]),
        # as users know it, masks go a b a b where texts go a a b b, unless every picture has its seed
        "mask": torch.cat([prompts.each(rows, times) if apart else rows.repeat(times, 1) for rows in masks]),
        "counted": prompts.each(counted, times).repeat(len(branches)),
    }


def _negative(components: Components, run: Run, states: Tensor) -> tuple[Tensor, Tensor]:
    """What to lead away from, as long as the prompt's states: as given, encoded, or nothing at all."""
    length = states.shape[1]
    if run["negative_prompt_embeds"] is not None:
        given = run["negative_prompt_embeds"]
        if given.shape[1] != length:
            raise ValueError(f"negative_prompt_embeds have {given.shape[1]} tokens and the prompt {length}; pass both.")
        return given, run["negative_attention_mask"].to(states.device)
    if run["negative_prompt"] is None:
        return torch.zeros_like(states), torch.zeros_like(states[..., 0])
    texts = prompts.rows(run["negative_prompt"], run.prompts, "negative_prompt")
    return tuple(rows[:, :length] for rows in encode(components, texts))  # type: ignore[return-value]


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of MoVQ."""
    unet, scheduler, encoder = components["unet"], components["scheduler"], components["text_encoder"]
    dtype = (unet if encoder is None else encoder).dtype
    return (
        Stage(
            name="unet",
            network=unet,
            space=_space(components, run),
            scheduler=scheduler,
            dtype=dtype,
            schedule=lambda run: schedule(scheduler, run, unet.device),
            condition=lambda run, x: {name: rows.to(unet.device) for name, rows in text_rows(components, run).items()},
            guide=guide,
            predict=_predict(unet),
            public={"encoder_hidden_states": "prompt_embeds", "mask": "attention_mask"},
        ),
    )


def _space(components: Components, run: Run) -> MovqSpace:
    return (Space if run.get("strength") is None else Source)(components["movq"])


def _predict(unet: Any) -> Predict:
    """The U-Net as a prediction."""

    @once
    def hear(states: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
        return unet.hear(states.to(unet.dtype), mask.float(), counted)

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        heard = hear(cond["encoder_hidden_states"], cond["mask"], cond["counted"])
        return Pred(unet(x.to(unet.dtype), t, *heard, cond.get("perturbed")).to(x.dtype))

    return predict


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode; tensors are given as they are, except where a picture was begun with."""
    return Finished(_space(components, run).decode(x), raw=run.get("strength") is None)


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, where a call names none."""
    return 1024, 1024


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Old callbacks as new ones."""
    return callbacks.read(components, args) if "callback" in args else args


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    for name in ("", "negative_"):
        embeds, mask = args[f"{name}prompt_embeds"], args[f"{name}attention_mask"]
        if (embeds is None) != (mask is None):
            raise ValueError(f"{name}prompt_embeds and {name}attention_mask need each other.")
        if embeds is not None and (not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}attention_mask has to be a torch.Tensor of the shape {tuple(embeds.shape[:2])}.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="kandinsky3",
    stem="Kandinsky3",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=size,
    check=check,
    read=read,
)
