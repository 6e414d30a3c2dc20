"""Stable Cascade (Stability AI 2024): Würstchen's two stages with larger networks, and pictures as prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.addons import pag
from autopipeline.families import stable_diffusion as sd
from autopipeline.families import wuerstchen
from autopipeline.families.once import once
from autopipeline.families.schedules import schedule
from autopipeline.families.wuerstchen import (
    COARSE,
    DECODER_SLOTS,
    DRAWS,
    FINE,
    PRIOR_CALLBACK,
    SCHEDULER,
    PaellaSpace,
    as_asked,
    branches,
    encoded,
    guide,
    guided,
    texts_of,
)
from autopipeline.spaces import VectorSpace
from autopipeline.stage import Cond, Family, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

_TEXT = Slot(("CLIPTextModelWithProjection",))
SLOTS = {
    "decoder": Slot(("StableCascadeUNet",)),
    "tokenizer": DECODER_SLOTS["tokenizer"],
    "text_encoder": _TEXT,
    "scheduler": SCHEDULER,
    "vqgan": DECODER_SLOTS["vqgan"],
}
PRIOR_SLOTS = {
    "tokenizer": DECODER_SLOTS["tokenizer"],
    "text_encoder": _TEXT,
    "image_encoder": Slot(("CLIPVisionModelWithProjection",), optional=True),
    "feature_extractor": Slot(("CLIPImageProcessor",), optional=True),
    "prior": Slot(("StableCascadeUNet",)),
    "scheduler": SCHEDULER,
}
_LINKED_ORDER = ("prior", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "image_encoder")
LINKED = {f"prior_{name}": PRIOR_SLOTS[name] for name in _LINKED_ORDER}
WHOLE_ORDER = ("text_encoder", "tokenizer", "decoder", "scheduler", "vqgan")

_AGAINST = dict(negative_prompt=None)
EMBEDS = dict(
    prompt_embeds=None,
    prompt_embeds_pooled=None,
    negative_prompt_embeds=None,
    negative_prompt_embeds_pooled=None,
)
_PRIOR_TENSORS = wuerstchen.PRIOR_TENSORS
TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, images=None, height=512, width=512)
    | dict(prior_num_inference_steps=60, prior_guidance_scale=4.0)
    | dict(num_inference_steps=12, decoder_guidance_scale=0.0)
    | _AGAINST
    | EMBEDS
    | DRAWS
    | dict(output_type="pil", return_dict=True)
    | PRIOR_CALLBACK
    | sd.CALLBACK,
    whole=("images",),
)
DECODER_TASK = TaskRow(
    task=Text2Image,
    params=dict(image_embeddings=None, prompt=None, num_inference_steps=10, guidance_scale=0.0)
    | _AGAINST
    | EMBEDS
    | DRAWS
    | dict(output_type="pil", return_dict=True)
    | sd.CALLBACK,
)
PRIOR_TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, images=None, height=1024, width=1024, num_inference_steps=20, timesteps=None)
    | dict(guidance_scale=4.0)
    | _AGAINST
    | EMBEDS
    | dict(image_embeds=None)
    | DRAWS
    | dict(output_type="pt", return_dict=True)
    | sd.CALLBACK,
    tensors=_PRIOR_TENSORS,
    whole=("images",),
)


def text(components: Components, run: Run, name: str, count: int) -> tuple[Tensor | None, Tensor]:
    """Of a branch by its name: CLIP's states before the last norm (P, T, E), and its vectors (P, 1, E)."""
    states, pooled = run[f"{name}_embeds"], run[f"{name}_embeds_pooled"]
    if pooled is not None:
        return states, pooled
    out = encoded(components, texts_of(run, name, count))
    return out.hidden_states[-1], out.pooled[:, None]


def picture_rows(components: Components, run: Run) -> Tensor:
    """What the prior sees of pictures (branches * B, m, I): all of them for each result, none of them to lead away."""
    prior = components["prior"]
    rows = run.get("image_embeds")
    if run["images"] is not None:
        encoder, process = components["image_encoder"], components["feature_extractor"]
        many = list(run["images"]) if isinstance(run["images"], list | tuple) else [run["images"]]
        shown = [one for picture in many for one in images.to_output(images.pixels(picture, multiple=1), "pil")]
        rows = encoder(process(shown).to(device=encoder.device, dtype=encoder.dtype))[None]
    if rows is None:
        rows = torch.zeros(1, 1, prior.config.clip_image_in_channels)
    rows = rows.to(prior.device, prior.dtype).expand(run.batch, -1, -1)
    return torch.cat([torch.zeros_like(rows), rows]) if guided(run) else rows


