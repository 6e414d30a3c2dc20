"""Stable Diffusion XL (Podell et al. 2023): two text encoders, pooled text and sizes as further conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autopipeline import prompts
from autopipeline.addons import controlnet, controlnet_union, pag
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import schedule
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "vae": sd.SLOTS["vae"],
    "text_encoder": Slot(("CLIPTextModel",), optional=True),
    "text_encoder_2": Slot(("CLIPTextModelWithProjection",), optional=True),
    "tokenizer": Slot(("CLIPTokenizer",), optional=True),
    "tokenizer_2": Slot(("CLIPTokenizer",), optional=True),
    "unet": sd.SLOTS["unet"],
    "scheduler": sd.SLOTS["scheduler"],
    "image_encoder": sd.SLOTS["image_encoder"],
    "feature_extractor": sd.SLOTS["feature_extractor"],
}
_PROMPTS = dict(prompt=None, prompt_2=None)
_STEPS = dict(num_inference_steps=50, timesteps=None, sigmas=None)
_WINDOW = dict(denoising_start=None, denoising_end=None)
_EMBEDS = dict(
    prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None
)
_NEGATIVE = dict(
    negative_prompt=None,
    negative_prompt_2=None,
    num_images_per_prompt=1,
    eta=0.0,
    generator=None,
    latents=None,
)
_MICRO = dict(
    guidance_rescale=0.0,
    original_size=None,
    crops_coords_top_left=(0, 0),
    target_size=None,
    negative_original_size=None,
    negative_crops_coords_top_left=(0, 0),
    negative_target_size=None,
)
_SCORE = dict(aesthetic_score=6.0, negative_aesthetic_score=2.5)
_SKIP = dict(clip_skip=None)
_UNSAVED = ("requires_aesthetics_score",)
_TENSORS = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")

TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=_PROMPTS
    | dict(height=None, width=None)
    | _STEPS
    | dict(denoising_end=None, guidance_scale=5.0)
    | _NEGATIVE
    | _EMBEDS
    | sd.LAST
    | _MICRO
    | _SKIP
    | sd.CALLBACK,
    tensors=_TENSORS,
    unsaved=_UNSAVED,
)
IMAGE2IMAGE = TaskRow(
    task=Image2Image,
    params=_PROMPTS
    | dict(image=None, strength=0.3)
    | _STEPS
    | _WINDOW
    | dict(guidance_scale=5.0)
    | _NEGATIVE
    | _EMBEDS
    | sd.LAST
    | _MICRO
    | _SCORE
    | _SKIP
    | sd.CALLBACK,
    tensors=_TENSORS,
)
INPAINT = TaskRow(
    task=Inpaint,
    params=_PROMPTS
    | dict(image=None, mask_image=None, masked_image_latents=None, height=None, width=None, padding_mask_crop=None)
    | dict(strength=0.9999)
    | _STEPS
    | _WINDOW
    | dict(guidance_scale=7.5)
    | _NEGATIVE
    | _EMBEDS
    | sd.LAST
    | _MICRO
    | _SCORE
    | _SKIP
    | sd.CALLBACK,
    tensors=(*_TENSORS, "mask", "masked_image_latents"),
)

_PLAIN_MICRO = {name: default for name, default in _MICRO.items() if name != "guidance_rescale"}
_ONE_MICRO = {name: default for name, default in _MICRO.items() if not name.startswith("negative")}


def _controlled(begin: dict[str, Any], control: dict[str, Any], micro: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a ControlNet task, from those of its inputs, of the ControlNet and of sizes."""
    last = control | micro | _SKIP | sd.CALLBACK
    return _PROMPTS | begin | dict(guidance_scale=5.0) | _NEGATIVE | _EMBEDS | sd.LAST | last


def _controlnet_tasks(params: Callable[[float], dict[str, Any]], picture: str) -> dict[str, TaskRow]:
    """Tasks with a ControlNet that can be told `params`, whose picture has that name where there is no other one."""
    begin = {picture: None} | dict(height=None, width=None) | _STEPS | dict(denoising_end=None)
    return {
        "text2image": TaskRow(
            task=Text2Image,
            params=_controlled(begin, params(1.0), _PLAIN_MICRO),
            tensors=(*_TENSORS, picture),
            unsaved=_UNSAVED,
        ),
        "image2image": TaskRow(
            task=Image2Image,
            params=_controlled(
                dict(image=None, control_image=None, height=None, width=None, strength=0.8, num_inference_steps=50),
                params(0.8),
                _PLAIN_MICRO | _SCORE,
            ),
            tensors=(*_TENSORS, "control_image"),
            trigger="control_image" if picture == "image" else None,
        ),
        "inpaint": TaskRow(
            task=Inpaint,
            params=_controlled(
                dict(image=None, mask_image=None, control_image=None, height=None, width=None, padding_mask_crop=None)
                | dict(strength=0.9999, num_inference_steps=50)
                | _WINDOW,
                params(1.0),
                _ONE_MICRO | _SCORE,
            ),
            tensors=(*_TENSORS, "mask", "masked_image_latents", "control_image"),
        ),
    }


