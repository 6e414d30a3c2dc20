"""PixArt-alpha (Chen et al. 2023): a transformer in latents that attends to T5's words, on pictures of many shapes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopipeline import captions, images, prompts
from autopipeline.addons import pag
from autopipeline.families import bins, callbacks
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "tokenizer": Slot(("T5Tokenizer",), optional=True),
    "text_encoder": Slot(("T5EncoderModel",), optional=True),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("PixArtTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_STEPS = dict(num_inference_steps=20, timesteps=None, sigmas=None, guidance_scale=4.5, num_images_per_prompt=1)
_SIZE = dict(height=None, width=None)
_EMBEDS = dict(
    prompt_embeds=None,
    prompt_attention_mask=None,
    negative_prompt_embeds=None,
    negative_prompt_attention_mask=None,
)


def rows(length: int, more: Mapping[str, Any] | None = None) -> dict[str, TaskRow]:
    """The tasks of a family that reads so many tokens; `more` are parameters of an add-on.

    Pictures to begin with decide themselves what size is made: the list of sizes is for text-to-image.
    """
    start = dict(prompt=None, negative_prompt="")
    draws = dict(eta=0.0, generator=None, latents=None)
    last = dict(output_type="pil", return_dict=True) | callbacks.PARAMS | dict(clean_caption=True)
    end = dict(max_sequence_length=length) | dict(more or {}) | sd.CALLBACK
    image = dict(image=None, strength=0.8)
    mask = dict(image=None, mask_image=None) | _SIZE | dict(padding_mask_crop=None, strength=1.0)
    return {
        "text2image": TaskRow(
            task=Text2Image,
            params=start | _STEPS | _SIZE | draws | _EMBEDS | last | dict(use_resolution_binning=True) | end,
        ),
        "image2image": TaskRow(task=Image2Image, params=start | image | _STEPS | draws | _EMBEDS | last | end),
        "inpaint": TaskRow(
            task=Inpaint,
            params=start | mask | _STEPS | draws | _EMBEDS | last | end,
            tensors=("latents", "mask", "masked_image_latents"),
        ),
    }


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """T5's states (B, length, E), and 1 for the tokens that count (B, length)."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError(
            "This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds and prompt_attention_mask."
        )
    ids = prompts.long_tokens(tokenizer, texts, length)
    mask = tokenizer.mask(ids).to(encoder.device)
    return prompts.finite(encoder(ids.to(encoder.device), mask), "text_encoder"), mask


def text_rows(components: Components, run: Run, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, T, E) and masks (branches * B, T) of all branches."""
    branches = [_branch(components, run, "prompt", run["max_sequence_length"])]
    length = branches[0][0].shape[1]
    if "negative" in guide(run).branches:
        branches.insert(0, _branch(components, run, "negative_prompt", length))
    negative = branches[0][0].shape[1]
    if negative != length:
        raise ValueError(
            f"The negative prompt has {negative} tokens and the prompt {length}; pass embeddings of both, or the "
            "max_sequence_length that fits."
        )
    device, times = components["transformer"].device, run.batch // run.prompts
    columns = zip(*branches, strict=True)
    embeds, masks = (torch.cat([prompts.each(rows.to(device, dtype), times) for rows in each]) for each in columns)
    return embeds, masks


def _branch(components: Components, run: Run, name: str, length: int) -> tuple[Tensor, Tensor]:
    """What the caller gives for a branch, or the encoded texts."""
    given = run[f"{name}_embeds"]
    if given is not None:
        return given, run[f"{name}_attention_mask"]
    texts = captions.prepared(prompts.rows(run[name] or "", run.prompts, name), run["clean_caption"])
    return encode(components, texts, length)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder = components["transformer"], components["text_encoder"]
    space, dtype = _space(components, run), (network if encoder is None else encoder).dtype

    def condition(run: Run, x: Tensor) -> Cond:
        embeds, masks = text_rows(components, run, dtype)
        places = network.places(*x.shape[-2:]).expand(len(embeds), -1, -1)
        text = dict(encoder_hidden_states=network.captions(embeds.to(network.dtype)), encoder_attention_mask=masks)
        if not network.sized:
            return text | dict(places=places)
        height, width = (side * space.factor for side in x.shape[-2:])
        told = dict(resolution=embeds.new_tensor([[height, width]]), aspect_ratio=embeds.new_tensor([[height / width]]))
        return text | dict(places=places) | {name: row.expand(len(embeds), -1) for name, row in told.items()}

    def emit(x: Tensor, x0: Tensor) -> Tensor:
        """Networks that need one step (distilled, Yin et al. 2024) say the picture itself with it."""
        return x0 if run.get("strength") is None and _steps(run) == 1 else x

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=components["scheduler"],
            dtype=dtype,
            schedule=lambda run: schedule(components["scheduler"], run, network.device),
            condition=condition,
            guide=guide,
            predict=_predict(network, space.channels),
            emit=emit,
        ),
    )


def _steps(run: Run) -> int:
    own = run["sigmas"] if run["timesteps"] is None else run["timesteps"]
    return run["num_inference_steps"] if own is None else len(own)


def _predict(network: Any, channels: int) -> Predict:
    """The noise; what some networks say of its variance is left out, as no scheduler here asks for it."""
    kept = channels if network.out_channels // 2 == channels else network.out_channels

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {
            name: rows.to(network.device, network.dtype if rows.is_floating_point() and name != "places" else None)
            for name, rows in cond.items()
        }
        return Pred(network(x.to(network.dtype), t, **typed)[:, :kept].to(x.dtype))

    return predict


def _space(components: Components, run: Run) -> LatentSpace:
    made = _made(components, run.args) if run.get("use_resolution_binning") else None
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size, made=made)


def _made(components: Components, args: Mapping[str, Any]) -> tuple[int, int]:
    """The size that pictures are made at: networks of 128 latents a side are those for 1024 pixels."""
    return bins.nearest(8 * components["transformer"].config.sample_size, args["height"], args["width"])


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode, and cut to the size that was asked for."""
    pictures = _space(components, run).decode(x)
    return Finished(bins.cut(pictures, run["height"], run["width"]) if run.get("use_resolution_binning") else pictures)


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Callbacks in the older form; beside embeddings, the empty negative prompt that is the default is none."""
    if args["negative_prompt"] == "" and args["negative_prompt_embeds"] is not None:
        args = args | dict(negative_prompt=None)
    return callbacks.read(components, args)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    prompts.check_masks(args)
    square = factor(components["vae"]) * components["transformer"].config.patch_size
    sides = (args.get("height"), args.get("width"))
    if args.get("use_resolution_binning"):
        sides = _made(components, args)
    for name, side in zip(("height", "width"), sides, strict=True):
        if side is not None and side % square:
            raise ValueError(f"{name}={side} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="pixart-alpha",
    stem="PixArtAlpha",
    slots=SLOTS,
    settings={},
    tasks=rows(120),
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
    read=read,
    variants={frozenset({"PAG"}): rows(120, pag.PARAMS)},
    addons={"PAG": partial(pag.attach, layers="blocks.1")},
)
