"""AuraFlow (fal 2024): a transformer on a flow, led by UMT5 alone; what the text encoder says of padding is zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families.schedules import require_flow, strong
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]

SLOTS = {
    "tokenizer": Slot(("LlamaTokenizer", "T5Tokenizer"), optional=True),
    "text_encoder": Slot(("UMT5EncoderModel",), optional=True),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("AuraFlowTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_PROMPTS = dict(prompt=None, negative_prompt=None)
_STEPS = dict(num_inference_steps=50, sigmas=None, guidance_scale=3.5, num_images_per_prompt=1)
_REST = dict(
    generator=None,
    latents=None,
    prompt_embeds=None,
    prompt_attention_mask=None,
    negative_prompt_embeds=None,
    negative_prompt_attention_mask=None,
    max_sequence_length=256,
    output_type="pil",
    return_dict=True,
    attention_kwargs=None,
    callback_on_step_end=None,
    callback_on_step_end_tensor_inputs=("latents",),
)
_TENSORS = ("latents", "prompt_embeds")
TASKS = {
    "text2image": TaskRow(
        task=Text2Image, params=_PROMPTS | _STEPS | dict(height=1024, width=1024) | _REST, tensors=_TENSORS
    ),
    "image2image": TaskRow(
        task=Image2Image, params=_PROMPTS | dict(image=None, strength=0.6) | _STEPS | _REST, tensors=_TENSORS
    ),
    "inpaint": TaskRow(
        task=Inpaint,
        params=_PROMPTS
        | dict(image=None, mask_image=None, height=None, width=None, padding_mask_crop=None, strength=0.6)
        | _STEPS
        | _REST,
        tensors=(*_TENSORS, "mask", "masked_image_latents"),
    ),
}


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> Tensor:
    """Hidden states (B, length, J) of the text encoder, zeros for padding."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None:
        raise ValueError("This checkpoint has no text_encoder; pass prompt_embeds and prompt_attention_mask.")
    ids = prompts.long_tokens(tokenizer, texts, length)
    mask = tokenizer.mask(ids).to(encoder.device)
    hidden = encoder(ids.to(encoder.device), mask)
    return prompts.finite(hidden * mask[..., None].to(hidden), "text_encoder")


def text_rows(components: Components, run: Run) -> Tensor:
    """Embeddings (branches * B, T, J) of all branches; a negative prompt has as many tokens as the prompt."""
    positive = run["prompt_embeds"]
    if positive is None:
        texts = prompts.rows(run["prompt"], run.prompts, "prompt")
        positive = encode(components, texts, run["max_sequence_length"])
    branches = [positive]
    if run.guidance_scale > 1:
        negative = run["negative_prompt_embeds"]
        if negative is None:
            texts = prompts.rows(run["negative_prompt"] or "", run.prompts, "negative_prompt")
            negative = encode(components, texts, positive.shape[1])
        branches.insert(0, negative)
    times = run.batch // run.prompts
    return torch.cat([prompts.each(rows.to(positive), times) for rows in branches])


def _schedule(components: Components, run: Run) -> Grid:
    """The scheduler's own grid, or the caller's share of noise at each step."""
    scheduler, own = components["scheduler"], run["sigmas"]
    require_flow(scheduler)
    steps = run["num_inference_steps"] if own is None else len(own)
    grid = scheduler.grid(steps if own is None else None, sigmas=own, device=components["transformer"].device)
    return strong(grid, scheduler, run.get("strength"), steps)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder = components["transformer"], components["text_encoder"]

    def condition(run: Run, x: Tensor) -> Cond:
        return {"encoder_hidden_states": text_rows(components, run)}

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        text = cond["encoder_hidden_states"].to(network.device, network.dtype)
        time = (t / 1000).to(x.dtype)
        marks = cond.get("perturbed")
        return Pred(network(x.to(network.dtype), time, encoder_hidden_states=text, perturbed=marks).to(x.dtype))

    return (
        Stage(
            name="transformer",
            network=network,
            space=_space(components),
            scheduler=components["scheduler"],
            dtype=(network if encoder is None else encoder).dtype,
            schedule=lambda run: _schedule(components, run),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def _space(components: Components) -> LatentSpace:
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components).decode(x))


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed.

    Masks of given embeddings are looked at here alone: their padding has to be zeros already.
    """
    prompts.check(args)
    for name in ("prompt", "negative_prompt"):
        embeds, mask = args[f"{name}_embeds"], args[f"{name}_attention_mask"]
        if (embeds is None) != (mask is None):
            raise ValueError(f"{name}_embeds and {name}_attention_mask need each other.")
    negative = args["negative_prompt_embeds"]
    if negative is not None and args["prompt"] is not None and negative.shape[1] != args["max_sequence_length"]:
        raise ValueError(
            f"negative_prompt_embeds has {negative.shape[1]} tokens; the prompt has "
            f"max_sequence_length={args['max_sequence_length']}."
        )
    square = _space(components).multiple
    for side in ("height", "width"):
        if args.get(side) is not None and args[side] % square:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="auraflow",
    stem="AuraFlow",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    check=check,
    size=default_size,
)
