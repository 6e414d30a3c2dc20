"""DeepFloyd IF (Saharia et al. 2022; DeepFloyd 2023): pixels, led by T5; small pictures first, then larger ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from autopipeline import captions, images, prompts
from autopipeline.families import callbacks
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import schedule
from autopipeline.families.unclip import guide, unet_predict
from autopipeline.stage import Cond, Family, Finished, Random, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image, repeat_to
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver

Components = Mapping[str, Any]
LENGTH = 77
"""Tokens of a text."""

_TEXT = {
    "tokenizer": Slot(("T5Tokenizer",), optional=True),
    "text_encoder": Slot(("T5EncoderModel",), optional=True),
    "unet": Slot(("UNet2DConditionModel",)),
    "scheduler": Slot(("Scheduler",)),
}
_LOOKS = {
    "safety_checker": Slot(("IFSafetyChecker",), optional=True),
    "feature_extractor": Slot(("CLIPImageProcessor",), optional=True),
    "watermarker": Slot(("IFWatermarker",), optional=True),
}
SLOTS = _TEXT | _LOOKS
UPSCALER_SLOTS = _TEXT | {"image_noising_scheduler": Slot(("Scheduler",))} | _LOOKS
_START, _SIZE = dict(prompt=None), dict(height=None, width=None)
_AGAINST = dict(negative_prompt=None, num_images_per_prompt=1)
_DRAWS = dict(eta=0.0, generator=None, prompt_embeds=None, negative_prompt_embeds=None)
_LAST = dict(output_type="pil", return_dict=True) | callbacks.PARAMS
_CLEAN, _ATTENTION = dict(clean_caption=True), dict(cross_attention_kwargs=None)
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def _steps(steps: int, scale: float, **strength: float) -> dict[str, Any]:
    return {**strength, "num_inference_steps": steps, "timesteps": None, "guidance_scale": scale}


# --- pixels ----------------------------------------------------------------------------------------------------


class PixelSpace(NamedTuple):
    """Pixels themselves, in -1..1: (B, 3, H, W). PIL pictures come to the size that the network was made for."""

    side: int  # pixels of the shorter side
    channels: int = 3

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, 3, H, W)."""
        return run.batch, self.channels, height, width

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as it is."""
        return random.normal(shape, dtype=dtype, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        """The pixels themselves."""
        return latents

    def pixels(self, run: Run, image: Any) -> Tensor:
        """Arrays and tensors of floats are in -1..1 and keep their size; of several pictures, each for its prompt."""
        return dealt(images.pixels(self._sized(image), multiple=1, floats_signed=True), run)

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """Picture and mask; the mask likewise."""
        sized = self._sized(run["mask_image"], grey=True)
        mask = images.pixels(sized, multiple=1, signed=False, grey=True, binary=True)
        return self.pixels(run, run["image"]), dealt(mask, run)

    def mask(self, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """The pixels themselves."""
        return pixels

    def decode(self, x: Tensor) -> Tensor:
        """The pixels themselves."""
        return x

    def preview(self, x0: Tensor) -> Tensor:
        """The pixels themselves."""
        return x0

    def _sized(self, image: Any, grey: bool = False) -> Any:
        """PIL pictures with the shorter side of the network's size, the other one a multiple of 8."""
        many = images.opened(image)
        return [self._fitted(x, grey) if isinstance(x, Image.Image) else x for x in many]

    def _fitted(self, picture: Image.Image, grey: bool) -> Image.Image:
        ratio = picture.width / picture.height
        width, height = self.side, self.side
        if ratio >= 1:
            width = round(self.side / 8 * ratio) * 8
        else:
            height = round(self.side / 8 / ratio) * 8
        return images.plain(picture, grey).convert("L" if grey else "RGB").resize((width, height), images.CUBIC)


class UpscaledSpace(PixelSpace):
    """The same where `image` stands beside x, and the picture to begin with is `original_image`."""

    __slots__ = ()

    def pixels(self, run: Run, image: Any) -> Tensor:
        """Of the original."""
        return super().pixels(run, run["original_image"])


