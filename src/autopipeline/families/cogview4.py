"""CogView4 (Z.ai 2025): a transformer on a flow in latents, led by the language model GLM-4, and told sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.addons import control
from autopipeline.families import cogview3, flux
from autopipeline.families.schedules import require_flow, strong
from autopipeline.stage import Cond, Family, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]
BLOCK = 16
"""Texts have so many tokens, or a multiple of it."""

SLOTS = {
    "tokenizer": Slot(("PreTrainedTokenizerFast", "TokenizersBackend"), optional=True),
    "text_encoder": Slot(("GlmModel",), optional=True),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("CogView4Transformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}


def params(begin: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a task, from those of its inputs."""
    return (
        dict(prompt=None, negative_prompt=None)
        | dict(begin)
        | dict(num_inference_steps=50, timesteps=None, sigmas=None, guidance_scale=5.0, num_images_per_prompt=1)
        | dict(generator=None, latents=None)
        | cogview3.EMBEDS
        | cogview3.MICRO
        | cogview3.LAST
        | dict(attention_kwargs=None)
        | cogview3.CALLBACK
        | dict(max_sequence_length=1024)
    )


_IMAGE = dict(image=None) | cogview3.SIZE | dict(strength=0.6)
_MASK = dict(image=None, mask_image=None) | cogview3.SIZE | dict(padding_mask_crop=None, strength=0.6)
TASKS = {
    "text2image": TaskRow(task=Text2Image, params=params(cogview3.SIZE), tensors=cogview3.TENSORS),
    "image2image": TaskRow(task=Image2Image, params=params(_IMAGE), tensors=cogview3.TENSORS),
    "inpaint": TaskRow(task=Inpaint, params=params(_MASK), tensors=(*cogview3.TENSORS, "mask", "masked_image_latents")),
}
CONTROL = TaskRow(task=Text2Image, params=params(dict(control_image=None) | cogview3.SIZE), tensors=cogview3.TENSORS)


def encode(components: Components, texts: list[str], length: int) -> Tensor:
    """GLM's last states but one (B, T, E); what pads the texts on the left counts as well."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    ids, _ = prompts.foreign_tokens(tokenizer, texts, length, padding="longest")
    ids = functional.pad(ids, (-ids.shape[1] % BLOCK, 0), value=tokenizer.pad_token_id)
    states = encoder(ids.to(encoder.device), output_hidden_states=True, use_cache=False).hidden_states
    return prompts.finite(states[-2], "text_encoder")


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, E) of all branches, and how many tokens each has, if they differ."""
    signs = ["" if branch == "positive" else "negative_" for branch in cogview3.guide(run).branches]
    texts = [rows for sign in signs for rows in _texts(components, run, f"{sign}prompt")]
    return flux.joined(texts, run.batch // run.prompts)


def _texts(components: Components, run: Run, name: str) -> list[Tensor]:
    """One tensor for all prompts, padded to the longest as users of a seed know them, or one for each."""
    given, length = run[f"{name}_embeds"], run["max_sequence_length"]
    if given is not None:
        return [given]
    texts = prompts.rows(run[name] or "", run.prompts, name)
    groups = [[text] for text in texts] if run.random.apart else [texts]
    return [encode(components, group, length) for group in groups]


def schedule(components: Components, run: Run, to_one: bool = True) -> Grid:
    """Whole steps of training for the network, and shares of noise, shifted for the size of the picture, for x.

    `to_one`: the last step begins at the first one of training, not a step before it.
    """
    scheduler, network = components["scheduler"], components["transformer"]
    require_flow(scheduler)
    lacking = {"timesteps", "sigmas"} - set(scheduler.takes)
    if lacking:
        raise ValueError(f"{type(scheduler).__name__} takes no own {min(lacking)}, which this network walks by.")
    total, own, sigmas = scheduler.config.num_train_timesteps, run["timesteps"], run["sigmas"]
    steps = run["num_inference_steps"] if own is sigmas is None else len(sigmas if own is None else own)
    even = np.linspace(total, 1.0, steps if to_one else steps + 1)[:steps]
    times = np.trunc(even if own is None else np.array(own, dtype=np.float64))
    levels = times / total if sigmas is None else sigmas
    mu = _shift(components, run) if scheduler.config.get("use_dynamic_shifting") else None
    grid = scheduler.grid(None, timesteps=times, sigmas=levels, mu=mu, device=network.device)
    return strong(grid, scheduler, run.get("strength"), steps)


def _shift(components: Components, run: Run) -> float:
    """How far to shift towards noise: on a line in the root of the number of tokens."""
    config, square = components["scheduler"].config, cogview3.space_of(components).multiple
    tokens = run["height"] // square * (run["width"] // square)
    slope, low = config.get("max_shift", 0.75), config.get("base_shift", 0.25)
    return (tokens / config.get("base_image_seq_len", 256)) ** 0.5 * slope + low


def _predict(network: Any) -> Predict:
    """The velocity, in one pass for each length of text that there is."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {name: rows.to(network.device, network.dtype) for name, rows in cond.items() if name != "places"}
        return Pred(network(x.to(network.dtype), t, **typed, places=cond["places"]).to(x.dtype))

    return flux.by_length(predict)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, space = components["transformer"], cogview3.space_of(components)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text_rows(components, run).items()}
        return cond | cogview3.told(network, run, space, x, len(cond["encoder_hidden_states"]))

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=components["scheduler"],
            dtype=torch.float32,
            schedule=lambda run: schedule(components, run),
            condition=condition,
            guide=cogview3.guide,
            predict=_predict(network),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed; texts may differ in length."""
    prompts.check(args, alike=False)
    cogview3.check_size(components, args)
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="cogview4",
    stem="CogView4",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=cogview3.finish,
    size=cogview3.default_size,
    check=check,
    variants={frozenset({"Control"}): {"text2image": CONTROL}},
    addons={"Control": partial(control.attach, drawn=False)},
)