def prior_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: from noise to embeddings."""
    prior, scheduler = components["prior"], components["scheduler"]

    def condition(run: Run, x: Tensor) -> Cond:
        made = {name: text(components, run, name, run.prompts) for name in ("negative_prompt", "prompt")}
        rows = {
            "text": branches(run, lambda name: _known(made[name][0])),
            "pooled": branches(run, lambda name: made[name][1]),
        }
        return {name: part.to(prior.device) for name, part in rows.items()} | {"image": picture_rows(components, run)}

    @once
    def hear(*said: Tensor) -> Tensor:
        pooled, states, shown = (part.to(prior.dtype) for part in said)
        return prior.hear(pooled, states, shown)

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        context = hear(cond["pooled"], cond["text"], cond["image"])
        made = prior(x.to(prior.dtype), t.to(prior.dtype), context, perturbed=cond.get("perturbed"))
        return Pred(made.to(x.dtype))

    return (
        Stage(
            name="prior",
            network=prior,
            space=VectorSpace(prior.config.in_channels, sides=wuerstchen.coarse(run)),
            scheduler=scheduler,
            dtype=prior.dtype,
            schedule=lambda run: schedule(scheduler, run, prior.device),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"text": "text_encoder_hidden_states"},
        ),
    )


def _known(states: Tensor | None) -> Tensor:
    if states is None:
        raise ValueError("prompt_embeds_pooled need prompt_embeds beside them.")
    return states


def prior_finish(components: Components, run: Run, x: Tensor) -> dict[str, Any]:
    """The embeddings, and the texts' that led to them, one row for each."""
    made: dict[str, Any] = {"image_embeddings": x}
    for name in ("prompt", "negative_prompt"):
        pair = text(components, run, name, run.prompts) if name == "prompt" or guided(run) else (None, None)
        each = [None if rows is None else prompts.each(rows, run.batch // len(rows)) for rows in pair]
        made |= {f"{name}_embeds": each[0], f"{name}_embeds_pooled": each[1]}
    return as_asked(run, made)


def prior_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    wuerstchen.prior_check(components, args)
    check_texts(args)
    check_pictures(components, args, "")


def check_texts(args: Mapping[str, Any]) -> None:
    """Embeddings of tokens and of whole texts need each other."""
    for name in ("prompt", "negative_prompt"):
        states, pooled = args[f"{name}_embeds"], args[f"{name}_embeds_pooled"]
        if (states is None) != (pooled is None):
            raise ValueError(f"{name}_embeds and {name}_embeds_pooled need each other.")
        if pooled is not None and (not isinstance(pooled, Tensor) or pooled.ndim != 3 or len(pooled) != len(states)):
            raise ValueError(f"{name}_embeds_pooled has to be a torch.Tensor of the shape ({len(states)}, 1, width).")


def check_pictures(components: Components, args: Mapping[str, Any], prefix: str) -> None:
    """Pictures as prompts need what sees them."""
    embeds = args.get("image_embeds")
    if embeds is not None and (not isinstance(embeds, Tensor) or embeds.ndim != 3 or len(embeds) != 1):
        raise ValueError("image_embeds have to be a torch.Tensor of the shape (1, pictures, width).")
    if args["images"] is None:
        return
    if embeds is not None:
        raise ValueError("Pass either images or image_embeds, not both.")
    lacking = [
        f"{prefix}{name}" for name in ("image_encoder", "feature_extractor") if components[f"{prefix}{name}"] is None
    ]
    if lacking:
        raise ValueError(f"This checkpoint has no {' and no '.join(lacking)} to see images with.")


def decoder_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the decoder in the latents of Paella's autoencoder."""
    decoder, scheduler = components["decoder"], components["scheduler"]
    sides = wuerstchen.fine(components, run)

    def condition(run: Run, x: Tensor) -> Cond:
        count = run.batch // run["num_images_per_prompt"]
        pooled = branches(run, lambda name: text(components, run, name, count)[1])
        return {"picture": wuerstchen.picture_rows(run).to(x), "pooled": pooled.to(x)}

    @once
    def hear(pooled: Tensor) -> Tensor:
        return decoder.hear(pooled.to(decoder.dtype))

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        inner, picture = x.to(decoder.dtype), cond["picture"].to(decoder.dtype)
        return Pred(decoder(inner, t.to(inner.dtype), hear(cond["pooled"]), picture).to(x.dtype))

    return (
        Stage(
            name="decoder",
            network=decoder,
            space=PaellaSpace(components["vqgan"], made=sides),
            scheduler=scheduler,
            dtype=decoder.dtype,
            schedule=lambda run: schedule(scheduler, run, decoder.device),
            condition=condition,
            guide=guide,
            predict=predict,
        ),
    )


def decoder_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    wuerstchen.decoder_check(components, args)
    check_texts(args)


def between(parts: Components, run: Run) -> dict[str, Any]:
    """The decoder hears what the prior's text encoder says."""
    made: dict[str, Any] = {}
    for name in ("prompt", "negative_prompt"):
        if name == "prompt" or guided(run):
            made[f"{name}_embeds_pooled"] = text(parts, run, name, run.prompts)[1]
    return made


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """Prior and decoder."""
    return wuerstchen.chained(components, run, prior_stages, decoder_stages, between)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    wuerstchen.check(components, args)
    check_texts(args)
    check_pictures(components, args, "prior_")


PRIOR = Family(
    key="cascade-prior",
    stem="StableCascadePrior",
    slots=PRIOR_SLOTS,
    settings=dict(resolution_multiple=COARSE),
    tasks={"text2image": PRIOR_TASK},
    stages=prior_stages,
    finish=prior_finish,
    check=prior_check,
    size=wuerstchen.size,
)
DECODER = Family(
    key="cascade-decoder",
    stem="StableCascadeDecoder",
    slots=SLOTS,
    settings=dict(latent_dim_scale=FINE),
    tasks={"text2image": DECODER_TASK},
    stages=decoder_stages,
    finish=wuerstchen.finish,
    check=decoder_check,
    read=wuerstchen.decoder_read,
    size=wuerstchen.size,
)
FAMILY = Family(
    key="cascade",
    stem="StableCascade",
    slots={name: SLOTS[name] for name in WHOLE_ORDER} | LINKED,
    settings=dict[str, Any](),
    tasks={"text2image": TASK},
    stages=stages,
    finish=wuerstchen.finish,
    check=check,
    read=wuerstchen.read,
    size=wuerstchen.size,
    linked="prior",
    addons={"PAG": partial(pag.attach, stage=0)},
)
