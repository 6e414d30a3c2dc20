"""Pictures in and out: PIL pictures, arrays and tensors to (B, C, H, W), and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from autopipeline.config import Config
from autopipeline.errors import CheckpointError

Box = tuple[int, int, int, int]
Picture = Image.Image
LANCZOS = Image.Resampling.LANCZOS
CUBIC = Image.Resampling.BICUBIC
COLOURS = (1, 3, 4)
"""Channels that an array can have in its last dimension."""


def pixels(
    image: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    multiple: int,
    signed: bool = True,
    grey: bool = False,
    binary: bool = False,
    crop: Box | None = None,
    fill: bool = False,
    cubic: bool = False,
    floats_signed: bool = False,
) -> Tensor:
    """Pictures as float32 (B, C, H, W), in -1..1 where `signed`, else 0..1.

    Args:
        image: a PIL picture, a path, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or (B, C, H, W),
            or a list of these. Floats are in 0..1 (or -1..1, if any value is negative), uint16 in 0..65535, other
            integers in 0..255; a mask of integers may also be of 0 and 1.
        height: of the result in pixels; the picture's own by default. Rounded down to a multiple of `multiple`.
        width: likewise.
        multiple: see above.
        signed: the range of the result.
        grey: one channel in place of three; transparency is passed over, while it lies on white otherwise.
        binary: 1 from 0.5 on, else 0.
        crop: the part to take, in pixels of the picture: left, top, right, bottom (PIL pictures only).
        fill: keep the proportions and fill the border with the edge's colours (PIL pictures only).
        cubic: resize by cubic curves over an average, in place of Lanczos' (PIL pictures only).
        floats_signed: floats are in -1..1, also where no value is negative.

    Raises:
        TypeError: for anything that is no picture.
        ValueError: for pictures without pixels, of different sizes, with values out of range, NaN or infinity.
        FileNotFoundError: for a path that leads nowhere.
    """
    many = opened(image)
    first = many[0]
    if isinstance(first, Picture):
        x = _from_pil(many, height, width, multiple, grey, crop, fill, cubic)
    elif isinstance(first, np.ndarray | Tensor):
        if crop or fill:
            raise ValueError("Only PIL pictures can be cropped or filled up.")
        x = _from_numbers(many, grey, binary)
        size = (_down(height or x.shape[2], multiple), _down(width or x.shape[3], multiple))
        x = functional.interpolate(x, size=size)
    else:
        raise TypeError(f"A picture has to be a PIL picture, an array, a tensor or a path, not {type(first).__name__}.")
    known = floats_signed and not isinstance(first, Picture) and not _whole(first)
    if signed and not known and x.min() >= 0:
        x = 2 * x - 1
    return (x >= 0.5).float() if binary else x


def opened(image: Any) -> list[Any]:
    """A picture or a list of them as a list that is not empty, paths as PIL pictures."""
    many = list(image) if isinstance(image, list | tuple) else [image]
    if not many:
        raise ValueError("The list of pictures is empty.")
    return [read(one) if isinstance(one, str | os.PathLike) else one for one in many]


def read(path: str | os.PathLike[str]) -> Picture:
    """A picture from a file, turned as its camera says."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no picture {os.fspath(path)}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{os.fspath(path)} can't be read as a picture: {error}.") from None


def _down(size: int, multiple: int) -> int:
    if size < multiple:
        raise ValueError(f"A picture of {size} pixels is too small; the smallest side is {multiple}.")
    return size - size % multiple


def _from_pil(
    many: Sequence[Any],
    height: int | None,
    width: int | None,
    multiple: int,
    grey: bool,
    crop: Box | None,
    fill: bool,
    cubic: bool,
) -> Tensor:
    if not all(isinstance(one, Picture) for one in many):
        raise TypeError("A list of pictures has to be all of one kind.")
    cropped = [plain(one, grey).crop(crop) if crop else plain(one, grey) for one in many]
    size = _down(width or cropped[0].width, multiple), _down(height or cropped[0].height, multiple)
    how: dict[str, Any] = dict(resample=CUBIC, reducing_gap=1) if cubic else dict(resample=LANCZOS)
    resized = [fitted(one, size) if fill else one.resize(size, **how) for one in cropped]
    mode = "L" if grey else "RGB"
    array = np.stack([np.asarray(one.convert(mode), np.float32) / 255 for one in resized])
    return torch.from_numpy(array.reshape(len(many), size[1], size[0], -1).transpose(0, 3, 1, 2).copy())


