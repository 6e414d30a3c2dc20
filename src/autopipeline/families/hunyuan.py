"""Hunyuan-DiT (Li et al. 2024): a transformer led by a bilingual BERT and a multilingual T5."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.addons import pag
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "vae": Slot(("AutoencoderKL",)),
    "text_encoder": Slot(("BertModel",), optional=True),
    "tokenizer": Slot(("BertTokenizer",), optional=True),
    "transformer": Slot(("HunyuanDiT2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "safety_checker": sd.SLOTS["safety_checker"],
    "feature_extractor": sd.SLOTS["feature_extractor"],
    "text_encoder_2": Slot(("T5EncoderModel",), optional=True),
    "tokenizer_2": Slot(("T5Tokenizer",), optional=True),
}
_SIGNS = ("", "negative_")
_SIZE = dict(height=None, width=None)
_TOLD = dict(original_size=(1024, 1024), target_size=None, crops_coords_top_left=(0, 0))
_REST = (
    dict(num_inference_steps=50, guidance_scale=5.0, negative_prompt=None, num_images_per_prompt=1)
    | dict(eta=0.0, generator=None, latents=None)
    | {f"{sign}prompt_embeds{end}": None for sign in _SIGNS for end in ("", "_2")}
    | {f"{sign}prompt_attention_mask{end}": None for sign in _SIGNS for end in ("", "_2")}
    | dict(output_type="pil", return_dict=True)
    | sd.CALLBACK
    | dict(guidance_rescale=0.0)
    | _TOLD
)
_TENSORS = ("latents", *(f"{sign}prompt_embeds{end}" for end in ("", "_2") for sign in _SIGNS))
TASKS = {
    "text2image": TaskRow(
        task=Text2Image, params=dict(prompt=None) | _SIZE | _REST | dict(use_resolution_binning=True), tensors=_TENSORS
    ),
    "image2image": TaskRow(
        task=Image2Image, params=dict(prompt=None, image=None, strength=0.8) | _REST, tensors=_TENSORS
    ),
    "inpaint": TaskRow(
        task=Inpaint,
        params=dict(prompt=None, image=None, mask_image=None)
        | _SIZE
        | dict(padding_mask_crop=None, strength=1.0)
        | _REST,
        tensors=(*_TENSORS, "mask", "masked_image_latents"),
    ),
}
"""Pictures to begin with decide themselves what size is made: the list of sizes is for text-to-image."""
BINS = (
    ((1024, 1024), (1280, 1280)),
    ((1024, 768), (1152, 864), (1280, 960)),
    ((768, 1024), (864, 1152), (960, 1280)),
    ((1280, 768),),
    ((768, 1280),),
)
"""Widths and heights that the network was trained on, by the shape of the picture."""
SHAPES = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16)
"""Width / height that each row of `BINS` stands for; the last two are a little less wide than they say."""


def nearest_bin(width: int, height: int) -> tuple[int, int]:
    """The width and height of training that are nearest, in shape first, then in area."""
    row = min(range(len(SHAPES)), key=lambda k: abs(SHAPES[k] - width / height))
    return min(BINS[row], key=lambda size: abs(size[0] * size[1] - width * height))


def made(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width that a call's pictures are made at: multiples of 16 pixels, with binning those of training.

    None where a picture to begin with decides.
    """
    if "use_resolution_binning" not in args:
        return None
    height, width = (args[side] // 16 * 16 for side in ("height", "width"))
    if not height or not width:
        raise ValueError(f"height={args['height']} and width={args['width']} have to be 16 pixels at least.")
    if args["use_resolution_binning"] and all((width, height) not in row for row in BINS):
        width, height = nearest_bin(width, height)
    return height, width


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale, run["guidance_rescale"]) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], end: str, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states (B, length, E) of a text encoder, the one with this `end` of its name; masks (B, length)."""
    encoder, tokenizer = components[f"text_encoder{end}"], components[f"tokenizer{end}"]
    if encoder is None:
        raise ValueError(f"This checkpoint has no text_encoder{end}; pass prompt_embeds{end} and its mask.")
    ids = prompts.long_tokens(tokenizer, texts, length)
    mask = tokenizer.mask(ids).to(encoder.device)
    return prompts.finite(encoder(ids.to(encoder.device), mask), f"text_encoder{end}"), mask


def text_rows(components: Components, run: Run, end: str, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, length, E) of a text encoder and masks (branches * B, length), of all branches.

    As in the reference implementation, masks of several pictures a prompt go a b a b where embeddings go a a b b,
    unless every picture has a seed.
    """
    times = run.batch // run.prompts
    embeds, masks = [], []
    for sign in _SIGNS[::-1] if run.guidance_scale > 1 else _SIGNS[:1]:
        hidden, mask = run[f"{sign}prompt_embeds{end}"], run[f"{sign}prompt_attention_mask{end}"]
        if hidden is None:
            texts = prompts.rows(run[f"{sign}prompt"] or "", run.prompts, f"{sign}prompt")
            hidden, mask = encode(components, texts, end, length)
        embeds.append(prompts.each(hidden, times))
        masks.append(prompts.each(mask, times) if run.random.apart else mask.repeat(times, 1))
    device = embeds[-1].device
    return torch.cat([rows.to(embeds[-1]) for rows in embeds]), torch.cat([rows.to(device).bool() for rows in masks])


