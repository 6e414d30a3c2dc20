"""GLM-Image (Z.ai 2026): a language model says a picture in tokens, a transformer on a flow in latents draws it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import cogview4, flux
from autopipeline.families.cogview3 import guide
from autopipeline.families.glm_tokens import SQUARE, Told, told
from autopipeline.families.rows import Own
from autopipeline.models.cogview import Memory
from autopipeline.spaces import LatentSpace
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "tokenizer": Slot(("ByT5Tokenizer",)),
    "processor": Slot(("GlmImageProcessor",)),
    "text_encoder": Slot(("T5EncoderModel",)),
    "vision_language_encoder": Slot(("GlmImageForConditionalGeneration",)),
    "vae": Slot(("AutoencoderKL",)),
    "transformer": Slot(("GlmImageTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
TASK = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, image=None, height=None, width=None, num_inference_steps=50, timesteps=None, sigmas=None)
    | dict(guidance_scale=1.5, num_images_per_prompt=1, generator=None, latents=None)
    | dict(prompt_embeds=None, negative_prompt_embeds=None)
    | dict(prior_token_ids=None, prior_token_image_ids=None, source_image_grid_thw=None)
    | dict(crops_coords_top_left=(0, 0), output_type="pil", return_dict=True, attention_kwargs=None)
    | dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",), max_sequence_length=2048),
    tensors=("latents", "prompt_embeds", "negative_prompt_embeds"),
    whole=("image",),
)
GLYPHS = (r"'([^']*)'", "\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', "\u300c([^\u300c\u300d]*)\u300d")
"""Words to be written in the picture stand in quotation marks of these kinds."""


class GlmSpace(LatentSpace):
    """Latents by their means and deviations alone, whatever scale the autoencoder's configuration names."""

    __slots__ = ()

    @property
    def _scale(self) -> float | None:
        return None

    @property
    def _shift(self) -> float:
        return 0.0


# --- texts -----------------------------------------------------------------------------------------------------


def glyphs(text: str) -> list[str]:
    """The words that are to be written in a picture; one that is empty where there are none."""
    return [word for kind in GLYPHS for word in re.findall(kind, text)] or [""]


