"""Sana (Xie et al. 2024): a linear transformer on a flow in few, deep latents, led by a language model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipeline import captions, images, prompts
from autopipeline.addons import pag
from autopipeline.families import bins
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import require_flow, schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]

INSTRUCTION = [
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
    "image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional "
    "commentary or evaluations:",
    "User Prompt: ",
]
"""What the language model is told before the prompt (section 3.1); the network was trained with these very words."""

SLOTS = {
    "tokenizer": Slot(("GemmaTokenizer",), optional=True),
    "text_encoder": Slot(("Gemma2Model",), optional=True),
    "vae": Slot(("AutoencoderDC",)),
    "transformer": Slot(("SanaTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_PROMPTS = dict(prompt=None, negative_prompt="")
_STEPS = dict(num_inference_steps=20, timesteps=None, sigmas=None, guidance_scale=4.5, num_images_per_prompt=1)
_REST = (
    dict(eta=0.0, generator=None, latents=None)
    | dict(prompt_embeds=None, prompt_attention_mask=None)
    | dict(negative_prompt_embeds=None, negative_prompt_attention_mask=None)
    | dict(output_type="pil", return_dict=True, clean_caption=False)
)
_END = dict(attention_kwargs=None) | sd.CALLBACK | dict(max_sequence_length=300, complex_human_instruction=INSTRUCTION)
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=_PROMPTS | _STEPS | dict(height=1024, width=1024) | _REST | dict(use_resolution_binning=True) | _END,
    tensors=_TENSORS,
)
TASKS = {
    "text2image": TEXT2IMAGE,
    "image2image": TaskRow(
        task=Image2Image, params=_PROMPTS | dict(image=None, strength=0.6) | _STEPS | _REST | _END, tensors=_TENSORS
    ),
    "inpaint": TaskRow(
        task=Inpaint,
        params=_PROMPTS
        | dict(image=None, mask_image=None, height=None, width=None, padding_mask_crop=None, strength=0.6)
        | _STEPS
        | _REST
        | _END,
        tensors=(*_TENSORS, "mask", "masked_image_latents"),
    ),
}
"""Pictures to begin with decide themselves what size is made: the list of sizes is for text-to-image."""


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int, instruction: str) -> tuple[Tensor, Tensor]:
    """Gemma's states (B, length, E), and 1 for the tokens that count (B, length).

    Of the instruction only the first token, which all texts share, is kept; what follows it has seen the rest.
    """
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError(
            "This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds and prompt_attention_mask."
        )
    room = length if not instruction else tokenizer.count(instruction) + length - 2
    ids = prompts.long_tokens(tokenizer, [instruction + text for text in texts], room)
    mask = tokenizer.mask(ids).to(encoder.device)
    hidden = prompts.finite(encoder(ids.to(encoder.device), mask), "text_encoder")
    kept = [0, *range(room - length + 1, room)]
    return hidden[:, kept], mask[:, kept]


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, E) and masks (branches * B, T) of all branches."""
    told = "\n".join(run["complex_human_instruction"] or ())
    branches = [_branch(components, run, "prompt", run["max_sequence_length"], told)]
    length = branches[0][0].shape[1]
    if "negative" in guide(run).branches:
        branches.insert(0, _branch(components, run, "negative_prompt", length, ""))
    negative = branches[0][0].shape[1]
    if negative != length:
        raise ValueError(
            f"The negative prompt has {negative} tokens and the prompt {length}; pass embeddings of both, or the "
            "max_sequence_length that fits."
        )
    device, times = components["transformer"].device, run.batch // run.prompts
    embeds = [prompts.each(hidden.to(device), times) for hidden, _ in branches]
    masks = [dealt(mask.to(device), times, run) for _, mask in branches]
    return {"encoder_hidden_states": torch.cat(embeds), "encoder_attention_mask": torch.cat(masks)}


def dealt(mask: Tensor, times: int, run: Run) -> Tensor:
    """Masks for several pictures a prompt: as users of a seed know them, out of step with the embeddings (a b a b)."""
    return prompts.each(mask, times) if run.random.apart else mask.repeat(times, 1)


def _branch(components: Components, run: Run, name: str, length: int, instruction: str) -> tuple[Tensor, Tensor]:
    """What the caller gives for a branch, or the encoded texts."""
    given = run[f"{name}_embeds"]
    if given is not None:
        return given, run[f"{name}_attention_mask"]
    texts = captions.prepared(prompts.rows(run[name] or "", run.prompts, name), run["clean_caption"])
    return encode(components, texts, length, instruction)


def _predict(network: Any, channels: int, scale: float) -> Predict:
    """The velocity; what some networks say of its variance is left out."""
    kept = channels if network.config.out_channels == 2 * channels else None

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {
            name: rows.to(network.device, network.dtype if rows.is_floating_point() else None)
            for name, rows in cond.items()
        }
        return Pred(network(x.to(network.dtype), t * scale, **typed)[:, :kept].to(x.dtype))

    return predict


def _schedule(scheduler: Any, run: Run, device: Any) -> Grid:
    require_flow(scheduler)
    return schedule(scheduler, run, device)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder.

    As in the reference implementation, the class with PAG leaves out the network's `timestep_scale`.
    """
    network, scheduler = components["transformer"], components["scheduler"]
    scale = 1.0 if "pag_scale" in run.args else network.config.timestep_scale
    space = _space(components, run)
    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=torch.float32,
            schedule=lambda run: _schedule(scheduler, run, network.device),
            condition=lambda run, x: text_rows(components, run),
            guide=guide,
            predict=_predict(network, space.channels, scale),
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def _space(components: Components, run: Run) -> LatentSpace:
    made = _made(components, run.args) if run.get("use_resolution_binning") else None
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size, made=made)


def _made(components: Components, args: Mapping[str, Any]) -> tuple[int, int]:
    """The size that pictures are made at: networks of 32 latents a side are those for 1024 pixels."""
    return bins.nearest(32 * components["transformer"].config.sample_size, args["height"], args["width"])


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode, and cut to the size that was asked for."""
    pictures = _space(components, run).decode(x)
    return Finished(bins.cut(pictures, run["height"], run["width"]) if run.get("use_resolution_binning") else pictures)


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, whatever the network was made for."""
    return 1024, 1024


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Beside embeddings, the empty negative prompt that is the default is none."""
    if args["negative_prompt"] == "" and args["negative_prompt_embeds"] is not None:
        return args | dict(negative_prompt=None)
    return args


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    prompts.check_masks(args)
    binned = args.get("use_resolution_binning")
    sides = _made(components, args) if binned else (args.get("height"), args.get("width"))
    square = LatentSpace(components["vae"], patch=components["transformer"].config.patch_size).multiple
    for name, side in zip(("height", "width"), sides, strict=True):
        if side is not None and side % square:
            raise ValueError(f"{name}={side} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])
    told = args["complex_human_instruction"]
    if told and (not isinstance(told, list | tuple) or not all(isinstance(line, str) for line in told)):
        raise TypeError(f"complex_human_instruction has to be a list of strings, not {type(told).__name__}.")


FAMILY = Family(
    key="sana",
    stem="Sana",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
    read=read,
    variants={frozenset({"PAG"}): {name: pag.row(row, "attention_kwargs") for name, row in TASKS.items()}},
    addons={"PAG": partial(pag.attach, layers="transformer_blocks.0")},
)
