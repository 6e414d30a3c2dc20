"""Krea 2 (2026): a transformer on packed latents, led by what many layers of Qwen 3-VL think of a description."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.families.flux import places
from autopipeline.families.once import once
from autopipeline.families.qwenimage import AFTER, BEFORE, INSTRUCTION
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.models.rotary import grid_places
from autopipeline.spaces import LatentSpace, Packed, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
Texts = tuple[Tensor, Tensor]
"""Hidden states (P, T, layers, E), and which tokens count (P, T)."""
CLOSING = 5
"""Tokens of what ends the chat, which stands after the padding."""
SHIFT = 1.15
"""How far towards noise the grids of distilled networks are shifted, whatever the size."""
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Layers of the text encoder that are heard, where the checkpoint says nothing; 0 is before the first."""

SLOTS = {
    "scheduler": Slot(("Scheduler",)),
    "vae": Slot(("AutoencoderKLQwenImage",)),
    "text_encoder": Slot(("Qwen3VLModel", "Qwen3VLForConditionalGeneration"), optional=True),
    "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"), optional=True),
    "transformer": Slot(("Krea2Transformer2DModel",)),
}
_TEXT, _SIZE = dict(prompt=None, negative_prompt=None), dict(height=1024, width=1024)
_REST = (
    dict(num_inference_steps=28, sigmas=None, guidance_scale=4.5)
    | dict(num_images_per_prompt=1, generator=None, latents=None)
    | dict(prompt_embeds=None, prompt_embeds_mask=None)
    | dict(negative_prompt_embeds=None, negative_prompt_embeds_mask=None)
    | dict(output_type="pil", return_dict=True)
    | dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))
    | dict(attention_kwargs=None, max_sequence_length=512)
)
_TENSORS = ("latents", "prompt_embeds")
TASKS = {
    "text2image": TaskRow(task=Text2Image, params=_TEXT | _SIZE | _REST, tensors=_TENSORS),
    "image2image": TaskRow(
        task=SharedImage2Image, params=_TEXT | dict(image=None) | _SIZE | dict(strength=0.6) | _REST, tensors=_TENSORS
    ),
    "inpaint": TaskRow(
        task=Blend,
        params=_TEXT | dict(image=None, mask_image=None) | _SIZE | dict(padding_mask_crop=None, strength=0.6) | _REST,
        tensors=_TENSORS,
    ),
}


def guide(run: Run) -> Guidance:
    """Guidance for scales above 0, which say how far to go beyond the prompt: 1 less than elsewhere."""
    return ClassifierFree(1 + run.guidance_scale) if run.guidance_scale > 0 else Unguided()


def encode(components: Components, texts: list[str], length: int, layers: tuple[int, ...]) -> Texts:
    """States of so many layers for the prompts, padded to a length, and for the end of the chat after that.

    Padding takes no places: the end stands where it would without.
    """
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    ids, mask = prompts.foreign_tokens(tokenizer, [BEFORE + text for text in texts], length + INSTRUCTION - CLOSING)
    end = torch.tensor(tokenizer([AFTER]).input_ids).expand(len(texts), -1)
    ids, mask = torch.cat([ids, end], 1).to(encoder.device), torch.cat([mask, torch.ones_like(end)], 1)
    mask = mask.to(encoder.device)
    stands = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    said = encoder(input_ids=ids, attention_mask=mask.bool(), position_ids=stands, output_hidden_states=True)
    heard = torch.stack([said.hidden_states[layer] for layer in layers], 2)
    return prompts.finite(heard[:, INSTRUCTION:], "text_encoder"), mask[:, INSTRUCTION:].bool()


def text_rows(components: Components, run: Run) -> Cond:
    """States (branches * B, T, layers, E) and masks (branches * B, T) of all branches; shorter ones are padded."""
    names = ["negative_prompt", "prompt"][0 if "negative" in guide(run).branches else 1 :]
    branches = [_branch(components, run, name) for name in names]
    longest, times = max(mask.shape[1] for _, mask in branches), run.batch // run.prompts
    states = [functional.pad(rows, (0, 0, 0, 0, 0, longest - rows.shape[1])) for rows, _ in branches]
    masks = [functional.pad(mask, (0, longest - mask.shape[1])) for _, mask in branches]
    device, dtype = components["transformer"].device, _dtype(components)
    return {
        "encoder_hidden_states": torch.cat([prompts.each(rows.to(device, dtype), times) for rows in states]),
        "mask": torch.cat([prompts.each(mask.to(device), times) for mask in masks]),
    }