def encode(components: Components, text: str, length: int) -> Tensor:
    """ByT5's states (1, T, E) of the words to be written, letter by letter, one word after the other."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    rows: list[list[int]] = tokenizer(glyphs(text), max_length=length, truncation=True).input_ids
    pad = int(tokenizer.pad_token_id)
    rows = [[pad] * ((len(rows) + 1) % 2) + row for row in rows]  # of one word, as users of a seed know it
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    states = encoder(ids.to(encoder.device), mask.to(encoder.device))
    return prompts.finite(states[mask.bool().to(states.device)][None], "text_encoder")


def text_rows(components: Components, run: Run) -> Cond:
    """States (branches * B, T, E) of all branches, and how many tokens each has, if they differ."""
    named = ["negative_prompt" if branch == "negative" else "prompt" for branch in guide(run).branches]
    texts = [rows for name in named for rows in _texts(components, run, name)]
    return flux.joined(texts, run.batch // run.prompts)


def _texts(components: Components, run: Run, name: str) -> list[Tensor]:
    """One tensor for all prompts, padded with zeros as users of a seed know them, or one for each."""
    given = run[f"{name}_embeds"]
    if given is not None:
        return [given]
    texts = prompts.rows(run["prompt"], run.prompts, "prompt") if name == "prompt" else [""] * run.prompts
    rows = [encode(components, text, run["max_sequence_length"]) for text in texts]
    return rows if run.random.apart else [flux.joined(rows, 1)["encoder_hidden_states"]]


# --- tokens and pictures ---------------------------------------------------------------------------------------


def pictures_of(given: Any) -> list[list[Any]]:
    """The pictures of each prompt: a picture or a list of them for one prompt, a list of lists for several."""
    if given is None:
        return []
    many: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    nested = bool(many) and all(isinstance(each, list | tuple) for each in many)
    found = [images.opened(list(each)) for each in many] if nested else [images.opened(many)]
    if len({len(each) for each in found}) > 1:
        raise ValueError("image has to have as many pictures for every prompt.")
    return found


def _told(components: Components, run: Run, pictures: list[list[Any]]) -> Told:
    """The tokens that the caller gives, or what the language model says."""
    ids, sources, grids = (run[name] for name in ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw"))
    if ids is None:
        texts = prompts.rows(run["prompt"], run.prompts, "prompt")
        return told(components, run, texts, pictures)
    if sources is None:
        return Told(ids, [])
    parts = [each.split(grid.prod(-1).tolist()) for each, grid in zip(sources, grids, strict=True)]
    return Told(ids, [[part[None] for part in each] for each in parts])


def _remembered(components: Components, run: Run, pictures: list[list[Any]], ids: list[list[Tensor]]) -> list[Memory]:
    """What the transformer remembers of the pictures that it is shown with each prompt, block by block."""
    network, space = components["transformer"], _space(components)
    found: list[list[Memory]] = []
    for mine, its in zip(pictures, ids, strict=True):
        memories = [Memory() for _ in range(network.config.num_layers)]
        for picture, tokens in zip(mine, its, strict=True):
            pixels = images.pixels(picture, multiple=space.multiple)
            x = space.encode(pixels, None).to(network.device, network.dtype)
            network(
                x,
                torch.zeros(1, device=x.device),
                encoder_hidden_states=x.new_zeros(1, 0, network.proj_out.in_features),
                prior=network.prior(tokens, dropped=False),
                sizes=network.sizes(torch.tensor([[0.0, 0.0, *pixels.shape[-2:]]])),
                places=network.places(*x.shape[-2:]),
                memories=memories,
            )
        found.append(memories)
    if len({sum(each.shape[2] for each in memories[0].keys) for memories in found}) > 1:
        raise ValueError("The pictures of several prompts have to be of one size; call with one prompt at a time.")
    times = run.batch // run.prompts
    return [Memory.of(each, times) for each in zip(*found, strict=True)]


# --- the call --------------------------------------------------------------------------------------------------


def _predict(network: Any, own: Own | None) -> Predict:
    """The velocity, in one pass for each length of text; of the prompt's rows alone in sight of the pictures."""

    def predict(x: Tensor, t: Tensor, cond: Cond, memories: Any = None) -> Pred:
        exact = {"places": cond["places"]}
        typed = {name: rows.to(network.device, network.dtype) for name, rows in cond.items() if name not in exact}
        typed |= dict(encoder_hidden_states=network.glyph_projector(typed["encoder_hidden_states"]))
        return Pred(network(x.to(network.dtype), t - 1, **typed, **exact, memories=memories).to(x.dtype))

    def within_sight(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        cond = dict(cond)
        sees, mean = cond.pop("sees"), torch.empty_like(x)
        for able in (False, True):
            rows = sees == able
            part = {name: each[rows.to(each.device)] for name, each in cond.items()}
            if rows.any():
                looking = partial(predict, memories=own.parts if able and own else None)
                mean[rows] = flux.by_length(looking)(x[rows], t[rows], part).mean
        return Pred(mean)

    return flux.by_length(predict) if own is None else within_sight


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network = components["transformer"]
    pictures = run["pictures"]
    own = Own() if pictures else None

    def condition(run: Run, x: Tensor) -> Cond:
        cond, known = text_rows(components, run), _told(components, run, pictures)
        height, width = x.shape[-2:]
        count = height * width // network.config.patch_size**2
        if known.ids.shape[1:] != (count,):
            given, wanted = tuple(known.ids.shape), (run.prompts, count)
            raise ValueError(f"prior_token_ids have the shape {given}; this call needs {wanted}.")
        if own is not None:
            own.parts = _remembered(components, run, pictures, known.pictures)
        branches = guide(run).branches
        ids = prompts.each(known.ids, run.batch // len(known.ids))
        numbers = torch.tensor([[*run["crops_coords_top_left"], run["height"], run["width"]]], dtype=torch.float32)
        rows = len(branches) * run.batch
        cond |= dict(
            prior=torch.cat([network.prior(ids, dropped=branch == "negative") for branch in branches]),
            sizes=network.sizes(numbers).expand(rows, -1),
            places=network.places(height, width).expand(rows, -1, -1, -1),
        )
        sees = [torch.full((run.batch,), branch != "negative", device=x.device) for branch in branches]
        return cond | (dict(sees=torch.cat(sees)) if own is not None else {})

    return (
        Stage(
            name="transformer",
            network=network,
            space=_space(components),
            scheduler=components["scheduler"],
            dtype=components["text_encoder"].dtype,
            schedule=lambda run: cogview4.schedule(components, run, to_one=False),
            condition=condition,
            guide=guide,
            predict=_predict(network, own),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
            beside=() if own is None else (own,),
        ),
    )


def _space(components: Components) -> GlmSpace:
    return GlmSpace(components["vae"], patch=components["transformer"].config.patch_size)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(_space(components).decode(x))


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, where a call names none."""
    return 1024, 1024


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments; a size that is not given is that of the first picture."""
    pictures = pictures_of(args["image"])
    args = args | dict(pictures=pictures)
    if not pictures:
        return args
    (width, height), square = images.sizes(pictures[0][0])[0] or (0, 0), _square(components)
    found = dict(height=height // square * square, width=width // square * square)
    return args | {side: value for side, value in found.items() if args[side] is None}


def _square(components: Components) -> int:
    """Pixels that sides are multiples of: whole tokens of the language model."""
    return max(SQUARE, 2 * _space(components).multiple)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed; texts may differ in length."""
    prompts.check(args, alike=False)
    shown, count = len(args["pictures"]), prompts.count(args)
    if shown not in (0, count):
        raise ValueError(f"image has pictures for {shown} prompts, not for {count}; give a list for each.")
    square = _square(components)
    for side in ("height", "width"):
        if args[side] % square:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {square} pixels.")
    ids, sources, grids = (args[name] for name in ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw"))
    if (sources is None) != (grids is None):
        raise ValueError("prior_token_image_ids and source_image_grid_thw need each other.")
    if sources is not None and (ids is None or args["image"] is None):
        raise ValueError("prior_token_image_ids have an effect only beside prior_token_ids and image.")
    if ids is not None and args["image"] is not None and sources is None:
        raise ValueError("With prior_token_ids, pictures need prior_token_image_ids and source_image_grid_thw.")
    if args["prompt"] is None and ids is None:
        raise ValueError("prompt_embeds are of the words to be written alone; pass prior_token_ids too, or a prompt.")


FAMILY = Family(
    key="glm_image",
    stem="GlmImage",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TASK},
    stages=stages,
    finish=finish,
    size=size,
    check=check,
    read=read,
)