def places(height: int, width: int, base: int) -> Tensor:
    """Columns and rows (height * width, 2) of patches, in units of a grid of base * base around which they are put."""
    longest = max(height, width)
    lines: list[Tensor] = []
    for side in (height, width):
        extent = base if side == longest else round(base / longest * side)
        first = round((base - extent) / 2)
        lines.append(torch.linspace(first, (first + extent) * (side - 1) / side, side))
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network = components["transformer"]
    space = LatentSpace(components["vae"], patch=network.config.patch_size, made=made(run.args))

    def condition(run: Run, x: Tensor) -> Cond:
        words, counts = text_rows(components, run, "", network.config.text_len)
        more, more_counts = text_rows(components, run, "_2", network.config.text_len_t5)
        cond = {"encoder_hidden_states": words, "text_embedding_mask": counts}
        cond |= {"encoder_hidden_states_t5": more, "text_embedding_mask_t5": more_counts}
        cond = {name: rows.to(network.device) for name, rows in cond.items()}
        patch = network.config.patch_size
        table = network.rotary(places(x.shape[-2] // patch, x.shape[-1] // patch, 64 // patch))
        cond["rotary"] = table.to(network.device).expand(len(words), -1, -1, -1)
        if network.config.use_style_cond_and_image_meta_size:
            target = run["target_size"] or [side * space.factor for side in x.shape[-2:]]
            sizes = [*run["original_size"], *target, *run["crops_coords_top_left"]]
            cond["image_meta_size"] = torch.tensor(sizes, device=network.device).float().expand(len(words), -1)
        return cond

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {name: _typed(network, name, rows) for name, rows in cond.items()}
        return Pred(network(x.to(network.dtype), t.to(network.dtype), **typed).to(x.dtype))

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=components["scheduler"],
            dtype=network.dtype,
            schedule=lambda run: schedule(components["scheduler"], run, network.device),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"encoder_hidden_states": "prompt_embeds", "encoder_hidden_states_t5": "prompt_embeds_2"},
        ),
    )


def _typed(network: Any, name: str, rows: Tensor) -> Tensor:
    """Where and as precise as the network; masks stay masks, angles stay exact."""
    return rows.to(network.device, network.dtype if rows.is_floating_point() and name != "rotary" else None)


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    prompts.check(args)
    network = components["transformer"].config
    if components.get("safety_checker") is not None and components.get("feature_extractor") is None:
        raise ValueError("A safety checker needs feature_extractor beside it; load both, or pass safety_checker=None.")
    _check_size(components, args)
    if args["prompt"] is None and args["prompt_embeds_2"] is None:
        raise ValueError("prompt_embeds needs prompt_embeds_2 beside it.")
    for end, length in (("", network.text_len), ("_2", network.text_len_t5)):
        for sign in _SIGNS:
            _check_embeds(args, f"{sign}prompt_embeds{end}", f"{sign}prompt_attention_mask{end}", length)
    if not network.use_style_cond_and_image_meta_size:
        for name in ("original_size", "target_size", "crops_coords_top_left"):
            if args[name] != _TOLD[name]:
                raise ValueError(f"{name} has no effect on this transformer, which knows no sizes.")


def _check_size(components: Components, args: Mapping[str, Any]) -> None:
    """Sizes of training are taken in place of others, and somebody should know; for inpainting they have to fit."""
    size = made(args)
    if size is not None:
        if size != (args["height"], args["width"]):
            asked = f"{args['width']} x {args['height']}"
            warnings.warn(f"Pictures of {size[1]} x {size[0]} pixels are made, not of {asked}.", stacklevel=2)
        return
    square = factor(components["vae"]) * components["transformer"].config.patch_size
    for side in ("height", "width"):
        if args.get(side) is not None and args[side] % square:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


def _check_embeds(args: Mapping[str, Any], name: str, beside: str, length: int) -> None:
    embeds, mask = args[name], args[beside]
    if (embeds is None) != (mask is None):
        raise ValueError(f"{name} and {beside} need each other.")
    if embeds is None:
        return
    if embeds.shape[1] != length:
        raise ValueError(f"{name} has {embeds.shape[1]} tokens; this transformer takes {length}.")
    if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
        raise ValueError(f"{beside} has to be a torch.Tensor of the shape {tuple(embeds.shape[:2])}.")


FAMILY = Family(
    key="hunyuan",
    stem="HunyuanDiT",
    slots=SLOTS,
    settings={"requires_safety_checker": True},
    tasks=TASKS,
    stages=stages,
    finish=sd.finish,
    check=check,
    size=default_size,
    variants={frozenset({"PAG"}): {name: pag.row(row) for name, row in TASKS.items()}},
    addons={"PAG": partial(pag.attach, layers="blocks.1")},
)
