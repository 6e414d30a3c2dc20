"""Stable Diffusion 1 and 2 (Rombach et al. 2022): a U-Net in latents, one CLIP text encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.addons import controlnet, pag
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    "vae": Slot(("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": Slot(("CLIPTextModel",)),
    "tokenizer": Slot(("CLIPTokenizer",)),
    "unet": Slot(("UNet2DConditionModel",)),
    "scheduler": Slot(("Scheduler",)),
    "safety_checker": Slot(("StableDiffusionSafetyChecker",), optional=True),
    "feature_extractor": Slot(("CLIPImageProcessor",), optional=True),
    "image_encoder": Slot(("CLIPVisionModelWithProjection",), optional=True),
}
LAST = dict(output_type="pil", return_dict=True, cross_attention_kwargs=None)
CALLBACK = dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))
_MIDDLE = dict(
    num_inference_steps=50,
    timesteps=None,
    sigmas=None,
    guidance_scale=7.5,
    negative_prompt=None,
    num_images_per_prompt=1,
    eta=0.0,
    generator=None,
)
_EMBEDS = dict(prompt_embeds=None, negative_prompt_embeds=None)
_SIZE = dict(height=None, width=None)
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")

TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=dict(prompt=None)
    | _SIZE
    | _MIDDLE
    | dict(latents=None)
    | _EMBEDS
    | LAST
    | dict(guidance_rescale=0.0, clip_skip=None)
    | CALLBACK,
    tensors=_TENSORS,
)
IMAGE2IMAGE = TaskRow(
    task=Image2Image,
    params=dict(prompt=None, image=None, strength=0.8) | _MIDDLE | _EMBEDS | LAST | dict(clip_skip=None) | CALLBACK,
    tensors=_TENSORS,
)
INPAINT = TaskRow(
    task=Inpaint,
    params=dict(prompt=None, image=None, mask_image=None, masked_image_latents=None)
    | _SIZE
    | dict(padding_mask_crop=None, strength=1.0)
    | _MIDDLE
    | dict(latents=None)
    | _EMBEDS
    | LAST
    | dict(clip_skip=None)
    | CALLBACK,
    tensors=(*_TENSORS, "mask", "masked_image_latents"),
)

_BRIEF = {name: default for name, default in _MIDDLE.items() if name not in ("timesteps", "sigmas")}
_REST = dict(clip_skip=None) | CALLBACK


def _controlled(*inputs: str, strength: float, scale: float, crop: bool = False) -> dict[str, Any]:
    """Parameters of the ControlNet tasks that begin with a picture."""
    begin = dict.fromkeys(inputs) | _SIZE | (dict(padding_mask_crop=None) if crop else {}) | dict(strength=strength)
    return dict(prompt=None) | begin | _BRIEF | dict(latents=None) | _EMBEDS | LAST | controlnet.params(scale) | _REST


CONTROLNET = {
    "text2image": TaskRow(
        task=Text2Image,
        params=dict(prompt=None, image=None)
        | _SIZE
        | _MIDDLE
        | dict(latents=None)
        | _EMBEDS
        | LAST
        | controlnet.params(1.0)
        | _REST,
        tensors=(*_TENSORS, "image"),
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=_controlled("image", "control_image", strength=0.8, scale=0.8),
        tensors=(*_TENSORS, "control_image"),
        trigger="control_image",
    ),
    "inpaint": TaskRow(
        task=Inpaint,
        params=_controlled("image", "mask_image", "control_image", strength=1.0, scale=0.5, crop=True),
        tensors=(*_TENSORS, "control_image", "mask", "masked_image_latents"),
    ),
}
_PAG_INPAINT = {name: default for name, default in INPAINT.params.items() if name not in _REST}
_PAG_CHANGES = dict(strength=0.9999, guidance_rescale=0.0)
PAG = {
    "text2image": pag.row(TEXT2IMAGE),
    "image2image": pag.row(IMAGE2IMAGE),
    "inpaint": pag.row(replace(INPAINT, params=_PAG_INPAINT | _PAG_CHANGES | _REST)),
}
CONTROLNET_PAG = {
    "text2image": pag.row(CONTROLNET["text2image"]),
    "image2image": pag.row(CONTROLNET["image2image"]),
    "inpaint": pag.row(CONTROLNET["inpaint"], "guess_mode"),
}


def guided(components: Components, run: Run) -> bool:
    """Whether there is a negative branch; networks that take the scale as an input do without."""
    return run.guidance_scale > 1 and components["unet"].config.time_cond_proj_dim is None


def guide(components: Components, run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    if guided(components, run):
        return ClassifierFree(run.guidance_scale, run.get("guidance_rescale", 0.0))
    return Unguided()


def encode(components: Components, texts: list[str], clip_skip: int | None, length: int | None = None) -> Tensor:
    """Hidden states (B, L, D) of the text encoder, after its final norm; `clip_skip` leaves out the last layers."""
    encoder = components["text_encoder"]
    out = encoder(prompts.tokens(components["tokenizer"], texts, length).to(encoder.device))
    hidden = out.last if clip_skip is None else encoder.norm(out.hidden_states[-(clip_skip + 1)])
    return prompts.finite(hidden, "text_encoder")


def text_rows(components: Components, run: Run) -> Tensor:
    """Embeddings of all branches, (branches * B, L, D)."""
    positive = run.get("prompt_embeds")
    if positive is None:
        positive = encode(components, prompts.rows(run["prompt"], run.prompts, "prompt"), run.get("clip_skip"))
    branches = [positive]
    if guided(components, run):
        negative = run.get("negative_prompt_embeds")
        if negative is None:
            texts = prompts.rows(run.get("negative_prompt") or "", run.prompts, "negative_prompt")
            negative = encode(components, texts, None, positive.shape[1])
        branches.insert(0, negative)
    times = run.batch // run.prompts
    return torch.cat([prompts.each(rows.to(positive), times) for rows in branches])


def scale_embedding(scale: float, width: int, like: Tensor) -> Tensor:
    """The guidance scale as an input of the network (Meng et al. 2023), (B, width)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = (scale - 1) * 1000.0 * frequencies
    row = torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))
    return row.to(like).expand(len(like), -1)


