"""Kolors (Kwai-Kolors team 2024): the U-Net of Stable Diffusion XL, told of texts by ChatGLM3, in Chinese too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import prompts
from autopipeline.addons import pag
from autopipeline.families import stable_diffusion as sd
from autopipeline.families import stable_diffusion_xl as xl
from autopipeline.families.schedules import schedule
from autopipeline.spaces import LatentSpace
from autopipeline.stage import Cond, Family, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "vae": sd.SLOTS["vae"],
    "text_encoder": Slot(("ChatGLMModel",), optional=True),
    "tokenizer": Slot(("ChatGLMTokenizer",), optional=True),
    "unet": sd.SLOTS["unet"],
    "scheduler": sd.SLOTS["scheduler"],
    "image_encoder": sd.SLOTS["image_encoder"],
    "feature_extractor": sd.SLOTS["feature_extractor"],
}
LONGEST = 256  # what the network has learnt from, in tokens
_SIZE = dict(height=None, width=None)
_STEPS = dict(num_inference_steps=50, timesteps=None, sigmas=None)
_WINDOW = dict(denoising_start=None, denoising_end=None)
_NEGATIVE = dict(
    guidance_scale=5.0, negative_prompt=None, num_images_per_prompt=1, eta=0.0, generator=None, latents=None
)
_EMBEDS = dict(
    prompt_embeds=None, pooled_prompt_embeds=None, negative_prompt_embeds=None, negative_pooled_prompt_embeds=None
)
_MICRO = dict(
    original_size=None,
    crops_coords_top_left=(0, 0),
    target_size=None,
    negative_original_size=None,
    negative_crops_coords_top_left=(0, 0),
    negative_target_size=None,
)
_PAIR = ("negative_original_size", "negative_target_size")
_REST = _NEGATIVE | _EMBEDS | sd.LAST | _MICRO | sd.CALLBACK
_LENGTH = dict(max_sequence_length=LONGEST)
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "add_text_embeds", "add_time_ids")


def _rows(more: dict[str, Any]) -> dict[str, TaskRow]:
    """The tasks; `more` are parameters of an add-on."""
    last, picture, mask = _REST | more | _LENGTH, dict(image=None, strength=0.3), dict(image=None, mask_image=None)
    inpaint = mask | dict(masked_image_latents=None) | _SIZE | dict(padding_mask_crop=None, strength=0.9999)
    text2image = dict(prompt=None) | _SIZE | _STEPS | dict(denoising_end=None) | last
    return {
        "text2image": TaskRow(task=Text2Image, params=text2image, tensors=_TENSORS),
        "image2image": TaskRow(
            task=Image2Image, params=dict(prompt=None) | picture | _SIZE | _STEPS | _WINDOW | last, tensors=_TENSORS
        ),
        "inpaint": TaskRow(
            task=Inpaint,
            params=dict(prompt=None) | inpaint | _STEPS | _WINDOW | last,
            tensors=(*_TENSORS, "mask", "masked_image_latents"),
        ),
    }


def encode(components: Components, texts: list[str], length: int, most: int) -> tuple[Tensor, Tensor]:
    """ChatGLM's states (B, length, E), and what it has at the last token (B, E).

    Texts are cut at `most` tokens; the padding before them is always there, as the U-Net attends to it.
    """
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError(
            "This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds and pooled_prompt_embeds."
        )
    most = min(most, length)
    ids = functional.pad(prompts.long_tokens(tokenizer, texts, most), (length - most, 0), value=tokenizer.pad)
    out = encoder(ids.to(encoder.device), tokenizer.mask(ids).to(encoder.device))
    return prompts.finite(out.tokens, "text_encoder"), prompts.finite(out.last, "text_encoder")


def text_rows(components: Components, run: Run) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, L, E) and pooled embeddings (branches * B, E) of all branches."""
    embeds, pooled = run["prompt_embeds"], run["pooled_prompt_embeds"]
    if embeds is None:
        texts = prompts.rows(run["prompt"], run.prompts, "prompt")
        embeds, own = encode(components, texts, LONGEST, run["max_sequence_length"])
        pooled = own if pooled is None else pooled
    branches = [(embeds, pooled)]
    if sd.guided(components, run):
        branches.insert(0, _negative(components, run, embeds, pooled))
    for branch in branches:
        _check_widths(components, *branch)
    times, like = run.batch // run.prompts, torch.empty(0, dtype=_dtype(components), device=components["unet"].device)
    columns = zip(*branches, strict=True)
    embeds, pooled = (torch.cat([prompts.each(rows.to(like), times) for rows in column]) for column in columns)
    return embeds, pooled


