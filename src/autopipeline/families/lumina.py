"""Lumina-Next (Zhuo et al. 2024): a transformer on a flow, led by Gemma, whose places are fitted to the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autopipeline import captions, images, prompts
from autopipeline.families.schedules import require_flow, schedule
from autopipeline.guidance import Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]

SLOTS = {
    "tokenizer": Slot(("GemmaTokenizer",), optional=True),
    "text_encoder": Slot(("GemmaModel",), optional=True),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("LuminaNextDiT2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_PROMPT = dict(prompt=None)
_SIZE = dict(width=None, height=None)
_MIDDLE = (
    dict(num_inference_steps=30, guidance_scale=4.0, negative_prompt=None, sigmas=None, num_images_per_prompt=1)
    | dict(generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None)
    | dict(prompt_attention_mask=None, negative_prompt_attention_mask=None, output_type="pil", return_dict=True)
)
CALLBACK = dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))


def rows(own: dict[str, Any]) -> dict[str, TaskRow]:
    """The tasks of a family with parameters of its `own`; pictures to begin with say themselves what size is made."""
    tensors = ("latents", "prompt_embeds")
    image, mask = dict(image=None), dict(image=None, mask_image=None)
    strength = dict(strength=0.6)
    return {
        "text2image": TaskRow(task=Text2Image, params=_PROMPT | _SIZE | _MIDDLE | own, tensors=tensors),
        "image2image": TaskRow(task=Image2Image, params=_PROMPT | image | strength | _MIDDLE | own, tensors=tensors),
        "inpaint": TaskRow(
            task=Blend,
            params=_PROMPT | mask | _SIZE | dict(padding_mask_crop=None) | strength | _MIDDLE | own,
            tensors=(*tensors, "mask", "masked_image_latents"),
        ),
    }


class ThreeChannels(NamedTuple):
    """Classifier-free guidance of the first three channels alone; the others are the prompt's, as it was trained."""

    scale: float
    branches: tuple[str, ...] = ("positive", "negative")  # the order in which callbacks know the embeddings

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The guided prediction."""
        positive, negative = (pred.mean[:, :3] for pred in preds)
        guided = torch.cat([negative + self.scale * (positive - negative), preds[0].mean[:, 3:]], 1)
        return Pred(guided if push is None else guided + push)


def guide(run: Run) -> Guidance:
    """Guidance for scales above 1."""
    return ThreeChannels(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Gemma's states before its last layer (B, length, E), and 1 for the tokens that count (B, length)."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError(
            "This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds and prompt_attention_mask."
        )
    ids = prompts.long_tokens(tokenizer, texts, length)
    mask = tokenizer.mask(ids).to(encoder.device)
    return prompts.finite(encoder(ids.to(encoder.device), mask, skip=1), "text_encoder"), mask


def dealt(rows: Tensor, times: int, run: Run) -> Tensor:
    """Masks for several pictures a prompt: as users of a seed know them, out of step with the embeddings (a b a b)."""
    return prompts.each(rows, times) if run.random.apart else rows.repeat(times, 1)


def text_rows(components: Components, run: Run) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, T, E) and masks (branches * B, T) of all branches.

    As in the reference implementation, a negative prompt is cut where the longest prompt ends, in eights of tokens,
    and is not put in lower case.
    """
    embeds, mask = run["prompt_embeds"], run["prompt_attention_mask"]
    if embeds is None:
        texts = captions.prepared(prompts.rows(run["prompt"], run.prompts, "prompt"), run["clean_caption"])
        embeds, mask = encode(components, texts, _length(components, texts, run["max_sequence_length"]))
    branches = [(embeds, mask)]
    if "negative" in guide(run).branches:
        branches.append(_negative(components, run, mask))
    times = run.batch // run.prompts
    return (
        torch.cat([prompts.each(rows.to(embeds), times) for rows, _ in branches]),
        torch.cat([dealt(mask.to(embeds.device), times, run) for _, mask in branches]),
    )


def _length(components: Components, texts: list[str], most: int) -> int:
    tokenizer = components["tokenizer"]
    return most if tokenizer is None else min(most, _eights(max(tokenizer.count(text) for text in texts)))


