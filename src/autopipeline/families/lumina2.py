"""Lumina-Image 2.0 (Qin et al. 2025): a transformer over one sequence of Gemma 2's words and the picture, on a flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import prompts
from autopipeline.families import lumina
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, NormPreserving, Unguided
from autopipeline.spaces import LatentSpace
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage

Components = Mapping[str, Any]

INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""What the language model is told before the prompt; the network was trained with these very words."""

SLOTS = lumina.SLOTS | {
    "text_encoder": Slot(("Gemma2Model",), optional=True),
    "transformer": Slot(("Lumina2Transformer2DModel",)),
}
TASKS = lumina.rows(
    dict(attention_kwargs=None)
    | lumina.CALLBACK
    | dict(system_prompt=None, cfg_trunc_ratio=1.0, cfg_normalization=True, max_sequence_length=256)
)


def guide(run: Run) -> Guidance:
    """Guidance for scales above 1, as long as no more than `cfg_trunc_ratio` of the steps have been made."""
    if run.guidance_scale <= 1 or (run.now.position + 1) / run.now.total > run["cfg_trunc_ratio"]:
        return Unguided()
    return (NormPreserving if run["cfg_normalization"] else ClassifierFree)(run.guidance_scale)


def text_rows(components: Components, run: Run) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, T, E) and masks (branches * B, T) of all branches; the negative one is told nothing."""
    embeds, mask = run["prompt_embeds"], run["prompt_attention_mask"]
    if embeds is None:
        told = INSTRUCTION if run["system_prompt"] is None else run["system_prompt"]
        texts = [f"{told} <Prompt Start> {text}" for text in prompts.rows(run["prompt"], run.prompts, "prompt")]
        embeds, mask = lumina.encode(components, texts, run["max_sequence_length"])
    branches = [(embeds, mask)]
    if "negative" in guide(run).branches:
        negative = run["negative_prompt_embeds"], run["negative_prompt_attention_mask"]
        if negative[0] is None:
            texts = prompts.rows(run["negative_prompt"] or "", run.prompts, "negative_prompt")
            negative = lumina.encode(components, texts, run["max_sequence_length"])
        branches.insert(0, negative)
    longest, times = max(rows.shape[1] for rows, _ in branches), run.batch // run.prompts
    padded = [functional.pad(rows.to(embeds), (0, 0, 0, longest - rows.shape[1])) for rows, _ in branches]
    masks = [functional.pad(mask.to(embeds.device).long(), (0, longest - mask.shape[1])) for _, mask in branches]
    return (
        torch.cat([prompts.each(rows, times) for rows in padded]),
        torch.cat([lumina.dealt(rows, times, run) for rows in masks]),
    )


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder, scheduler = components["transformer"], components["text_encoder"], components["scheduler"]
    space = _space(components)

    def condition(run: Run, x: Tensor) -> Cond:
        embeds, masks = text_rows(components, run)
        turns = network.turns(masks.cpu(), *(side // space.patch for side in x.shape[-2:]))
        rows = dict(encoder_hidden_states=embeds, encoder_attention_mask=masks, turns=turns)
        return {name: each.to(network.device) for name, each in rows.items()}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=(network if encoder is None else encoder).dtype,
            # As in the reference implementation, it is channels that are counted to shift the grid, not places.
            schedule=lambda run: flow_schedule(scheduler, run, network.device, space.channels),
            condition=condition,
            guide=guide,
            predict=_predict(network, scheduler.config["num_train_timesteps"]),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def _predict(network: Any, span: int) -> Predict:
    """The velocity towards noise; the network's time and velocity go the other way."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = cond | dict(encoder_hidden_states=cond["encoder_hidden_states"].to(network.dtype))
        return Pred(-network(x.to(network.dtype), 1 - t / span, **typed).to(x.dtype))

    return predict


def _space(components: Components) -> LatentSpace:
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components).decode(x))


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    lumina.check_common(components, args)
    if args["max_sequence_length"] > 512:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} is more than the 512 that are possible.")
    told = args["system_prompt"]
    if told is not None and not isinstance(told, str):
        raise TypeError(f"system_prompt has to be a string, not {type(told).__name__}.")
    if told is not None and args["prompt_embeds"] is not None:
        raise ValueError("system_prompt has no effect on prompt_embeds, which are encoded already.")
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        if args[name] is not None and (args[name].long().diff(dim=1) > 0).any():
            raise ValueError(f"In {name} the tokens that count have to come first.")


FAMILY = Family(
    key="lumina2",
    stem="Lumina2",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=lumina.default_size,
    check=check,
)
