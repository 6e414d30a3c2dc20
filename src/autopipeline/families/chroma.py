"""Chroma (Lodestone Rock 2025): Flux without CLIP and without embedded guidance; T5's padding hardly counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux, flux_tasks
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.models.rotary import grid_places
from autopipeline.stage import Cond, Family, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "vae": flux.SLOTS["vae"],
    "text_encoder": flux.SLOTS["text_encoder_2"],
    "tokenizer": flux.SLOTS["tokenizer_2"],
    "transformer": Slot(("ChromaTransformer2DModel",)),
    "scheduler": flux.SLOTS["scheduler"],
    "image_encoder": flux.SLOTS["image_encoder"],
    "feature_extractor": flux.SLOTS["feature_extractor"],
}
_PROMPTS = dict(prompt=None, negative_prompt=None)
_MASKS = dict(prompt_attention_mask=None, negative_prompt_attention_mask=None)
_EMBEDS = dict(prompt_embeds=None, negative_prompt_embeds=None)
_STEPS = dict(num_inference_steps=35, sigmas=None, guidance_scale=5.0)
TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=_PROMPTS | flux_tasks.SIZE | _STEPS | flux_tasks.DRAWS | _EMBEDS | _MASKS | flux_tasks.LAST,
    tensors=flux_tasks.TENSORS,
)
IMAGE2IMAGE = TaskRow(
    task=SharedImage2Image,
    params=_PROMPTS
    | dict(image=None)
    | flux_tasks.SIZE
    | _STEPS
    | dict(strength=0.9)
    | flux_tasks.DRAWS
    | _EMBEDS
    | _MASKS
    | flux_tasks.LAST,
    tensors=flux_tasks.TENSORS,
)
INPAINT = TaskRow(
    task=Blend,
    params=_PROMPTS
    | dict(true_cfg_scale=1.0, image=None, mask_image=None, masked_image_latents=None)
    | flux_tasks.SIZE
    | dict(padding_mask_crop=None, strength=0.6, num_inference_steps=28, sigmas=None, guidance_scale=7.0)
    | flux_tasks.DRAWS
    | _EMBEDS
    | flux_tasks.LAST
    | dict(max_sequence_length=256)
    | _MASKS,
    tensors=flux_tasks.TENSORS,
    pasted=False,  # users know the part by itself
)


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """T5's hidden states (B, length, J), and 1 for the tokens that count (B, length): the text and one of padding."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None:
        raise ValueError("This checkpoint has no text_encoder; pass prompt_embeds and prompt_attention_mask.")
    ids = prompts.long_tokens(tokenizer, texts, length)
    mask = tokenizer.mask(ids)
    hidden = encoder(ids.to(encoder.device), mask.to(encoder.device))
    counts = torch.arange(length) <= mask.sum(1, keepdim=True)
    return prompts.finite(hidden, "text_encoder"), counts.to(hidden)


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, J) and masks (branches * B, T) of all branches."""
    branches = [_texts(components, run, "" if sign == "positive" else "negative_") for sign in guide(run).branches]
    hidden, masks = zip(*branches, strict=True)
    times = run.batch // run.prompts
    return flux.joined(hidden, times) | flux.joined([each.to(hidden[-1]) for each in masks], times, "attention_mask")


def _texts(components: Components, run: Run, sign: str) -> tuple[Tensor, Tensor]:
    given = run.get(f"{sign}prompt_embeds")
    if given is not None:
        return given, run[f"{sign}prompt_attention_mask"]
    texts = prompts.rows(run[f"{sign}prompt"] or "", run.prompts, f"{sign}prompt")
    return encode(components, texts, run["max_sequence_length"])


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    network, scheduler, encoder = (components[name] for name in ("transformer", "scheduler", "text_encoder"))
    space = flux.packed(components, run)
    own = grid_places(space.height // 2, space.width // 2)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text_rows(components, run).items()}
        masks = cond["attention_mask"]
        table = network.rotary(flux.places(masks.shape[1], own)).to(network.device)
        cond["attention_mask"] = torch.cat([masks, masks.new_ones(len(masks), len(own))], 1)
        return cond | {"rotary": table.expand(len(masks), -1, -1, -1)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=(network if encoder is None else encoder).dtype,
            schedule=lambda run: flow_schedule(scheduler, run, network.device, len(own)),
            condition=condition,
            guide=guide,
            predict=flux.transformer_predict(network),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    prompts.check_masks(args)
    flux.check_network(components, args)
    flux.check_size(components, args)
    if args.get("true_cfg_scale", 1.0) != 1:
        raise ValueError(
            f"true_cfg_scale={args['true_cfg_scale']} has no effect; guidance_scale is what guides Chroma."
        )
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="chroma",
    stem="Chroma",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=flux.finish,
    check=check,
    size=flux.size,
)