def plain(picture: Picture, grey: bool) -> Picture:
    """A picture in a mode that can be resized: transparency lies on white, wide integers are scaled to bytes."""
    if picture.mode == "F":
        raise ValueError("A PIL picture of floats (mode F) has no known range; pass it as an array in 0..1.")
    if picture.mode.startswith("I"):
        values = np.asarray(picture, np.float64)
        wide = picture.mode != "I" or values.max(initial=0) > 255  # mode I has no range of its own
        return Image.fromarray((values / (257 if wide else 1)).clip(0, 255).astype(np.uint8))
    if grey:
        return picture
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


def _from_numbers(many: Sequence[Any], grey: bool, binary: bool) -> Tensor:
    rows = [_one(x, grey, binary) for x in many]
    if len({x.shape[1:] for x in rows}) > 1:
        raise ValueError("All pictures of a list have to be of one size.")
    x = torch.cat(rows)
    if grey and x.shape[1] == 3:
        x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601, as PIL has it
    wanted = (1,) if grey else (1, 3)
    if x.shape[1] not in wanted:
        raise ValueError(f"A picture has {x.shape[1]} channels; {' or '.join(map(str, wanted))} would do.")
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 and not grey else x


def _one(x: Any, grey: bool, binary: bool) -> Tensor:
    """An array (…, H, W, C) or a tensor (…, C, H, W) as (B, C, H, W)."""
    if not isinstance(x, np.ndarray | Tensor):
        raise TypeError("A list of pictures has to be all of one kind.")
    unit = _unit(x, binary)
    if isinstance(x, Tensor):
        unit = unit[None] if x.ndim == 2 else unit
        unit = (unit[:, None] if grey else unit[None]) if unit.ndim == 3 else unit
        return _four(unit, x)
    if x.ndim == 2 or (grey and x.ndim == 3 and x.shape[-1] not in COLOURS):
        unit = unit[..., None]
    unit = _four(unit[None] if unit.ndim == 3 else unit, x).permute(0, 3, 1, 2)
    return _opaque(unit, grey) if unit.shape[1] == 4 and unit.min() >= 0 else unit


def _opaque(x: Tensor, grey: bool) -> Tensor:
    """(B, 4, H, W) on white; for masks, without its transparency."""
    return x[:, :3] if grey else x[:, :3] * x[:, 3:] + (1 - x[:, 3:])


def _unit(x: Any, binary: bool) -> Tensor:
    """Numbers of any kind as floats in 0..1 or -1..1."""
    most = _most(x)
    with np.errstate(over="ignore"):
        floats = torch.from_numpy(x.astype(np.float32)) if isinstance(x, np.ndarray) else x.float()
    if not floats.numel():
        raise ValueError("The picture has no pixels.")
    low, high = float(floats.min()), float(floats.max())
    if not math.isfinite(low + high):
        raise ValueError("The picture has NaN or infinity in it.")
    if binary and high <= 1:
        most = 1  # a mask of 0 and 1, in whatever numbers
    least, largest = (0, most) if _whole(x) else (-2, 2)
    if low < least or high > largest:
        able = f"0..{most} for integers" if _whole(x) else "0..1 or -1..1 for floats"
        raise ValueError(f"The picture's values go from {low:g} to {high:g}, which is not within {able}.")
    return floats / most


def _most(x: Any) -> int:
    """What white is in numbers of that kind."""
    kind = _kind(x)
    if not kind.startswith(("bool", "float", "bfloat", "int", "uint")):
        raise TypeError(f"A picture can't be of numbers of the kind {kind}.")
    if not _whole(x):
        return 1
    return 65535 if kind == "uint16" else 255


