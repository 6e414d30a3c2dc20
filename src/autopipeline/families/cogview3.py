"""CogView3-Plus (Zheng et al. 2024): a transformer in latents, led by T5, which is told sizes as SDXL is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopipeline import prompts
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "tokenizer": Slot(("T5Tokenizer",), optional=True),
    "text_encoder": Slot(("T5EncoderModel",), optional=True),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("CogView3PlusTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
SIZE = dict(height=None, width=None)
EMBEDS = dict(prompt_embeds=None, negative_prompt_embeds=None)
MICRO = dict(original_size=None, crops_coords_top_left=(0, 0))
LAST = dict(output_type="pil", return_dict=True)
TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
CALLBACK = dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))

TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, negative_prompt=None)
    | SIZE
    | dict(num_inference_steps=50, timesteps=None, guidance_scale=5.0, num_images_per_prompt=1)
    | dict(eta=0.0, generator=None, latents=None)
    | EMBEDS
    | MICRO
    | LAST
    | CALLBACK
    | dict(max_sequence_length=224),
    tensors=TENSORS,
)


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> Tensor:
    """T5's states (B, length, E); what pads a text counts as well."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    ids = prompts.long_tokens(tokenizer, texts, length)
    return prompts.finite(encoder(ids.to(encoder.device)), "text_encoder")


def text_rows(components: Components, run: Run, dtype: torch.dtype) -> Tensor:
    """Embeddings (branches * B, T, E) of all branches; no negative prompt at all is zeros."""
    positive = run["prompt_embeds"]
    if positive is None:
        texts = prompts.rows(run["prompt"], run.prompts, "prompt")
        positive = encode(components, texts, run["max_sequence_length"])
    branches = [positive]
    if "negative" in guide(run).branches:
        branches.insert(0, _negative(components, run, positive))
    if branches[0].shape[1] != positive.shape[1]:
        raise ValueError(
            f"The negative prompt has {branches[0].shape[1]} tokens and the prompt {positive.shape[1]}; pass "
            "embeddings of both, or the max_sequence_length that fits."
        )
    device, times = components["transformer"].device, run.batch // run.prompts
    return torch.cat([prompts.each(rows.to(device, dtype), times) for rows in branches])


def _negative(components: Components, run: Run, positive: Tensor) -> Tensor:
    given, text = run["negative_prompt_embeds"], run["negative_prompt"]
    if given is not None:
        return given
    if text is None:
        return torch.zeros_like(positive)
    return encode(components, prompts.rows(text, run.prompts, "negative_prompt"), positive.shape[1])


def sizes(network: Any, run: Run, height: int, width: int) -> Tensor:
    """What original size, crops and the size that is made say to the network, (1, E)."""
    size = (height, width)
    numbers = (*(run["original_size"] or size), *run["crops_coords_top_left"], *size)
    return network.sizes(torch.tensor([numbers], dtype=torch.float32))


def told(network: Any, run: Run, space: LatentSpace, x: Tensor, count: int) -> Cond:
    """Sizes and places, `count` rows of each."""
    height, width = x.shape[-2:]
    entries = dict(
        sizes=sizes(network, run, height * space.factor, width * space.factor), places=network.places(height, width)
    )
    return {name: entry.expand(count, *entry.shape[1:]) for name, entry in entries.items()}


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder, scheduler = components["transformer"], components["text_encoder"], components["scheduler"]
    space, dtype = space_of(components), (network if encoder is None else encoder).dtype

    def condition(run: Run, x: Tensor) -> Cond:
        text = text_rows(components, run, dtype)
        return {"encoder_hidden_states": text} | told(network, run, space, x, len(text))

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {name: rows.to(network.device, network.dtype) for name, rows in cond.items()}
        return Pred(network(x.to(network.dtype), t, **typed).to(x.dtype))

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=dtype,
            schedule=lambda run: schedule(scheduler, run, network.device),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def space_of(components: Components) -> LatentSpace:
    """The latents of the autoencoder, whose shift these families leave out."""
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size, shifted=False)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(space_of(components).decode(x))


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    check_size(components, args)


def check_size(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse sizes that are no whole patches, and a transformer that takes other latents."""
    square = space_of(components).multiple
    for side in ("height", "width"):
        if args[side] % square:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {square} pixels.")
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.latent_channels
    made = 2 * latent if "control_image" in args else latent
    if channels != made:
        what = "another picture" if "control_image" in args else "nothing"
        raise ValueError(f"The transformer takes {channels} channels, but latents with {what} beside them have {made}.")


FAMILY = Family(
    key="cogview3",
    stem="CogView3Plus",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE},
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
)