def dealt(x: Tensor, run: Run) -> Tensor:
    """Of several pictures, each for all results of its prompt: a a b b."""
    return x if run.batch % len(x) else prompts.each(x, run.batch // len(x))


class Repaint(Image2Image):
    """From the picture, noised only where the mask covers it; the rest is never touched."""

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """Draws the noise alone."""
        run, stage = self.run, self.stage
        here: dict[str, Any] = dict(device=stage.device, dtype=stage.dtype)
        pixels, mask = (rows.to(**here) for rows in stage.space.masked_pixels(run))
        if pixels.shape[-2:] != mask.shape[-2:]:
            raise ValueError(f"image is {tuple(pixels.shape[-2:])} and mask_image {tuple(mask.shape[-2:])} pixels.")
        self.image, self.mask = repeat_to(pixels, run.batch, "image"), repeat_to(mask, run.batch, "mask_image")
        noise = stage.space.noise(run.random, tuple(self.image.shape), **here)
        return self.keep(solver.noised(self.image, noise, grid.begin), solver, grid.begin, False)

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """Outside the mask, the picture."""
        return (1 - self.mask) * self.image + self.mask * x


# --- texts -----------------------------------------------------------------------------------------------------


def encode(components: Components, texts: list[str], length: int = LENGTH) -> Tensor:
    """T5's states (P, length, E)."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    ids = prompts.long_tokens(tokenizer, texts, length)
    return prompts.finite(encoder(ids.to(encoder.device), tokenizer.mask(ids).to(encoder.device)), "text_encoder")


def text_rows(components: Components, run: Run, dtype: torch.dtype) -> Tensor:
    """Embeddings of all branches, (branches * B, T, E)."""

    def branch(name: str, length: int) -> Tensor:
        if run[f"{name}_embeds"] is not None:
            return run[f"{name}_embeds"]
        texts = prompts.rows(run[name] or "", run.prompts, name)
        return encode(components, captions.prepared(texts, run["clean_caption"]), length)

    rows = [branch("prompt", LENGTH)]
    if "negative" in guide(run).branches:
        rows.insert(0, branch("negative_prompt", rows[0].shape[1]))
    times, device = run.batch // run.prompts, components["unet"].device
    return torch.cat([prompts.each(each.to(device, dtype), times) for each in rows])


# --- the call --------------------------------------------------------------------------------------------------


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in pixels; where it enlarges, with the smaller picture beside x."""
    unet, scheduler, encoder = components["unet"], components["scheduler"], components["text_encoder"]
    dtype = (unet if encoder is None else encoder).dtype
    noising = components.get("image_noising_scheduler")

    def condition(run: Run, x: Tensor) -> Cond:
        rows = text_rows(components, run, dtype)
        if noising is None:
            return {"encoder_hidden_states": rows}
        small = repeat_to(dealt(images.pixels(run["image"], multiple=1, floats_signed=True), run), run.batch, "image")
        large = functional.interpolate(small.to(x), x.shape[-2:], mode="bilinear", align_corners=True)
        level = torch.full((len(x),), run["noise_level"], device=x.device)
        noised = noising.add_noise(large, run.random.like(large), level)
        times = len(rows) // len(x)
        return {
            "encoder_hidden_states": rows,
            "concat": noised.repeat(times, 1, 1, 1),
            "class_labels": level.repeat(times),
        }

    return (
        Stage(
            name="unet",
            network=unet,
            space=(PixelSpace if noising is None else UpscaledSpace)(unet.config.sample_size),
            scheduler=scheduler,
            dtype=dtype,
            schedule=lambda run: schedule(scheduler, run, unet.device),
            condition=condition,
            guide=guide,
            predict=unet_predict(unet, scheduler),
            public={"encoder_hidden_states": "prompt_embeds"},
        ),
    )


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """The pictures, as they are for tensors; else what the checker flags turns black, and PIL pictures are marked."""
    if run["output_type"] == "pt":
        return Finished(x, raw=True)
    checker, watermarker = components["safety_checker"], components["watermarker"]
    flagged: list[bool] | None = None
    marked: list[bool] | None = None
    if checker is not None:
        shown = components["feature_extractor"](images.to_output(x, "pil"))
        hits = checker(shown.to(device=checker.device, dtype=checker.dtype))
        x = torch.where(hits.any(1).to(x.device).view(-1, 1, 1, 1), -torch.ones_like(x), x)
        flagged, marked = hits.T.tolist()
    if watermarker is not None and run["output_type"] == "pil":
        shown = watermarker(images.to_output(x, "pil"), components["unet"].config.sample_size)
        x = images.pixels(shown, multiple=1)
    return Finished(x, flagged, marked=marked)


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["unet"].config.sample_size
    return side, side


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    enlarges, channels = "noise_level" in args, components["unet"].config.in_channels
    if channels != (6 if enlarges else 3):
        what = "a smaller picture beside x: use the IF…SuperResolutionPipeline classes" if channels == 6 else "x alone"
        raise ValueError(f"This unet takes {channels} channels, which is {what}.")
    if enlarges:
        most = components["image_noising_scheduler"].config.num_train_timesteps - 1
        if args["noise_level"] > most:
            raise ValueError(f"noise_level={args['noise_level']} has to be from 0 to {most}.")
    sd.check_safety(components)
    if args.get("mask_image") is not None:
        images.same_size(args["original_image" if enlarges else "image"], args["mask_image"])


_ENDING = _AGAINST | _DRAWS | _LAST | _CLEAN | _ATTENTION | sd.CALLBACK
TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=_START | _steps(100, 7.0) | _AGAINST | _SIZE | _ENDING,
        tensors=_TENSORS,
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=_START | dict(image=None) | _steps(80, 10.0, strength=0.7) | _ENDING,
        tensors=_TENSORS,
    ),
    "inpaint": TaskRow(
        task=Repaint,
        params=_START | dict(image=None, mask_image=None) | _steps(50, 7.0, strength=1.0) | _ENDING,
        tensors=_TENSORS,
    ),
}


