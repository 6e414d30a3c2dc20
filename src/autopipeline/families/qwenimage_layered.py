"""Qwen-Image-Layered (Qwen team 2025): a picture is taken apart into layers with transparency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux, qwenimage
from autopipeline.families import qwenimage_edit as edit
from autopipeline.families.qwenimage import DRAWS, EMBEDS, LAST, STEPS, Texts
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, NormPreserving, Unguided
from autopipeline.spaces import Packed
from autopipeline.stage import Cond, Finished, Random, Run, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]

SIDES = {640: 640, 1024: 1024}
"""Sides in pixels of the square that has as many pixels as what is made, by `resolution`."""
WORDS = 512
"""Tokens of a description that the text encoder writes itself, at most."""
_ASK = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_LOOK = f"\n{edit.LOOK}{qwenimage.AFTER}"
ENGLISH = (
    "# Image Annotator\nYou are a professional\nimage annotator. Please write an image caption based on the input "
    "image:\n1. Write the caption using natural,\ndescriptive language without structured formats or rich text.\n"
    "2. Enrich caption details by including: \n - Object\nattributes, such as quantity, color, shape, size, material, "
    "state, position, actions, and so on\n - Vision Relations\nbetween objects, such as spatial relations, functional "
    "relations, possessive relations, attachment relations, action\nrelations, comparative relations, causal relations,"
    " and so on\n - Environmental details, such as weather, lighting,\ncolors, textures, atmosphere, and so on\n"
    " - Identify the text clearly visible in the image, without translation or\nexplanation, and highlight it in the "
    "caption with quotation marks\n3. Maintain authenticity and accuracy:\n - Avoid\ngeneralizations\n - Describe all "
    "visible information in the image, while do not add information not explicitly shown in\nthe image"
)
CHINESE = (
    "# 图像标注器\n你是一个专业的图像标注器。请基于输入图像，撰写图注:\n1.\n使用自然、描述性的语言撰写图注，"
    "不要使用结构化形式或富文本形式。\n2. 通过加入以下内容，丰富图注细节：\n - 对象的属性：如数量、颜色、形状、"
    "大小、位置、材质、状态、动作等\n -\n对象间的视觉关系：如空间关系、功能关系、动作关系、从属关系、比较关系、"
    "因果关系等\n - 环境细节：例如天气、光照、颜色、纹理、气氛等\n - 文字内容：识别图像中清晰可见的文字，"
    "不做翻译和解释，用引号在图注中强调\n3.\n保持真实性与准确性：\n - 不要使用笼统的描述\n -\n"
    "描述图像中所有可见的信息，但不要加入没有在图像中出现的内容"
)
TASK = TaskRow(
    task=Text2Image,
    params=dict(image=None)
    | qwenimage.PROMPTS
    | dict(layers=4)
    | STEPS
    | DRAWS
    | EMBEDS
    | LAST
    | dict(resolution=640, cfg_normalize=False, use_en_prompt=False),
    tensors=qwenimage.TENSORS,
)


class Layers(NamedTuple):
    """A whole picture and its layers, of one size, packed one after the other: (B, (1 + layers) L, 4 C)."""

    packed: Packed
    layers: int

    @property
    def channels(self) -> int:
        """C."""
        return self.packed.channels

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, (1 + layers) L, 4 C)."""
        batch, tokens, channels = self.packed.shape(run, height, width)
        return batch, (1 + self.layers) * tokens, channels

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as latents, (B, 1 + layers, C, h, w)."""
        full = (shape[0], 1 + self.layers, self.channels, self.packed.height, self.packed.width)
        return self.pack(random.normal(full, dtype=dtype, device=device))

    def pack(self, latents: Tensor) -> Tensor:
        """Layers (B, 1 + layers, C, h, w) packed; what is packed already is left alone."""
        if latents.ndim != 5:
            return latents
        return self.packed.pack(latents.flatten(0, 1)).unflatten(0, latents.shape[:2]).flatten(1, 2)

    def pixels(self, run: Run, image: Any) -> Tensor:
        """As for one picture."""
        return self.packed.pixels(run, image)

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """As for one picture."""
        return self.packed.masked_pixels(run)

    def mask(self, mask: Tensor) -> Tensor:
        """As for one picture."""
        return self.packed.mask(mask)

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """As for one picture."""
        return self.packed.encode(pixels, random, plain)

    def decode(self, x: Tensor) -> Tensor:
        """The layers alone, (B * layers, 4, H, W)."""
        return self.packed.decode(self._apart(x))

    def preview(self, x0: Tensor) -> Tensor:
        """A cheap look at the layers."""
        return self.packed.preview(self._apart(x0))

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (1 + self.layers, -1))[:, 1:].flatten(0, 1)


def guide(run: Run) -> Guidance:
    """Guidance where there is a negative prompt; `cfg_normalize` keeps the length of every token's prediction."""
    if not qwenimage.guided(run):
        return Unguided()
    return (NormPreserving if run["cfg_normalize"] else ClassifierFree)(run["true_cfg_scale"])