def _eights(count: int) -> int:
    return -(-count // 8) * 8


def _negative(components: Components, run: Run, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The negative branch, with as many tokens as the prompt, whose mask is given."""
    embeds, mask = run["negative_prompt_embeds"], run["negative_prompt_attention_mask"]
    if embeds is not None:
        return embeds, mask
    texts = prompts.rows(run["negative_prompt"] or "", run.prompts, "negative_prompt")
    embeds, mask = encode(components, texts, positive.shape[1])
    if run.random.apart:  # each one where its own prompt ends, whatever the others are
        ends = -(-positive.to(mask).sum(1, keepdim=True) // 8) * 8
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) < ends)
    return embeds, mask


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder, scheduler = components["transformer"], components["text_encoder"], components["scheduler"]
    space = _space(components)

    def condition(run: Run, x: Tensor) -> Cond:
        """Texts, and the tables of both ways to fit places to the size: before the watershed, and after it.

        What differs from run to run is a row of numbers, so that runs can share a pass.
        """
        embeds, masks = text_rows(components, run)
        height, width = (side // space.patch for side in x.shape[-2:])
        side = network.config.sample_size
        stretch = math.sqrt(x.shape[-2] * x.shape[-1]) / side
        sharp = math.sqrt(math.log(height * width, (side // 2) ** 2)) if run["proportional_attn"] else 1.0
        tables = dict(
            early=network.turns(height, width, linear=stretch)[None],
            late=network.turns(height, width, ntk=stretch)[None],
            watershed=embeds.new_full((1, 1), run["scaling_watershed"], dtype=torch.float32),
            sharpness=embeds.new_full((1, 1), sharp, dtype=torch.float32),
        )
        text = dict(encoder_hidden_states=embeds, encoder_mask=masks)
        every = {name: rows.expand(len(embeds), *rows.shape[1:]) for name, rows in tables.items()}
        return {name: rows.to(network.device) for name, rows in (text | every).items()}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=(network if encoder is None else encoder).dtype,
            schedule=lambda run: _schedule(scheduler, run, network.device),
            condition=condition,
            guide=guide,
            predict=_predict(network, space.channels, scheduler.config["num_train_timesteps"]),
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def _predict(network: Any, channels: int, span: int) -> Predict:
    """The velocity towards noise; the network's time and velocity go the other way."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        time = 1 - t / span
        before = (time[:, None] < cond["watershed"])[..., None, None]
        velocity = network(
            x.to(network.dtype),
            time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(network.dtype),
            encoder_mask=cond["encoder_mask"],
            turns=torch.where(before, cond["early"], cond["late"]),
            sharpness=cond["sharpness"],
            perturbed=cond.get("perturbed"),
        )
        return Pred(-velocity[:, :channels].to(x.dtype))

    return predict


def _schedule(scheduler: Any, run: Run, device: Any) -> Grid:
    require_flow(scheduler)
    return schedule(scheduler, run, device)


def _space(components: Components) -> LatentSpace:
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size, shifted=False)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components).decode(x))


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    check_common(components, args)
    if not isinstance(args["scaling_watershed"], int | float):
        raise TypeError(f"scaling_watershed has to be a number, not {type(args['scaling_watershed']).__name__}.")
    negative, prompt = args["negative_prompt_embeds"], args["prompt"]
    if negative is not None and prompt is not None:
        raise ValueError("negative_prompt_embeds go with prompt_embeds, not with a prompt; pass negative_prompt.")


def check_common(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse texts, masks and sizes that can't work."""
    prompts.check(args)
    prompts.check_masks(args)
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.latent_channels
    if channels != latent:
        raise ValueError(f"The transformer takes {channels} channels, but the autoencoder's latents have {latent}.")
    square = factor(components["vae"]) * components["transformer"].config.patch_size
    for name in ("height", "width"):
        if args.get(name) is not None and args[name] % square:
            raise ValueError(f"{name}={args[name]} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="lumina",
    stem="Lumina",
    slots=SLOTS,
    settings={},
    tasks=rows(
        dict(clean_caption=True, max_sequence_length=256, scaling_watershed=1.0, proportional_attn=True) | CALLBACK
    ),
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
)
