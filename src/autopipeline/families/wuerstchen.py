"""Würstchen (Pernias et al. 2024): a prior imagines a small embedding of a picture, a decoder makes latents of it.

What Stable Cascade shares is here, too: the spaces, the texts, how one stage follows the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autopipeline import prompts
from autopipeline.addons import pag
from autopipeline.errors import NotFiniteError
from autopipeline.families import callbacks
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.once import once
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, VectorSpace
from autopipeline.stage import Cond, Family, Finished, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
Row = Callable[[Tensor], Tensor]
COARSE, FINE = 42.67, 10.67
"""Pixels for each place of an embedding, and latents for each of these."""
MEAN, DEVIATION = 42.0, 1.0

SCHEDULER = Slot(("DDPMWuerstchenScheduler",))
DECODER_SLOTS = {
    "tokenizer": Slot(("CLIPTokenizer",)),
    "text_encoder": Slot(("CLIPTextModel", "CLIPTextModelWithProjection")),
    "decoder": Slot(("WuerstchenDiffNeXt",)),
    "scheduler": SCHEDULER,
    "vqgan": Slot(("PaellaVQModel",)),
}
PRIOR_SLOTS = {
    "tokenizer": DECODER_SLOTS["tokenizer"],
    "text_encoder": DECODER_SLOTS["text_encoder"],
    "prior": Slot(("WuerstchenPrior",)),
    "scheduler": SCHEDULER,
}
LINKED = {f"prior_{name}": PRIOR_SLOTS[name] for name in ("prior", "text_encoder", "tokenizer", "scheduler")}
WHOLE_ORDER = ("text_encoder", "tokenizer", "decoder", "scheduler", "vqgan")

PRIOR_SETTINGS = dict(latent_mean=MEAN, latent_std=DEVIATION, resolution_multiple=COARSE)
_AGAINST = dict(negative_prompt=None)
_EMBEDS = dict(prompt_embeds=None, negative_prompt_embeds=None)
DRAWS = dict(num_images_per_prompt=1, generator=None, latents=None)
PRIOR_CALLBACK = {f"prior_{name}": default for name, default in sd.CALLBACK.items()}
OLD_CALLBACK = dict(prior_callback=None, prior_callback_steps=1) | callbacks.PARAMS
PRIOR_TENSORS = ("latents", "text_encoder_hidden_states")
_TENSORS = (*PRIOR_TENSORS, "image_embeddings")
TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, height=512, width=512)
    | dict(prior_num_inference_steps=60, prior_timesteps=None, prior_guidance_scale=4.0)
    | dict(num_inference_steps=12, decoder_timesteps=None, decoder_guidance_scale=0.0)
    | _AGAINST
    | _EMBEDS
    | DRAWS
    | dict(output_type="pil", return_dict=True)
    | PRIOR_CALLBACK
    | sd.CALLBACK
    | OLD_CALLBACK,
    tensors=_TENSORS,
)
DECODER_TASK = TaskRow(
    task=Text2Image,
    params=dict(image_embeddings=None, prompt=None, num_inference_steps=12, timesteps=None, guidance_scale=0.0)
    | _AGAINST
    | DRAWS
    | dict(output_type="pil", return_dict=True)
    | sd.CALLBACK
    | callbacks.PARAMS,
    tensors=_TENSORS,
)
PRIOR_TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, height=1024, width=1024, num_inference_steps=60, timesteps=None, guidance_scale=8.0)
    | _AGAINST
    | _EMBEDS
    | DRAWS
    | dict(output_type="pt", return_dict=True)
    | sd.CALLBACK
    | callbacks.PARAMS,
    tensors=PRIOR_TENSORS,
)


class PaellaSpace(LatentSpace):
    """Latents of Paella's autoencoder, whose pictures are in 0..1; `made` says how many there are along each side."""

    __slots__ = ()

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, C, h, w)."""
        assert self.made is not None
        return run.batch, self.channels, *self.made

    def decode(self, x: Tensor) -> Tensor:
        """Pictures in -1..1, as elsewhere; raises NotFiniteError where they are not finite."""
        vqgan = self.vae
        made = vqgan.decode((vqgan.config.scale_factor * x).to(device=vqgan.device, dtype=vqgan.dtype))
        if not torch.isfinite(made).all():
            raise NotFiniteError("The vqgan gave NaN or infinity while decoding.")
        return 2 * made.clamp(0, 1) - 1


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def guided(run: Run) -> bool:
    """Whether there is a negative branch."""
    return "negative" in guide(run).branches


def encoded(components: Components, texts: list[str]) -> Any:
    """CLIP's states and vectors of texts, whose padding nobody sees."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    ids, mask = prompts.tokens(tokenizer, texts), tokenizer.counted(texts)
    out = encoder(ids.to(encoder.device), mask.to(encoder.device))
    prompts.finite(out.last, "text_encoder")
    return out