def unet_predict(unet: Any) -> Predict:
    """The U-Net as a prediction; "concat" rows (mask and masked picture) go beside x, unseen by add-ons."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        cond = dict(cond)
        beside = cond.pop("concat", None)
        x = x if beside is None else torch.cat([x, beside.to(x)], 1)
        typed = {name: _typed(unet, rows) for name, rows in cond.items()}
        return Pred(unet(x.to(unet.dtype), t, **typed).to(x.dtype))

    return predict


def _typed(unet: Any, rows: Tensor | list[Tensor]) -> Any:
    """Where and as precise as the network; residuals from beside it come as lists."""
    if isinstance(rows, Tensor):
        return rows.to(device=unet.device, dtype=unet.dtype)
    return [each.to(device=unet.device, dtype=unet.dtype) for each in rows]


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the U-Net was made for."""
    size = components["unet"].config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    scale = factor(components["vae"])
    return height * scale, width * scale


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    for side in ("height", "width"):
        if args.get(side) is not None and args[side] % 8:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of 8 pixels.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])
    check_safety(components)
    skip = args.get("clip_skip")
    if skip is None:
        return
    encoders = [components[name] for name in ("text_encoder", "text_encoder_2") if components.get(name) is not None]
    layers = min((encoder.config.num_hidden_layers for encoder in encoders), default=0)
    if not 0 <= skip < layers:
        raise ValueError(f"clip_skip={skip} has to be between 0 and {layers - 1} for this text encoder.")


def check_safety(components: Components) -> None:
    """Refuse a safety checker that has nothing to look through."""
    if components.get("safety_checker") is not None and components.get("feature_extractor") is None:
        raise ValueError("A safety checker needs feature_extractor beside it; load both, or pass safety_checker=None.")


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of the autoencoder."""
    unet, scheduler = components["unet"], components["scheduler"]

    def condition(run: Run, x: Tensor) -> Cond:
        rows = {"encoder_hidden_states": text_rows(components, run)}
        width = unet.config.time_cond_proj_dim
        return rows if width is None else rows | {"timestep_cond": scale_embedding(run.guidance_scale, width, x)}

    return (
        Stage(
            name="unet",
            network=unet,
            space=LatentSpace(components["vae"]),
            scheduler=scheduler,
            dtype=components["text_encoder"].dtype if components.get("text_encoder") else unet.dtype,
            schedule=lambda run: schedule(scheduler, run, unet.device),
            condition=condition,
            guide=lambda run: guide(components, run),
            predict=unet_predict(unet),
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode, and let the safety checker look where there is one; what it flags turns black."""
    pictures = LatentSpace(components["vae"]).decode(x)
    checker = components.get("safety_checker")
    if checker is None:
        return Finished(pictures)
    shown = images.to_output(pictures, "pil")
    pixels = components["feature_extractor"](shown).to(device=checker.device, dtype=checker.dtype)
    flagged: list[bool] = checker(pixels).tolist()
    hidden = torch.tensor(flagged, device=pictures.device).view(-1, 1, 1, 1)
    return Finished(torch.where(hidden, -torch.ones_like(pictures), pictures), flagged)


def adopt(components: dict[str, Any]) -> dict[str, Any]:
    """Mend the scheduler configurations of old checkpoints, as everybody's pictures assume: no clipping, offset 1."""
    scheduler = components.get("scheduler")
    changes: dict[str, Any] = {}
    if scheduler is None:
        return components
    if scheduler.config.get("steps_offset", 1) != 1:
        changes["steps_offset"] = 1
    if scheduler.config.get("clip_sample", False):
        changes["clip_sample"] = False
    return components | {"scheduler": type(scheduler).from_config(scheduler, **changes)} if changes else components


FAMILY = Family(
    key="stable-diffusion",
    stem="StableDiffusion",
    slots=SLOTS,
    settings={"requires_safety_checker": True},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    size=default_size,
    adopt=adopt,
    variants={
        frozenset({"ControlNet"}): CONTROLNET,
        frozenset({"PAG"}): PAG,
        frozenset({"ControlNet", "PAG"}): CONTROLNET_PAG,
    },
)
