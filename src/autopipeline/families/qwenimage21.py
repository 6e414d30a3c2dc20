"""Qwen-Image 2.1 (Qwen team 2026): pictures with transparency, from prompts and pictures that Qwen 3-VL reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from autopipeline import images, prompts
from autopipeline.families import flux, qwenimage
from autopipeline.families import qwenimage_edit as edit
from autopipeline.families.qwenimage_layered import clear_pixels, transparent
from autopipeline.families.rows import Own, row_by_row
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.models.qwenimage21 import Before
from autopipeline.spaces import LatentSpace, Packed, factor
from autopipeline.stage import Cond, Family, Finished, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "scheduler": Slot(("Scheduler",)),
    "vae": Slot(("AutoencoderKLQwenImage21",)),
    "text_encoder": Slot(("Qwen3VLForConditionalGeneration",), optional=True),
    "processor": Slot(("Qwen3VLProcessor",), optional=True),
    "transformer": Slot(("QwenImage21Transformer2DModel",)),
}
TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, image=None, negative_prompt=None, true_cfg_scale=1.0)
    | dict(height=None, width=None, num_inference_steps=40, sigmas=None)
    | qwenimage.DRAWS
    | qwenimage.EMBEDS
    | {name: default for name, default in qwenimage.LAST.items() if name != "max_sequence_length"}
    | dict(output_resolution=1024, use_kv_cache=True),
    whole=("image",),
)
SYSTEM = "Comprehend and analyze the provided prompt."


class Said(NamedTuple):
    """What the text encoder makes of a prompt."""

    states: Tensor  # (T, E)
    slots: Tensor  # (T,), true where it looks at a picture


def guide(run: Run) -> Guidance:
    """Guidance where there is a negative prompt and a scale above 1."""
    return ClassifierFree(run["true_cfg_scale"]) if qwenimage.guided(run) else Unguided()


def encode(components: Components, text: str, pictures: Sequence[Image.Image]) -> Said:
    """The last states of a chat before the norm, without the system's part."""
    encoder, processor = components["text_encoder"], components["processor"]
    if encoder is None or processor is None:
        raise ValueError("This checkpoint has no text_encoder with a processor; pass prompt_embeds.")
    looks = " ".join(f"<image{k + 1}>{edit.LOOK}" for k in range(len(pictures)))
    system = processor.apply_chat_template(
        [dict(role="system", content=[dict(type="text", text=SYSTEM)])], tokenize=False
    )
    begin = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    chat = f"{begin}{looks}{text or ' '}<|im_end|>\n<|im_start|>assistant\n"
    opaque = [images.plain(picture, False) for picture in pictures]
    inputs = processor([chat], opaque) if pictures else _plain(processor, chat)
    slots = inputs["input_ids"][0] == encoder.config.image_token_id
    body: Any = getattr(encoder.model, "language_model", encoder.model)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])

    with qwenimage.LOOKING:
        hook = body.norm.register_forward_pre_hook(keep)
        try:
            encoder(**qwenimage.marked(encoder, inputs), use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
    skip = len(processor.tokenizer(system).input_ids)
    return Said(prompts.finite(found[0][0], "text_encoder")[skip:], slots[skip:])


def _plain(processor: Any, chat: str) -> dict[str, Tensor]:
    ids = torch.tensor([processor.tokenizer(chat).input_ids])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def _texts(components: Components, run: Run, name: str, pictures: Sequence[Image.Image]) -> list[Said]:
    """What the caller gives for a branch, or the encoded texts."""
    given, mask = run[f"{name}_embeds"], run[f"{name}_embeds_mask"]
    if given is None:
        return [encode(components, text, pictures) for text in prompts.rows(run[name], run.prompts, name)]
    rows = list(given) if mask is None else [row[real.bool()] for row, real in zip(given, mask, strict=True)]
    return [Said(row, torch.zeros(len(row), dtype=torch.bool)) for row in rows]


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in latents, each row by itself after what it has read."""
    network, scheduler, own = components["transformer"], components["scheduler"], Own()
    space, pictures = _space(components, run), run["pictures"]
    grid, dtype = (space.height, space.width), qwenimage.dtype_of(components)

    def condition(run: Run, x: Tensor) -> Cond:
        encoded = [space.encode(clear_pixels(one), None) for one in pictures]
        latents = [one.to(network.device, network.dtype) for one in encoded]
        step = space.latents.factor
        grids = [(one.height // step, one.width // step) for one in pictures]
        names = ["negative_prompt", "prompt"] if qwenimage.guided(run) else ["prompt"]
        own.parts, times = [], run.batch // run.prompts
        for name in names:
            said = _texts(components, run, name, pictures)
            longest = max(len(each.states) for each in said)
            for each in said:
                length = len(each.states) if run.random.apart else longest  # as users of a seed know it
                text = each.states[None].to(network.device, network.dtype)
                made = network.before(text, each.slots, latents, grids, grid, length, kept=run["use_kv_cache"])
                own.parts += [made] * times
        return {"row": torch.arange(len(own.parts))}

    def velocity(x: Tensor, t: Tensor, before: Before, perturbed: Tensor | None) -> Tensor:
        return network(x, t.to(dtype) / 1000, before, perturbed)

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=dtype,
            schedule=lambda run: flow_schedule(scheduler, run, network.device, grid[0] * grid[1]),
            condition=condition,
            guide=guide,
            predict=row_by_row(network, own, velocity),
            beside=(own,),
        ),
    )


def _space(components: Components, run: Run) -> Packed:
    """Latents as tokens, an even number of rows and columns."""
    step = 2 * factor(components["vae"])
    sides = (2 * (run[side] // step) for side in ("height", "width"))
    return Packed(LatentSpace(components["vae"], patch=2), *sides, patch=1)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components, run).decode(x))


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, where a call names none."""
    return 1024, 1024


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Pictures at the size that they are seen at; the last one's is made, unless the call says another."""
    side, given = args["output_resolution"], args["image"]
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise ValueError(f"output_resolution={side!r} has to be a number of pixels.")
    many: list[Any] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if given is not None and not many:
        raise ValueError("The list of pictures is empty.")
    seen = [edit.scaled(size, side**2) for size in (edit.sizes(many) if many else [])]
    pictures = [transparent(picture, *each) for picture, each in zip(many, seen, strict=True)]
    height, width = seen[-1] if seen else (side, side)
    own = args["sigmas"] if args["sigmas"] is not None else components.get("sample_sigmas")
    sizes = dict(height=args["height"] or height, width=args["width"] or width)
    return args | sizes | dict(pictures=pictures, sigmas=own, guidance_scale=1.0)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args, alike=False)
    qwenimage.check_embeds_masks(args)
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.z_dim
    if channels != latent:
        raise ValueError(f"The transformer takes {channels} channels, but the vae's latents have {latent}.")
    if args["pictures"] and (args["prompt_embeds"] is not None or args["negative_prompt_embeds"] is not None):
        raise ValueError("Embeddings don't say where they look at pictures; pass texts beside image.")
    flux.check_size(components, args)
    qwenimage.warn_of_guidance(args, TASK.params["true_cfg_scale"])


FAMILY = Family(
    key="qwenimage21",
    stem="QwenImage21",
    slots=SLOTS,
    settings={"sample_sigmas": None},
    tasks={"text2image": TASK},
    stages=stages,
    finish=finish,
    size=size,
    check=check,
    read=read,
)
