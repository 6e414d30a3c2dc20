"""Z-Image-Omni (Tongyi 2025): Z-Image in sight of any number of pictures, which stand between the pieces of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux2, z_image
from autopipeline.families.rows import Own, row_by_row
from autopipeline.models.z_image_omni import Look, Sight, sight, within_sight
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    **{name: z_image.SLOTS[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")},
    "siglip": Slot(("Siglip2VisionModel",), optional=True),
    "siglip_processor": Slot(
        ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil"), optional=True
    ),
}
TASK = TaskRow(task=Text2Image, params=dict(image=None) | z_image.params({}), whole=("image",))
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
BEGIN, END = "<|vision_start|>", "<|vision_end|>"


def pieces(text: str, pictures: int) -> list[str]:
    """A chat cut where the pictures stand, the one that is made last; in one piece without any."""
    if not pictures:
        return [f"{USER}{text}{ASSISTANT}"]
    between = [f"{END}{BEGIN}"] * (pictures - 1)
    return [f"{USER}{BEGIN}", *between, f"{END}{text}{ASSISTANT}{BEGIN}", f"{END}<|im_end|>"]


def shown(picture: Any, area: int | None) -> Image.Image:
    """A picture of any kind; one of more than a million pixels is made smaller, or as large as `area`."""
    (one,) = images.opened(picture)
    if not isinstance(one, Image.Image):
        (one,) = images.to_output(images.pixels(one, multiple=1), "pil")
    one = images.plain(one, False).convert("RGB")
    flux2.scaled(one)  # refuses what is too small or too long
    if one.width * one.height <= flux2.LARGEST:
        return one
    scale = ((area or flux2.LARGEST) / (one.width * one.height)) ** 0.5
    return one.resize((int(one.width * scale), int(one.height * scale)), images.LANCZOS)


def looks(components: Components, pictures: Sequence[Image.Image]) -> list[Look]:
    """The pictures as latents, and as the vision encoder sees them."""
    network, encoder, processor = (components[name] for name in ("transformer", "siglip", "siglip_processor"))
    if not pictures:
        return []
    if encoder is None or processor is None:
        raise ValueError("This checkpoint has no siglip with a siglip_processor, which pictures need.")
    space, found = LatentSpace(components["vae"], patch=2), []
    for picture in pictures:
        latents = space.encode(_middle(picture, space.multiple), None)
        inputs = processor(images=[picture], return_tensors="pt")
        given = {name: rows.to(encoder.device) for name, rows in inputs.items()}
        given["pixel_values"] = given["pixel_values"].to(encoder.dtype)
        rows, columns = inputs["spatial_shapes"][0].tolist()
        states = encoder(**given).last_hidden_state[0, : rows * columns]
        seen = prompts.finite(states, "siglip").unflatten(0, (rows, columns))
        found.append(Look(*(each.to(network.device, network.dtype) for each in (latents, seen))))
    return found


def _middle(picture: Image.Image, step: int) -> Tensor:
    """The middle of a picture, (1, 3, H, W), in multiples of a patch."""
    tall, wide = picture.height // step * step, picture.width // step * step
    top, left = (picture.height - tall) // 2, (picture.width - wide) // 2
    return images.pixels(picture, multiple=1)[..., top : top + tall, left : left + wide]


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """Z-Image's own stage, each row by itself in sight of the pictures."""
    (stage,) = z_image.stages(components, run)
    network, own = components["transformer"], Own()

    def condition(run: Run, x: Tensor) -> Cond:
        texts = _texts(components, run, "prompt")
        if run.guidance_scale > 0:
            texts = _texts(components, run, "negative_prompt") + texts
        seen, size = looks(components, run["pictures"]), (x.shape[-2], x.shape[-1])
        rows = [
            sight(network, [piece.to(network.device, network.dtype) for piece in text], seen, size) for text in texts
        ]
        own.parts = [row for row in rows for _ in range(run.batch // run.prompts)]
        return {"row": torch.arange(len(own.parts))}

    def velocity(x: Tensor, t: Tensor, seen: Sight, perturbed: Tensor | None) -> Tensor:
        return -within_sight(network, x, (1000 - t) / 1000, seen, perturbed)

    predict = row_by_row(network, own, velocity)
    return (replace(stage, condition=condition, predict=predict, public={}, beside=(own,)),)


def _texts(components: Components, run: Run, name: str) -> list[list[Tensor]]:
    """The pieces (tokens, E) of each prompt."""
    count, lengths = _count(run["pictures"]), run[f"{name}_pieces"]
    if run[f"{name}_embeds"] is not None:
        rows, mask = run[f"{name}_embeds"], run[f"{name}_attention_mask"]
        whole = list(rows) if mask is None else [row[real] for row, real in zip(rows, mask, strict=True)]
        lengths = lengths or [[len(row)] for row in whole]
        return [list(row.split(each)) for row, each in zip(whole, lengths, strict=True)]
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    chats = [
        piece
        for text in prompts.rows(run[name] or "", run.prompts, name)
        for piece in pieces(text, len(run["pictures"]))
    ]
    found = z_image.states(encoder, tokenizer, chats, run["max_sequence_length"])
    return [found[k : k + count] for k in range(0, len(found), count)]


def _count(pictures: Sequence[Any]) -> int:
    """Pieces of a chat."""
    return len(pictures) + 2 if pictures else 1


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Pictures as they are seen; embeddings in pieces as rows, with how long each piece is."""
    given = args["image"]
    many: list[Any] = [] if given is None else flux2.given(given)
    if given is not None and not many:
        raise ValueError("The list of pictures is empty.")
    area = None if args["height"] is None or args["width"] is None else args["height"] * args["width"]
    pictures = [shown(picture, area) for picture in many]
    found = dict(args)
    for name in ("prompt", "negative_prompt"):
        embeds, lengths = _pieces(args[f"{name}_embeds"], _count(many), name)
        found |= {f"{name}_embeds": embeds, f"{name}_pieces": lengths}
    found = z_image.read(components, found) | dict(pictures=pictures)
    if not pictures:
        return found
    step, last = 2 * factor(components["vae"]), pictures[-1]
    sides = dict(height=last.height // step * step, width=last.width // step * step)
    return found | {side: value for side, value in sides.items() if args[side] is None}


def _pieces(embeds: Any, count: int, name: str) -> tuple[Any, list[list[int]] | None]:
    """Embeddings of each prompt as one, and how long its pieces are: so many."""
    nested = (
        isinstance(embeds, list | tuple) and bool(embeds) and all(isinstance(each, list | tuple) for each in embeds)
    )
    if nested and {len(each) for each in embeds} == {count}:
        return [torch.cat(list(each)) for each in embeds], [[len(piece) for piece in each] for each in embeds]
    if embeds is None or (count == 1 and not nested):
        return embeds, None
    raise ValueError(f"{name}_embeds have to come in {count} pieces for each prompt: before and after each picture.")


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    z_image.check(components, args)
    if args["pictures"] and components["transformer"].config.siglip_feat_dim is None:
        raise ValueError("This transformer looks at no pictures (it has no siglip_feat_dim).")


FAMILY = replace(
    z_image.FAMILY,
    key="z-image-omni",
    stem="ZImageOmni",
    slots=SLOTS,
    tasks={"text2image": TASK},
    stages=stages,
    check=check,
    read=read,
    variants={},
    addons={},
)