def texts_of(run: Run, name: str, count: int) -> list[str]:
    """So many texts: one for all, or a list of which each is for as many as there are to one."""
    given = run.get(name)
    many = [given or ""] if given is None or isinstance(given, str) else list(given)
    if count % len(many):
        raise ValueError(f"{name} has {len(many)} entries for {count} embeddings of pictures.")
    return [text for text in many for _ in range(count // len(many))]


def branches(run: Run, row: Callable[[str], Tensor]) -> Tensor:
    """Rows (branches * B, ...) of what is known by name of each branch, each for all its results."""
    names = ["negative_prompt", "prompt"][0 if guided(run) else 1 :]
    made = [row(name) for name in names]
    return torch.cat([prompts.each(rows.to(made[-1]), run.batch // len(rows)) for rows in made])


# --- the prior ---------------------------------------------------------------------------------------------------


def coarse(run: Run) -> tuple[int, int]:
    """Height and width of a prior's embeddings."""
    multiple = run.settings.get("resolution_multiple", COARSE)
    return ceil(run["height"] / multiple), ceil(run["width"] / multiple)


def prior_text(components: Components, run: Run) -> Tensor:
    """CLIP's last states (branches * B, T, E), or what the caller gives in their place."""

    def row(name: str) -> Tensor:
        given = run[f"{name}_embeds"]
        return encoded(components, texts_of(run, name, run.prompts)).last if given is None else given

    return branches(run, row)


def prior_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: from noise to embeddings."""
    prior, scheduler = components["prior"], components["scheduler"]
    mean, deviation = (run.settings.get(name, PRIOR_SETTINGS[name]) for name in ("latent_mean", "latent_std"))

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        inner = x.to(prior.dtype)
        text, marks = cond["text"].to(inner), cond.get("perturbed")
        return Pred(prior(inner, t.to(x.dtype).to(inner.dtype), text, marks).to(x.dtype))

    return (
        Stage(
            name="prior",
            network=prior,
            space=VectorSpace(prior.config.c_in, sides=coarse(run)),
            scheduler=scheduler,
            dtype=components["text_encoder"].dtype,
            schedule=lambda run: schedule(scheduler, run, prior.device),
            condition=lambda run, x: {"text": prior_text(components, run).to(prior.device)},
            guide=guide,
            predict=predict,
            emit=lambda x, x0: x * mean - deviation,
            public={"text": "text_encoder_hidden_states"},
        ),
    )


def as_asked(run: Run, made: dict[str, Any]) -> dict[str, Any]:
    """Tensors, or arrays."""
    return {
        name: rows.float().cpu().numpy() if run["output_type"] == "np" and rows is not None else rows
        for name, rows in made.items()
    }


def prior_finish(components: Components, run: Run, x: Tensor) -> dict[str, Any]:
    """The embeddings."""
    return as_asked(run, {"image_embeddings": x})


def prior_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    if args["output_type"] not in ("pt", "np"):
        raise ValueError(f"output_type={args['output_type']!r} has to be 'pt' or 'np': a prior makes no pictures.")


# --- the decoder -------------------------------------------------------------------------------------------------


def fine(components: Components, run: Run) -> tuple[int, int]:
    """Height and width of a decoder's latents: so many for each place of an embedding, in whole patches."""
    given = run.get("image_embeddings")
    height, width = coarse(run) if given is None else given.shape[-2:]
    scale, patch = run.settings.get("latent_dim_scale", FINE), components["decoder"].config.patch_size
    return int(height * scale) // patch * patch, int(width * scale) // patch * patch


def picture_rows(run: Run) -> Tensor:
    """Embeddings of pictures (branches * B, C, h, w): none of the negative branch."""
    rows = prompts.each(run["image_embeddings"], run.batch // len(run["image_embeddings"]))
    return torch.cat([torch.zeros_like(rows), rows]) if guided(run) else rows


def decoder_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the decoder in the latents of Paella's autoencoder."""
    decoder, scheduler = components["decoder"], components["scheduler"]
    sides = fine(components, run)

    def condition(run: Run, x: Tensor) -> Cond:
        count = run.batch // run["num_images_per_prompt"]
        text = branches(run, lambda name: encoded(components, texts_of(run, name, count)).last)
        return {"picture": picture_rows(run).to(x), "text": text.to(x)}

    @once
    def hear(picture: Tensor, text: Tensor) -> tuple[Any, ...]:
        return decoder.hear(picture.to(decoder.dtype), text.to(decoder.dtype), *sides)

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        inner = x.to(decoder.dtype)
        return Pred(decoder(inner, t.to(inner.dtype), *hear(cond["picture"], cond["text"])).to(x.dtype))

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
            public={"text": "text_encoder_hidden_states", "picture": "image_embeddings"},
        ),
    )


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(PaellaSpace(components["vqgan"]).decode(x))


def decoder_read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with embeddings in lists and arrays as one tensor, and old callbacks as new ones."""
    given = args["image_embeddings"]
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, list | tuple) and given and all(isinstance(one, Tensor) for one in given):
        given = torch.cat(list(given))
    args = args | dict(image_embeddings=given)
    return callbacks.read(components, args) if "callback" in args else args


def decoder_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    rows, channels = args["image_embeddings"], components["decoder"].config
    wide = channels["effnet_embd"] if "effnet_embd" in channels else channels["effnet_in_channels"]
    if rows.ndim != 4 or rows.shape[1] != wide:
        raise ValueError(f"image_embeddings have the shape {tuple(rows.shape)}; here it has to be (N, {wide}, h, w).")
    if args["prompt"] is None and args.get("prompt_embeds") is None:
        raise ValueError("A prompt is needed beside image_embeddings: pass prompt=.")


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, where a call names none."""
    return 1024, 1024


# --- both --------------------------------------------------------------------------------------------------------


def chained(
    components: Components,
    run: Run,
    prior: Callable[[Components, Run], tuple[Stage, ...]],
    decoder: Callable[[Components, Run], tuple[Stage, ...]],
    between: Callable[[Components, Run], dict[str, Any]] = lambda parts, run: {},
) -> tuple[Stage, ...]:
    """A prior with its own steps, guidance and callback, then a decoder with what the prior imagined.

    `between` says what else the decoder takes over from the prior's components.
    """
    args = run.args
    parts = {name.removeprefix("prior_"): part for name, part in components.items() if name.startswith("prior_")}
    own = dict(args) | {name.removeprefix("prior_"): value for name, value in args.items() if name.startswith("prior_")}
    later = dict(args) | dict(timesteps=args.get("decoder_timesteps"), guidance_scale=args["decoder_guidance_scale"])

    def first(run: Run, x: Tensor) -> None:
        run.args, run.guidance_scale = own, args["prior_guidance_scale"]

    def second(run: Run, x: Tensor) -> None:
        run.guidance_scale = args["decoder_guidance_scale"]
        taken = between(parts, run)
        run.args = later | dict(image_embeddings=x, latents=None, num_images_per_prompt=1) | taken

    return (
        *(replace(stage, enter=first) for stage in prior(parts, run)),
        *(replace(stage, enter=second) for stage in decoder(components, run)),
    )


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """Prior and decoder."""
    return chained(components, run, prior_stages, decoder_stages)


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Old callbacks as new ones; the scale of the last stage is that of the call."""
    if "callback" in args:
        args = _old(components, callbacks.read(components, args))
    return args | dict(guidance_scale=args["decoder_guidance_scale"])


def _old(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """The prior's callback of older programs as a newer one."""
    names = ("callback", "callback_steps", *sd.CALLBACK, "scheduler")
    own = {name: args[f"prior_{name}"] for name in names[:-1]} | dict(scheduler=None)
    made = callbacks.read({"scheduler": components["prior_scheduler"]}, own)
    return args | {f"prior_{name}": made[name] for name in sd.CALLBACK}


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    _warn_of_sizes(components, args)
    callback, names = (args.get(name) for name in PRIOR_CALLBACK)
    if callback is not None and not callable(callback):
        raise TypeError(f"prior_callback_on_step_end has to be a function, not {type(callback).__name__}.")
    unknown = [name for name in names or () if name not in PRIOR_TENSORS]
    if unknown:
        able = ", ".join(PRIOR_TENSORS)
        raise ValueError(f"prior_callback_on_step_end_tensor_inputs may name {able}, not {unknown[0]!r}.")


def _warn_of_sizes(components: Components, args: Mapping[str, Any]) -> None:
    """Embeddings have whole places and latents whole patches, so that not every size can be made."""
    patch, levels = components["decoder"].config.patch_size, components["vqgan"].config
    pixels = levels.up_down_scale_factor * 2 ** (levels.levels - 1)  # for each of the latents
    for side in ("height", "width"):
        near = int(ceil(args[side] / COARSE) * FINE) // patch * patch * pixels
        if near != args[side]:
            warnings.warn(f"{side}={args[side]} is no multiple of 128 pixels; {near} are made.", stacklevel=2)


PRIOR = Family(
    key="wuerstchen-prior",
    stem="WuerstchenPrior",
    slots=PRIOR_SLOTS,
    settings=PRIOR_SETTINGS,
    tasks={"text2image": PRIOR_TASK},
    stages=prior_stages,
    finish=prior_finish,
    check=prior_check,
    read=callbacks.read,
    size=size,
)
DECODER = Family(
    key="wuerstchen-decoder",
    stem="WuerstchenDecoder",
    slots=DECODER_SLOTS,
    settings=dict(latent_dim_scale=FINE),
    tasks={"text2image": DECODER_TASK},
    stages=decoder_stages,
    finish=finish,
    check=decoder_check,
    read=decoder_read,
    size=size,
)
FAMILY = Family(
    key="wuerstchen",
    stem="Wuerstchen",
    slots={name: DECODER_SLOTS[name] for name in WHOLE_ORDER} | LINKED,
    settings=dict[str, Any](),
    tasks={"text2image": TASK},
    stages=stages,
    finish=finish,
    check=check,
    read=read,
    size=size,
    linked="prior",
    addons={"PAG": partial(pag.attach, stage=0)},
)
