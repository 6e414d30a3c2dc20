"""Ovis-Image (AIDC 2025): a transformer on packed latents, led by what Qwen 3 makes of an instruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux, flux_tasks
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.models.rotary import grid_places
from autopipeline.stage import Cond, Family, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
INSTRUCTION = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: "
)
"""What stands before the prompt; the network was trained with these very words."""
BEFORE = 28
"""Tokens of the chat's opening and the instruction, which the network does not see."""
LONGEST = 256
"""Tokens of text that the networks were trained with at most."""

SLOTS = {
    "vae": Slot(("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": Slot(("Qwen3Model",), optional=True),
    "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast"), optional=True),
    "transformer": Slot(("OvisImageTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_IMAGE, _MASK, _STRENGTH = dict(image=None), dict(mask_image=None), dict(strength=0.6)


def params(begin: Mapping[str, Any], crop: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of a task, from those of its inputs."""
    return (
        dict(prompt=None)
        | dict(begin)
        | dict(negative_prompt="", guidance_scale=5.0)
        | flux_tasks.SIZE
        | dict(crop or {})
        | dict(num_inference_steps=50, sigmas=None)
        | flux_tasks.DRAWS
        | dict(prompt_embeds=None, negative_prompt_embeds=None)
        | flux_tasks.LAST
        | dict(max_sequence_length=LONGEST)
    )


TEXT2IMAGE = TaskRow(task=Text2Image, params=params({}), tensors=flux_tasks.TENSORS)
IMAGE2IMAGE = replace(TEXT2IMAGE, task=SharedImage2Image, params=params(_IMAGE | _STRENGTH))
INPAINT = replace(TEXT2IMAGE, task=Blend, params=params(_IMAGE | _MASK | _STRENGTH, dict(padding_mask_crop=None)))


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def encode(components: Components, texts: list[str], length: int) -> Tensor:
    """Qwen's last states (B, length, J) of the prompt and what the chat puts after it, zeros for padding."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": INSTRUCTION + text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for text in texts
    ]
    ids, mask = prompts.foreign_tokens(tokenizer, chats, length + BEFORE, add_special_tokens=False)
    mask = mask.to(encoder.device)
    hidden = encoder(input_ids=ids.to(encoder.device), attention_mask=mask).last_hidden_state
    return prompts.finite(hidden * mask[..., None], "text_encoder")[:, BEFORE:]


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, J) of all branches, and how many tokens each has, if they differ."""
    signs = ["" if branch == "positive" else "negative_" for branch in guide(run).branches]
    return flux.joined([_texts(components, run, f"{sign}prompt") for sign in signs], run.batch // run.prompts)


def _texts(components: Components, run: Run, name: str) -> Tensor:
    given = run[f"{name}_embeds"]
    if given is not None:
        return given.to(_dtype(components))
    return encode(components, prompts.rows(run[name] or "", run.prompts, name), run["max_sequence_length"])


def _dtype(components: Components) -> torch.dtype:
    """The precision of texts and latents: that of the text encoder, or of the transformer without it."""
    encoder = components["text_encoder"]
    return (components["transformer"] if encoder is None else encoder).dtype


def places(counts: Tensor, tokens: int, own: Tensor) -> Tensor:
    """Places (R, tokens + L, 3): each text (R,) of so many tokens stands on a diagonal, after what pads it."""
    row = (torch.arange(tokens) - (tokens - counts[:, None])).clamp(min=0)
    text = torch.stack([torch.zeros_like(row), row, row], -1)
    return torch.cat([text, own.expand(len(counts), -1, -1)], 1)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    network, scheduler = components["transformer"], components["scheduler"]
    space = flux.packed(components, run)
    own = grid_places(space.height // 2, space.width // 2)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text_rows(components, run).items()}
        count, tokens = cond["encoder_hidden_states"].shape[:2]
        counts = cond.get("tokens", torch.full((count,), tokens)).cpu()
        return cond | {"rotary": network.rotary(places(counts, tokens, own)).to(network.device)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=_dtype(components),
            schedule=lambda run: flow_schedule(scheduler, run, network.device, len(own)),
            condition=condition,
            guide=guide,
            predict=flux.transformer_predict(network),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Beside embeddings, the empty negative prompt that is the default is none."""
    if args["negative_prompt"] == "" and args["negative_prompt_embeds"] is not None:
        return args | dict(negative_prompt=None)
    return args


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args, alike=False)
    if args["max_sequence_length"] > LONGEST:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} has to be {LONGEST} at most.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])
    flux.check_network(components, args)
    flux.check_size(components, args)


FAMILY = Family(
    key="ovis",
    stem="OvisImage",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=flux.finish,
    check=check,
    size=flux.size,
    read=read,
)
