"""PRX (Photoroom 2025): a transformer on a flow in latents, led by the encoder of T5Gemma."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipeline import captions, images, prompts
from autopipeline.config import Config
from autopipeline.families import bins
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import require_flow, schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]

SIDE = 512
"""Height and width in pixels, where the checkpoint says nothing."""
SLOTS = {
    "transformer": Slot(("PRXTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "text_encoder": Slot(("T5GemmaEncoder",), optional=True),
    "tokenizer": Slot(("GemmaTokenizer", "T5Tokenizer"), optional=True),
    "vae": Slot(("AutoencoderKL", "AutoencoderDC"), optional=True),
}
_WIDE: dict[int, bins.Bins] = {
    256: ((5, 11), (6, 10), (7, 9), (8, 8)),
    512: ((11, 22), (12, 21), (12, 20), (13, 19), (14, 18), (15, 17), (16, 16)),
    1024: (
        *((22, 45), (23, 44), (23, 43), (24, 42), (24, 41), (25, 40)),
        *((26, 39), (26, 38), (28, 36), (29, 35), (31, 33), (32, 32)),
    ),
}
_ODD = {(40, 25): (37, 27)}  # not the wide size turned round
_MORE: dict[int, bins.Bins] = {1024: ((34, 30),)}  # tall sizes without a wide one


def _table(wide: bins.Bins, more: bins.Bins) -> bins.Bins:
    """Wide sizes and tall ones by their proportions, from units of 32 pixels."""
    tall = [_ODD.get((high, across), (high, across)) for across, high in wide[:-1]]
    sizes = sorted([*wide, *tall, *more], key=lambda size: size[0] / size[1])
    return tuple((32 * high, 32 * across) for high, across in sizes)


SIZES = {side: _table(wide, _MORE.get(side, ())) for side, wide in _WIDE.items()}
"""Side of the square in pixels -> heights and widths of the training."""

_START, _SIZE = dict(prompt=None, negative_prompt=""), dict(height=None, width=None)
_STEPS = dict(num_inference_steps=28, timesteps=None, guidance_scale=4.0, num_images_per_prompt=1)
_END = (
    dict(generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None)
    | dict(prompt_attention_mask=None, negative_prompt_attention_mask=None)
    | dict(output_type="pil", return_dict=True)
)
_LAST = sd.CALLBACK | dict(tokenizer_max_length=None, skip_text_cleaning=False)
_TENSORS = ("latents", "prompt_embeds")
TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=_START | _SIZE | _STEPS | _END | dict(use_resolution_binning=True) | _LAST,
        tensors=_TENSORS,
    ),
    "image2image": TaskRow(
        task=Image2Image, params=_START | dict(image=None, strength=0.6) | _STEPS | _END | _LAST, tensors=_TENSORS
    ),
    "inpaint": TaskRow(
        task=Inpaint,
        params=_START
        | dict(image=None, mask_image=None)
        | _SIZE
        | dict(padding_mask_crop=None, strength=0.6)
        | _STEPS
        | _END
        | _LAST,
        tensors=_TENSORS,
    ),
}


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


def written(texts: list[str], plainly: bool) -> list[str]:
    """Prompts as the captions of the training were cleaned; `plainly`, only their characters are mended."""
    if importlib.util.find_spec("ftfy") is None:
        warnings.warn("Cleaning prompts needs ftfy (the extra `captions`), so they are not cleaned.", stacklevel=2)
        return [text.strip() if plainly else text.strip().lower() for text in texts]
    return [captions.mended(text).strip() if plainly else captions.cleaned(text, markup=False) for text in texts]


def encode(components: Components, texts: list[str], length: int | None, plainly: bool) -> tuple[Tensor, Tensor]:
    """T5Gemma's states (B, length, J), and whether they count (B, length)."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    ids = prompts.long_tokens(tokenizer, written(texts, plainly), length or tokenizer.model_max_length)
    mask = tokenizer.mask(ids).to(encoder.device)
    return prompts.finite(encoder(ids.to(encoder.device), mask), "text_encoder"), mask.bool()


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, J) of all branches and, where the tokens don't all count, masks."""
    guided = run.guidance_scale > 1
    names = ("negative_prompt", "prompt") if guided else ("prompt",)
    branches = [_branch(components, run, name) for name in names]
    device, times = components["transformer"].device, run.batch // run.prompts
    if len({hidden.shape[1] for hidden, _ in branches}) > 1:
        counts = " and ".join(str(hidden.shape[1]) for hidden, _ in branches)
        raise ValueError(f"The negative prompt and the prompt have {counts} tokens; pass embeddings that fit.")
    hidden = torch.cat([prompts.each(rows.to(device), times) for rows, _ in branches])
    masks = [mask for _, mask in branches if mask is not None]
    if not masks:
        return {"encoder_hidden_states": hidden}
    together = guided or run.random.apart  # as users of a seed know them, masks are out of step (a b a b) unguided
    dealt = [prompts.each(mask, times) if together else mask.repeat(times, 1) for mask in masks]
    return {"encoder_hidden_states": hidden, "attention_mask": torch.cat(dealt).to(device)}