def _branch(components: Components, run: Run, name: str) -> Texts:
    """What the caller gives for a branch, or the encoded texts."""
    given = run[f"{name}_embeds"]
    if given is not None:
        return given, run[f"{name}_embeds_mask"].bool()
    layers = tuple(run.settings["text_encoder_select_layers"] or LAYERS)
    texts = prompts.rows(run[name] or "", run.prompts, name)
    return encode(components, texts, run["max_sequence_length"], layers)


def _dtype(components: Components) -> torch.dtype:
    """The precision of texts and latents: that of the text encoder, or of the transformer without it."""
    encoder = components["text_encoder"]
    return (components["transformer"] if encoder is None else encoder).dtype


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    network, scheduler = components["transformer"], components["scheduler"]
    space = _space(components, run)
    own = grid_places(space.height // space.patch, space.width // space.patch)
    shift = SHIFT if run.settings["is_distilled"] else None

    def condition(run: Run, x: Tensor) -> Cond:
        cond = text_rows(components, run)
        count, tokens = cond["mask"].shape
        return cond | {"rotary": network.rotary(places(tokens, own)).to(network.device).expand(count, -1, -1, -1)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=_dtype(components),
            schedule=lambda run: flow_schedule(scheduler, run, network.device, len(own), shift),
            condition=condition,
            guide=guide,
            predict=_predict(network, scheduler.config["num_train_timesteps"]),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def _predict(network: Any, times: int) -> Predict:
    """The transformer as a prediction."""

    @once
    def fuse(states: Tensor, mask: Tensor) -> Tensor:
        return network.fuse(states.to(network.dtype), mask)

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        text = fuse(cond["encoder_hidden_states"], cond["mask"])
        time = (t / times).to(x.dtype)
        told = cond["rotary"], cond["mask"], cond.get("perturbed")
        return Pred(network(x.to(network.dtype), time, text, *told).to(x.dtype))

    return predict


def _space(components: Components, run: Run) -> Packed:
    patch, scale = run.settings["patch_size"], factor(components["vae"])
    return Packed(LatentSpace(components["vae"], patch=patch), run["height"] // scale, run["width"] // scale, patch)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components, run).decode(x))


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels."""
    return 1024, 1024


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Sizes are rounded up to whole patches, and somebody should know."""
    step = components["patch_size"] * factor(components["vae"])
    for side in ("height", "width"):
        size = args[side]
        if isinstance(size, int) and size % step and size > 0:
            near = -(-size // step) * step
            warnings.warn(f"{side}={size} is no multiple of {step} pixels; {near} are made.", stacklevel=2)
            args = args | {side: near}
    return args


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args, alike=False)
    for name in ("prompt", "negative_prompt"):
        embeds, mask = args[f"{name}_embeds"], args[f"{name}_embeds_mask"]
        if (embeds is None) != (mask is None):
            raise ValueError(f"{name}_embeds and {name}_embeds_mask need each other.")
        if embeds is not None and (not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_embeds_mask has to be a torch.Tensor of the shape {tuple(embeds.shape[:2])}.")
    if components["text_encoder"] is not None and args["max_sequence_length"] <= CLOSING:
        raise ValueError(f"max_sequence_length has to be more than {CLOSING}, the tokens that end the chat.")
    channels, patch = components["transformer"].config.in_channels, components["patch_size"]
    if channels != components["vae"].config.z_dim * patch**2:
        raise ValueError(f"The transformer takes {channels} channels, not patches of {patch} x {patch} latents.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="krea2",
    stem="Krea2",
    slots=SLOTS,
    settings=dict(text_encoder_select_layers=LAYERS, is_distilled=False, patch_size=2),
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
    read=read,
    embeds_rank=4,
)