def _enlarging(level: int) -> dict[str, Any]:
    return _AGAINST | _DRAWS | _LAST | _ATTENTION | dict(noise_level=level) | _CLEAN | sd.CALLBACK


_BOTH = dict(image=None, original_image=None)
UPSCALER_TASKS = {
    "text2image": TaskRow(
        task=Text2Image,
        params=_START | _SIZE | dict(image=None) | _steps(50, 4.0) | _enlarging(250),
        tensors=_TENSORS,
        needs=("image",),
    ),
    "image2image": TaskRow(
        task=Image2Image,
        params=_BOTH | dict(strength=0.8) | _START | _steps(50, 4.0) | _enlarging(250),
        tensors=_TENSORS,
        trigger="original_image",
        needs=("image", "original_image"),
    ),
    "inpaint": TaskRow(
        task=Repaint,
        params=_BOTH | dict(mask_image=None, strength=0.8) | _START | _steps(100, 4.0) | _enlarging(0),
        tensors=_TENSORS,
        needs=("image", "original_image", "mask_image"),
    ),
}

FAMILY = Family(
    key="if",
    stem="IF",
    slots=SLOTS,
    settings={"requires_safety_checker": True},
    tasks=TASKS,
    stages=stages,
    finish=finish,
    size=size,
    check=check,
    read=callbacks.read,
)
SUPERRESOLUTION = Family(
    key="if-superresolution",
    stem="IF",
    slots=UPSCALER_SLOTS,
    settings={"requires_safety_checker": True},
    tasks=UPSCALER_TASKS,
    stages=stages,
    finish=finish,
    size=size,
    check=check,
    read=callbacks.read,
)