def _negative(components: Components, run: Run, embeds: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    given, given_pooled, text = (
        run[name] for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt")
    )
    if given is not None:
        if given.shape[1] != embeds.shape[1]:
            raise ValueError(
                f"negative_prompt_embeds has {given.shape[1]} tokens and the prompt {embeds.shape[1]}; pass embeddings "
                "of both."
            )
        return given, given_pooled
    if text is None and run.settings["force_zeros_for_empty_prompt"]:
        return torch.zeros_like(embeds), torch.zeros_like(pooled)
    texts = prompts.rows(text or "", run.prompts, "negative_prompt")
    hidden, own = encode(components, texts, embeds.shape[1], run["max_sequence_length"])
    return hidden, own if given_pooled is None else given_pooled


def _dtype(components: Components) -> torch.dtype:
    """The precision of the latents: that of the text encoder, or of the U-Net without one."""
    encoder = components["text_encoder"]
    return (components["unet"] if encoder is None else encoder).dtype


def time_ids(components: Components, run: Run, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Sizes (height, width) and crops as numbers: (branches * B, 6).

    As in the reference implementation, the negative row differs only where both negative sizes are given, and for
    several pictures the rows of the branches alternate; not so with PAG, nor for inpainting, which it does not have.
    """
    positive = (*(run["original_size"] or size), *run["crops_coords_top_left"], *(run["target_size"] or size))
    negative = positive
    if run["negative_original_size"] is not None:
        negative = (
            *run["negative_original_size"],
            *run["negative_crops_coords_top_left"],
            *run["negative_target_size"],
        )
    rows = [negative, positive] if sd.guided(components, run) else [positive]
    table = torch.tensor(rows, dtype=_dtype(components), device=x.device)
    apart = run.get("pag_scale") or run.get("mask_image") is not None
    return table.repeat_interleave(run.batch, 0) if apart else table.repeat(run.batch, 1)


def _check_widths(components: Components, embeds: Tensor, pooled: Tensor) -> None:
    config = components["unet"].config
    given = config.projection_class_embeddings_input_dim
    wanted = {
        "prompt_embeds": (embeds, config.encoder_hid_dim),
        "pooled_prompt_embeds": (pooled, given and given - 6 * config.addition_time_embed_dim),
    }
    for name, (rows, width) in wanted.items():
        if width is not None and rows.shape[-1] != width:
            raise ValueError(f"{name} is {rows.shape[-1]} numbers wide; the unet takes {width}.")


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of the autoencoder."""
    unet, scheduler = components["unet"], components["scheduler"]
    size = run["height"], run["width"]

    def enter(run: Run, x: Tensor) -> None:
        """Pictures to begin with decide themselves what size is made; the call's is what the network is told."""
        if run.get("image") is not None and run.get("mask_image") is None:
            run.args = {**run.args, "height": None, "width": None}

    def condition(run: Run, x: Tensor) -> Cond:
        embeds, pooled = text_rows(components, run)
        ids = time_ids(components, run, x, size)
        cond = {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}
        width = unet.config.time_cond_proj_dim
        return cond if width is None else cond | {"timestep_cond": sd.scale_embedding(run.guidance_scale, width, x)}

    return (
        Stage(
            name="unet",
            network=unet,
            space=LatentSpace(components["vae"], upcast=True),
            scheduler=scheduler,
            dtype=_dtype(components),
            schedule=lambda run: schedule(scheduler, run, unet.device),
            condition=condition,
            guide=lambda run: sd.guide(components, run),
            predict=sd.unet_predict(unet),
            public={
                "encoder_hidden_states": "prompt_embeds",
                "text_embeds": "add_text_embeds",
                "time_ids": "add_time_ids",
            },
            enter=enter,
        ),
    )


def check(components: Components, args: Mapping[str, Any]) -> None:
    """What Stable Diffusion XL refuses, texts that are too long, and negative sizes that would have no effect."""
    xl.check(components, args)
    if not 2 <= args["max_sequence_length"] <= LONGEST:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} has to be from 2 to {LONGEST}.")
    ignored = [name for name in _PAIR if args[name] is not None]
    ignored += ["negative_crops_coords_top_left"] * any(args["negative_crops_coords_top_left"])
    if ignored and any(args[name] is None for name in _PAIR):
        raise ValueError(f"{ignored[0]} has no effect without both negative_original_size and negative_target_size.")


FAMILY = Family(
    key="kolors",
    stem="Kolors",
    slots=SLOTS,
    settings={"force_zeros_for_empty_prompt": False},
    tasks=_rows({}),
    stages=stages,
    finish=xl.finish,
    check=check,
    size=sd.default_size,
    variants={frozenset({"PAG"}): _rows(pag.PARAMS)},
)