def _branch(components: Components, run: Run, name: str) -> tuple[Tensor, Tensor | None]:
    """What the caller gives for a branch, or the encoded texts."""
    given = run[f"{name}_embeds"]
    if given is not None:
        mask = run[f"{name}_attention_mask"]
        return given.to(_dtype(components)), None if mask is None else mask.bool()
    texts = prompts.rows(run[name] or "", run.prompts, name)
    return encode(components, texts, run["tokenizer_max_length"], run["skip_text_cleaning"])


def _dtype(components: Components) -> torch.dtype:
    """The precision of texts and latents: that of the text encoder, or of the transformer without it."""
    encoder = components["text_encoder"]
    return (components["transformer"] if encoder is None else encoder).dtype


def _schedule(scheduler: Any, run: Run, device: Any) -> Grid:
    require_flow(scheduler)
    return schedule(scheduler, run, device)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, scheduler = components["transformer"], components["scheduler"]

    def condition(run: Run, x: Tensor) -> Cond:
        cond = text_rows(components, run)
        table = network.rotary(*x.shape[-2:]).to(network.device)
        return cond | {"rotary": table.expand(len(cond["encoder_hidden_states"]), -1, -1, -1)}

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        text = cond["encoder_hidden_states"].to(network.device, network.dtype)
        rest = {name: rows for name, rows in cond.items() if name != "encoder_hidden_states"}
        time = t.float() / scheduler.config["num_train_timesteps"]
        return Pred(network(x.to(network.dtype), time, text, **rest).to(x.dtype))

    return (
        Stage(
            name="transformer",
            network=network,
            space=_space(components, run),
            scheduler=scheduler,
            dtype=_dtype(components),
            schedule=lambda run: _schedule(scheduler, run, network.device),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def _space(components: Components, run: Run) -> LatentSpace:
    made = _made(run.settings, run.args) if run.get("use_resolution_binning") else None
    network, vae = components["transformer"], components["vae"]
    if vae is None:  # latents are made all the same
        vae = SimpleNamespace(config=Config(latent_channels=network.config.in_channels, block_out_channels=(0,) * 4))
    return LatentSpace(vae, patch=network.config.patch_size, made=made)


def _made(settings: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[int, int]:
    """The size that pictures are made at."""
    side = settings["default_sample_size"] or SIDE
    if side not in SIZES:
        raise ValueError(
            f"There is no list of sizes for networks of {side} x {side} pixels; pass use_resolution_binning=False."
        )
    return bins.closest(SIZES[side], args["height"], args["width"])


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode, and cut to the size that was asked for."""
    pictures = _space(components, run).decode(x)
    return Finished(bins.cut(pictures, run["height"], run["width"]) if run.get("use_resolution_binning") else pictures)


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the checkpoint says."""
    side = components["default_sample_size"] or SIDE
    return side, side


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Beside embeddings, the empty negative prompt that is the default is none."""
    if args["negative_prompt"] == "" and args["negative_prompt_embeds"] is not None:
        return args | dict(negative_prompt=None)
    return args


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    _check_masks(args)
    if components["vae"] is None and (args["output_type"] != "latent" or "image" in args):
        raise ValueError("This checkpoint has no vae; without one there are only latents: output_type='latent'.")
    square = factor(components["vae"]) * components["transformer"].config.patch_size
    if not args.get("use_resolution_binning"):
        for name in ("height", "width"):
            side = args.get(name)
            if side is not None and side % square:
                raise ValueError(f"{name}={side} is not a positive multiple of {square} pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


def _check_masks(args: Mapping[str, Any]) -> None:
    """A mask belongs to embeddings that are given; with guidance both have one, or neither."""
    given: dict[str, bool] = {}
    for name in ("prompt", "negative_prompt"):
        embeds, mask = args[f"{name}_embeds"], args[f"{name}_attention_mask"]
        if mask is None:
            given[name] = embeds is None  # a text has its own
            continue
        if embeds is None or not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
            raise ValueError(f"{name}_attention_mask has to be a torch.Tensor (B, tokens) beside {name}_embeds.")
        given[name] = True
    if args["guidance_scale"] > 1 and given["prompt"] != given["negative_prompt"]:
        raise ValueError("With guidance, pass the attention masks of both embeddings or of neither.")


FAMILY = Family(
    key="prx",
    stem="PRX",
    slots=SLOTS,
    settings={"default_sample_size": SIDE},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=default_size,
    check=check,
    read=read,
)