def transparent(picture: Any, height: int, width: int) -> Image.Image:
    """A picture of any kind at that size, with a channel for its transparency."""
    (one,) = images.opened(picture)
    if not isinstance(one, Image.Image):
        one = edit.fitted(one, height, width)
    return one.convert("RGBA").resize((width, height), images.LANCZOS)


def clear_pixels(picture: Image.Image) -> Tensor:
    """Such a picture as (1, 4, H, W) in -1..1."""
    return torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)


def caption(components: Components, picture: Image.Image, english: bool) -> str:
    """What the text encoder sees in a picture: the likeliest words, whatever it draws by chance elsewhere."""
    encoder, processor = components["text_encoder"], components["processor"]
    if encoder is None or processor is None:
        raise ValueError("Without a text_encoder and a processor no description can be written; pass a prompt.")
    inputs = processor([f"{_ASK}{ENGLISH if english else CHINESE}{_LOOK}"], [picture])
    with qwenimage.LOOKING:
        said = encoder.generate(**qwenimage.marked(encoder, inputs), max_new_tokens=WORDS, do_sample=False)
    words = said[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the packed latents of all layers, beside those of the picture."""
    many: list[Image.Image] = run["image"]
    packed, scheduler = flux.packed(components, run), components["scheduler"]
    own = packed.height // 2, packed.width // 2

    def texts(components: Components, run: Run) -> list[Texts]:
        def encode(texts: list[str]) -> Texts:
            return qwenimage.encode(components, texts, run["max_sequence_length"])

        if run["prompt_embeds"] is None and run["prompt"] in ("", " "):
            run.args = {**run.args, "prompt": caption(components, many[0], run["use_en_prompt"])}
        return qwenimage.branches(run, encode, run["max_sequence_length"])

    stage = qwenimage.stage(components, packed, texts, *[own] * (run["layers"] + 1))
    pixels = torch.cat([clear_pixels(picture) for picture in many])
    whole = edit.beside(replace(stage, space=Layers(packed, run["layers"])), [pixels])

    def condition(run: Run, x: Tensor) -> Cond:
        cond = whole.condition(run, x)
        if not components["transformer"].config.use_additional_t_cond:
            return cond
        return cond | {"kind": torch.zeros(len(cond["rotary"]), dtype=torch.long, device=x.device)}

    def schedule(run: Run) -> Grid:
        tokens = own[0] * own[1]
        return flow_schedule(scheduler, run, stage.device, tokens, (tokens / 256) ** 0.5)

    return (replace(whole, condition=condition, guide=guide, schedule=schedule),)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode; every result is a list of layers, the lowest first."""
    return Finished(Layers(flux.packed(components, run), run["layers"]).decode(x), each=run["layers"])


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Pictures of about as many pixels as `resolution` says; without a prompt, a description is written."""
    args = qwenimage.read(components, args)
    if args["resolution"] not in SIDES:
        raise ValueError(f"resolution={args['resolution']} has to be {' or '.join(map(str, SIDES))}.")
    if args["prompt"] is None and args["prompt_embeds"] is None:
        args["prompt"] = ""
    many: list[Any] = list(args["image"]) if isinstance(args["image"], list | tuple) else [args["image"]]
    height, width = edit.scaled(edit.sizes(many)[0], SIDES[args["resolution"]] ** 2)
    return args | dict(height=height, width=width, image=[transparent(picture, height, width) for picture in many])


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    qwenimage.check_texts(components, args)
    flux.check_size(components, args)
    if args["use_en_prompt"] and args["prompt"] not in ("", " "):
        raise ValueError("use_en_prompt has an effect only where a description is written, without a prompt.")
    if args["cfg_normalize"] and (args["true_cfg_scale"] <= 1 or not qwenimage.negative(args)):
        raise ValueError("cfg_normalize has no effect without guidance: true_cfg_scale above 1 and negative_prompt.")
    given, wanted = len(args["image"]), prompts.count(args)
    if given not in (1, wanted):
        raise ValueError(f"There are {given} pictures for {wanted} prompts; give one, or one for each.")
    if components["vae"].config.get("input_channels") != 4:
        raise ValueError("The vae has no channel for transparency, which the layers need.")


FAMILY = replace(
    edit.FAMILY,
    key="qwenimage-layered",
    stem="QwenImageLayered",
    tasks={"image2image": TASK},
    stages=stages,
    finish=finish,
    check=check,
    read=read,
)