CONTROLNET = _controlnet_tasks(controlnet.params, "image")
CONTROLNET_UNION = _controlnet_tasks(controlnet_union.params, "control_image")
PAG = {"text2image": pag.row(TEXT2IMAGE), "image2image": pag.row(IMAGE2IMAGE), "inpaint": pag.row(INPAINT)}
CONTROLNET_PAG = {
    "text2image": pag.row(CONTROLNET["text2image"], "guess_mode"),
    "image2image": pag.row(CONTROLNET["image2image"]),
    "inpaint": pag.row(CONTROLNET["inpaint"]),
}


def encode(
    components: Components, texts: list[list[str]], clip_skip: int | None, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of all encoders side by side (B, L, D), and the pooled output of the last one (B, P)."""
    names = [name for name in ("text_encoder", "text_encoder_2") if components.get(name) is not None]
    if not names:
        raise ValueError("This checkpoint has no text encoder; pass prompt_embeds and pooled_prompt_embeds.")
    hidden: list[Tensor] = []
    pooled = torch.empty(0)
    for name, rows in zip(names, texts[-2:], strict=False):
        encoder = components[name]
        ids = prompts.tokens(components[name.replace("text_encoder", "tokenizer")], rows, length)
        out = encoder(ids.to(encoder.device))
        hidden.append(prompts.finite(out.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)], name))
        pooled = out.pooled
    return torch.cat([rows.to(hidden[-1]) for rows in hidden], -1), pooled


def text_rows(components: Components, run: Run) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, L, D) and pooled embeddings (branches * B, P) of all branches."""
    embeds, pooled = run.get("prompt_embeds"), run.get("pooled_prompt_embeds")
    if embeds is None:
        texts = _pair(run, "prompt", run["prompt"])
        embeds, own = encode(components, texts, run.get("clip_skip"))
        pooled = own if pooled is None else pooled
    branches = [(embeds, pooled)]
    if sd.guided(components, run):
        branches.insert(0, _negative(components, run, embeds, pooled))
    times = run.batch // run.prompts
    columns = zip(*branches, strict=True)
    dtype = stage_dtype(components)
    embeds, pooled = (torch.cat([prompts.each(rows.to(embeds), times) for rows in column]) for column in columns)
    return embeds.to(dtype), pooled.to(dtype)


def _negative(components: Components, run: Run, embeds: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    given, given_pooled = run.get("negative_prompt_embeds"), run.get("negative_pooled_prompt_embeds")
    if given is not None:
        return given, given_pooled
    text = run.get("negative_prompt")
    if text is None and run.get("negative_prompt_2") is None and run.settings["force_zeros_for_empty_prompt"]:
        return torch.zeros_like(embeds), torch.zeros_like(pooled)
    hidden, own = encode(components, _pair(run, "negative_prompt", text or ""), None, embeds.shape[1])
    return hidden, own if given_pooled is None else given_pooled


def _pair(run: Run, name: str, text: Any) -> list[list[str]]:
    """The texts for both encoders; the second are the first unless given."""
    first = prompts.rows(text, run.prompts, name)
    second = run.get(f"{name}_2")
    return [first, first if not second else prompts.rows(second, run.prompts, f"{name}_2")]


def time_ids(components: Components, run: Run, x: Tensor) -> Tensor:
    """Sizes (height, width) and crops, or an aesthetic score, as numbers: (branches * B, 5 or 6).

    The negative row follows the reference implementation with its asymmetries: text-to-image takes the negative sizes
    only where both are given and interleaves the rows; the other tasks take the positive crops for both rows.
    """
    scale = factor(components["vae"])
    size = (x.shape[-2] * scale, x.shape[-1] * scale)
    original, target = run["original_size"] or size, run["target_size"] or size
    crops = tuple(run["crops_coords_top_left"])
    negative_original, negative_target = run.get("negative_original_size"), run.get("negative_target_size")
    negative_crops = tuple(run.get("negative_crops_coords_top_left", (0, 0)))
    from_noise = run.get("image") is None
    if run.settings.get("requires_aesthetics_score"):
        positive = (*original, *crops, run.get("aesthetic_score", 6.0))
        negative = (*(negative_original or original), *negative_crops, run.get("negative_aesthetic_score", 2.5))
    else:
        positive = (*original, *crops, *target)
        if not from_noise:
            negative = (*(negative_original or original), *crops, *(negative_target or target))
        else:
            negative = positive
            if negative_original is not None and negative_target is not None:
                negative = (*negative_original, *negative_crops, *negative_target)
    rows = [negative, positive] if sd.guided(components, run) else [positive]
    table = torch.tensor(rows, dtype=stage_dtype(components), device=x.device)
    return table.repeat(run.batch, 1) if from_noise else table.repeat_interleave(run.batch, 0)


def _check_width(components: Components, ids: Tensor, pooled: Tensor) -> None:
    config = components["unet"].config
    wanted = config.projection_class_embeddings_input_dim
    made = config.addition_time_embed_dim * ids.shape[1] + pooled.shape[1]
    if wanted is not None and wanted != made:
        raise ValueError(
            f"The unet takes {wanted} numbers of added conditioning but {made} were made; for a refiner, "
            "load with requires_aesthetics_score=True, for a base model with requires_aesthetics_score=False."
        )


def stage_dtype(components: Components) -> torch.dtype:
    """The precision of the latents: that of the second text encoder, or of the U-Net without one."""
    encoder = components.get("text_encoder_2")
    return (components["unet"] if encoder is None else encoder).dtype


def check(components: Components, args: Mapping[str, Any]) -> None:
    """What Stable Diffusion refuses, and embeddings without their pooled form, and shares outside 0 to 1."""
    sd.check(components, args)
    prompts.check_pooled(args)
    start, end = args.get("denoising_start"), args.get("denoising_end")
    if start is not None and not 0 < start < 1:
        raise ValueError(f"denoising_start={start} has to be between 0 and 1, both excluded.")
    if end == 0:
        raise ValueError("denoising_end=0 leaves no step to be made.")


def _refuse_ignored(run: Run) -> None:
    """Micro-conditioning that this network does not take, or takes in pairs only."""
    micro = {name: run.get(name) for name in (*_MICRO, *_SCORE)}
    if run.settings.get("requires_aesthetics_score"):
        ignored = [name for name in ("target_size", "negative_target_size") if micro[name] is not None]
        why = "on a refiner, which takes aesthetic_score instead"
    else:
        ignored = [name for name, default in _SCORE.items() if micro[name] not in (None, default)]
        why = "on a base model, which takes target_size instead"
        if run.get("image") is None and not ignored:
            pair = ("negative_original_size", "negative_target_size")
            ignored = [name for name in pair if micro[name] is not None]
            ignored += ["negative_crops_coords_top_left"] * any(micro["negative_crops_coords_top_left"] or ())
            ignored = [] if all(micro[name] is not None for name in pair) else ignored
            why = "without both negative_original_size and negative_target_size"
    if ignored:
        raise ValueError(f"{ignored[0]} has no effect {why}.")


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of the autoencoder."""
    unet, scheduler = components["unet"], components["scheduler"]
    _refuse_ignored(run)

    def condition(run: Run, x: Tensor) -> Cond:
        embeds, pooled = text_rows(components, run)
        ids = time_ids(components, run, x)
        _check_width(components, ids, pooled)
        cond = {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": ids}
        width = unet.config.time_cond_proj_dim
        return cond if width is None else cond | {"timestep_cond": sd.scale_embedding(run.guidance_scale, width, x)}

    return (
        Stage(
            name="unet",
            network=unet,
            space=LatentSpace(components["vae"], upcast=True),
            scheduler=scheduler,
            dtype=stage_dtype(components),
            schedule=lambda run: schedule(scheduler, run, unet.device),
            condition=condition,
            guide=lambda run: sd.guide(components, run),
            predict=sd.unet_predict(unet),
            public={
                "encoder_hidden_states": "prompt_embeds",
                "text_embeds": "add_text_embeds",
                "time_ids": "add_time_ids",
            },
        ),
    )


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(LatentSpace(components["vae"], upcast=True).decode(x))


FAMILY = Family(
    key="stable-diffusion-xl",
    stem="StableDiffusionXL",
    slots=SLOTS,
    settings={"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    size=sd.default_size,
    variants={
        frozenset({"ControlNet"}): CONTROLNET,
        frozenset({"ControlNetUnion"}): CONTROLNET_UNION,
        frozenset({"PAG"}): PAG,
        frozenset({"ControlNet", "PAG"}): CONTROLNET_PAG,
    },
)