def _kind(x: Any) -> str:
    return x.dtype.name if isinstance(x, np.ndarray) else str(x.dtype).removeprefix("torch.")


def _whole(x: Any) -> bool:
    return "int" in _kind(x)


def _four(x: Tensor, given: Any) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"A picture can't have the shape {tuple(given.shape)}.")
    return x


def fitted(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resized within size (width, height) with its proportions kept; the border repeats the edges."""
    width, height = size
    wide = width / height < picture.width / picture.height
    inner_w = width if wide else max(picture.width * height // picture.height, 1)
    inner_h = max(picture.height * width // picture.width, 1) if wide else height
    inner = picture.resize((inner_w, inner_h), LANCZOS)
    left, top = width // 2 - inner_w // 2, height // 2 - inner_h // 2
    canvas = Image.new("RGB", size)
    canvas.paste(inner, (left, top))
    if wide and top > 0:
        canvas.paste(inner.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        canvas.paste(inner.resize((width, top), box=(0, inner_h, width, inner_h)), (0, top + inner_h))
    elif not wide and left > 0:
        canvas.paste(inner.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        canvas.paste(inner.resize((left, height), box=(inner_w, 0, inner_w, height)), (left + inner_w, 0))
    return canvas


def crop_region(mask: Picture, width: int, height: int, pad: int) -> Box:
    """The part of a picture that a mask covers, with `pad` pixels around it, widened to the shape width : height."""
    found = mask.convert("L").getbbox()
    if found is None:
        raise ValueError("The mask is black all over, so there is nothing to crop to or to repaint.")
    left, top, right, bottom = found
    x = (max(left - pad, 0), min(right + pad, mask.width))
    y = (max(top - pad, 0), min(bottom + pad, mask.height))
    ratio = width / height
    if (x[1] - x[0]) / (y[1] - y[0]) > ratio:
        y = _widened(y, (x[1] - x[0]) / ratio, mask.height)
    else:
        x = _widened(x, (y[1] - y[0]) * ratio, mask.width)
    return x[0], y[0], x[1], y[1]


def _widened(span: tuple[int, int], length: float, limit: int) -> tuple[int, int]:
    """A span of about that length around the same middle, moved and cut to lie within 0..limit."""
    more = int(length - (span[1] - span[0]))
    low = span[0] - more // 2
    high = span[1] + more - more // 2
    over = max(high - limit, 0)
    low, high = low - over, high - over
    return max(low, 0), min(high - min(low, 0), limit)


def overlay(result: Picture, original: Picture, mask: Picture, box: Box | None) -> Picture:
    """The result in its place within the original: where the mask is black, the original's own pixels."""
    if box is not None:
        left, top, right, bottom = box
        canvas = Image.new("RGB", original.size)
        canvas.paste(_cropped(result, (right - left, bottom - top)), (left, top))
        result = canvas
    held = Image.new("RGBa", original.size)
    held.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    whole = result.convert("RGBA")
    whole.alpha_composite(held.convert("RGBA"))
    return whole.convert("RGB")


def _cropped(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resized to cover size (width, height) with its proportions kept, and cut."""
    width, height = size
    wide = width / height > picture.width / picture.height
    outer_w = width if wide else picture.width * height // picture.height
    outer_h = picture.height * width // picture.width if wide else height
    canvas = Image.new("RGB", size)
    canvas.paste(picture.resize((outer_w, outer_h), LANCZOS), (width // 2 - outer_w // 2, height // 2 - outer_h // 2))
    return canvas


def to_output(x: Tensor, kind: str) -> Any:
    """Pictures (B, C, H, W) in -1..1 as "pil" (a list), "np" (B, H, W, C) or "pt" (B, C, H, W), both in 0..1."""
    unit = (x * 0.5 + 0.5).clamp(0, 1)
    if kind == "pt":
        return unit
    array = unit.cpu().permute(0, 2, 3, 1).float().numpy()
    if kind == "np":
        return array
    squeezed = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in squeezed]


def same_size(image: Any, mask: Any) -> None:
    """Raise ValueError if a picture and its mask differ in size; latents have none that could differ."""
    for one, other in zip(_list(image), _list(mask), strict=False):
        sizes = None if _latents(one) else _size(one), _size(other)
        if None not in sizes and sizes[0] != sizes[1]:
            (a, b), (c, d) = sizes  # type: ignore[misc]
            raise ValueError(f"image is {a} x {b} pixels but mask_image is {c} x {d}; they have to be of one size.")


def sizes(image: Any) -> list[tuple[int, int] | None]:
    """Width and height of each picture in pixels; None for what is no picture."""
    return [_size(one) for one in _list(image)]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _latents(picture: Any) -> bool:
    return isinstance(picture, Tensor) and picture.ndim > 2 and picture.shape[-3] not in (1, 3)


def _size(picture: Any) -> tuple[int, int] | None:
    """Width and height; None for what is no picture."""
    if isinstance(picture, str | os.PathLike):
        picture = read(picture)
    if isinstance(picture, Picture):
        return picture.size
    if not isinstance(picture, np.ndarray | Tensor) or picture.ndim < 2:
        return None
    colours = isinstance(picture, np.ndarray) and (
        picture.ndim == 4 or (picture.ndim == 3 and picture.shape[-1] in COLOURS)
    )
    height, width = picture.shape[-3:-1] if colours else picture.shape[-2:]
    return width, height


CLIP_DEFAULTS: dict[str, Any] = dict(
    do_resize=True,
    size={"shortest_edge": 224},
    resample=3,
    do_center_crop=True,
    crop_size={"height": 224, "width": 224},
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    do_convert_rgb=True,
)


class CLIPImageProcessor:
    """Pictures as CLIP's vision encoder takes them."""

    def __init__(self, **config: Any) -> None:
        self.config = Config(CLIP_DEFAULTS | config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> CLIPImageProcessor:
        """Read preprocessor_config.json from a folder; CheckpointError where that fails."""
        path = (Path(folder, subfolder) if subfolder else Path(folder)) / "preprocessor_config.json"
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} has no {path.name}.") from None
        except ValueError:
            raise CheckpointError(f"{path} is not valid JSON.") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} does not hold an object.")
        return cls(**content)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"image_processor_type": "CLIPImageProcessor"} | self.config, indent=2, sort_keys=True)
        Path(folder, "preprocessor_config.json").write_text(text + "\n", "utf-8")

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """(B, 3, H, W): the shorter side resized, the middle cut out, normalised."""
        return torch.stack([self._one(plain(picture, False).convert("RGB")) for picture in pictures])

    def _one(self, picture: Picture) -> Tensor:
        config = self.config
        if config.do_resize:
            picture = picture.resize(self._resized(picture), Image.Resampling(config.resample))
        x = np.asarray(picture, np.float32)
        if config.do_center_crop:
            crop = config.crop_size
            height, width = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
            x = _middle(x, height, width)
        if config.do_rescale:
            x = x * np.float32(config.rescale_factor)
        if config.do_normalize:
            x = (x - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))

    def _resized(self, picture: Picture) -> tuple[int, int]:
        size = self.config.size
        if isinstance(size, Mapping) and "height" in size:
            return size["width"], size["height"]
        short = size["shortest_edge"] if isinstance(size, Mapping) else size
        width, height = picture.size
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short


def _middle(x: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """The middle (height, width) of x, with zeros where x is smaller."""
    out = np.zeros((max(height, x.shape[0]), max(width, x.shape[1]), x.shape[2]), x.dtype)
    top, left = (out.shape[0] - x.shape[0] + 1) // 2, (out.shape[1] - x.shape[1] + 1) // 2
    out[top : top + x.shape[0], left : left + x.shape[1]] = x
    top, left = (out.shape[0] - height) // 2, (out.shape[1] - width) // 2
    return out[top : top + height, left : left + width]
