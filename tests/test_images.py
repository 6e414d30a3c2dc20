"""Pictures of every kind go in and come out as with the peer; what is no picture is refused in a sentence."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import tiny
from autopipeline import CheckpointError
from autopipeline.config import Config
from autopipeline.images import (
    CLIPImageProcessor,
    crop_region,
    fitted,
    overlay,
    pixels,
    read,
    same_size,
    to_output,
)
from autopipeline.spaces import LatentSpace

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIZES = [(None, None), (64, 64), (40, 72), (100, 61)]
PICTURE = tiny.photo(70, 51)
MASKS = dict(signed=False, grey=True, binary=True)


def processor(mask: bool = False, **options: Any) -> Any:
    """The peer's, as its pipelines make it for pictures and for masks."""
    own = dict(do_normalize=False, do_binarize=True, do_convert_grayscale=True) if mask else {}
    return diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8, **own | options)


def peers(image: Any, *args: Any, mask: bool = False, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return processor(mask).preprocess(image, *args, **options)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def circle(width: int, height: int, mode: str = "L") -> Image.Image:
    """A mask with every level of grey at its border."""
    picture = Image.new("L", (width * 4, height * 4), 0)
    ImageDraw.Draw(picture).ellipse((width, height, width * 3, height * 3), fill=255)
    return picture.resize((width, height)).convert(mode)


def veiled(picture: Image.Image) -> Image.Image:
    """With a different transparency in each place."""
    copy = picture.convert("RGBA")
    copy.putalpha(Image.linear_gradient("L").resize(picture.size))
    return copy


PICTURES: dict[str, Any] = {
    "pil": PICTURE,
    "pil list": [PICTURE, tiny.photo(70, 51, 3)],
    "pil of two sizes": [PICTURE, tiny.photo(64, 80, 3)],
    "array": floats(51, 70, 3),
    "batch array": floats(2, 51, 70, 3),
    "array list": [floats(51, 70, 3), floats(51, 70, 3, seed=1)],
    "list of batch arrays": [floats(2, 51, 70, 3), floats(1, 51, 70, 3, seed=1)],
    "signed array": floats(51, 70, 3) * 2 - 1,
    "double array": floats(51, 70, 3).astype(np.float64),
    "reversed array": floats(51, 70, 3)[::-1, ::-1],
    "tensor": torch.from_numpy(floats(3, 51, 70)),
    "batch tensor": torch.from_numpy(floats(2, 3, 51, 70)),
    "tensor list": [torch.from_numpy(floats(3, 51, 70, seed=k)) for k in range(3)],
    "list of batch tensors": [torch.from_numpy(floats(1, 3, 51, 70, seed=k)) for k in range(3)],
    "signed tensor": torch.from_numpy(floats(2, 3, 51, 70)) * 2 - 1,
    "beyond": torch.from_numpy(floats(2, 3, 51, 70)) * 2.2 - 1.1,
}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_as_the_peer_reads_them(name: str, height: int | None, width: int | None) -> None:
    actual = pixels(PICTURES[name], height, width, multiple=8)
    expected = peers(PICTURES[name], height, width)
    assert (actual.dtype, actual.shape) == (torch.float32, expected.shape)
    assert torch.allclose(actual, expected.float(), atol=1e-6)


MASK_INPUTS: dict[str, Any] = {
    **{f"pil {mode}": circle(70, 51, mode) for mode in ("L", "RGB", "1", "P", "LA", "RGBA", "CMYK")},
    "pil veiled": veiled(circle(70, 51)),
    "pil list": [circle(70, 51), tiny.mask(70, 51)],
    "array": floats(51, 70),
    "array of one channel": floats(51, 70, 1),
    "batch array": floats(2, 51, 70),
    "batch array of one channel": floats(2, 51, 70, 1),
    "array list": [floats(51, 70), floats(51, 70, seed=1)],
    "tensor": torch.from_numpy(floats(51, 70)),
    "tensor of one channel": torch.from_numpy(floats(1, 51, 70)),
    "tensors": torch.from_numpy(floats(2, 51, 70)),
    "batch tensor": torch.from_numpy(floats(2, 1, 51, 70)),
    "tensor list": [torch.from_numpy(floats(1, 51, 70, seed=k)) for k in range(3)],
    "black": np.zeros((51, 70), np.float32),
}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", MASK_INPUTS)
def test_masks_as_the_peer_reads_them(name: str, height: int | None, width: int | None) -> None:
    """0 or 1, transparency or not; a mask of two colours is resized without greys between them."""
    given = MASK_INPUTS[name]
    actual = pixels(given, height, width, multiple=8, **MASKS)
    expected = peers(given.clone() if isinstance(given, Tensor) else given, height, width, mask=True)
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected.float())
    assert set(actual.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("box", [(10, 5, 60, 45), (0, 0, 70, 51), (33, 20, 41, 51)])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("fill", [False, True])
def test_cropping_and_filling(box: tuple[int, int, int, int], mask: bool, fill: bool) -> None:
    mode = "fill" if fill else "default"
    for picture in [circle(70, 51, kind) for kind in ("L", "RGB", "1")] if mask else [PICTURE]:
        actual = pixels(picture, 48, 64, multiple=8, crop=box, fill=fill, **(MASKS if mask else {}))
        expected = peers(picture, 48, 64, mask=mask, resize_mode=mode, crops_coords=box)
        assert torch.allclose(actual, expected.float(), atol=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_filling_any_size(seed: int) -> None:
    draw = random.Random(seed)
    picture = tiny.photo(draw.randint(20, 150), draw.randint(20, 150))
    size = (draw.randint(8, 150), draw.randint(8, 150))
    expected = processor()._resize_and_fill(picture, *size)
    assert np.array_equal(np.asarray(fitted(picture, size)), np.asarray(expected))


def test_filling_with_pictures_that_become_thin() -> None:
    """Never less than one pixel."""
    assert fitted(tiny.photo(400, 2), (16, 16)).size == (16, 16)
    assert fitted(tiny.photo(2, 400), (16, 16)).size == (16, 16)


@pytest.mark.parametrize("seed", range(60))
def test_crop_region(seed: int) -> None:
    draw = random.Random(seed)
    width, height = draw.randint(8, 200), draw.randint(8, 200)
    mask = Image.new(draw.choice(["L", "RGB"]), (width, height), 0)
    for _ in range(draw.randint(1, 3)):
        x, y = draw.randrange(width), draw.randrange(height)
        mask.paste((1, 1, 1) if mask.mode == "RGB" else 255, (x, y, x + draw.randint(1, 60), y + draw.randint(1, 60)))
    size = (draw.choice([64, 128, 512]), draw.choice([64, 96, 512]))
    pad = draw.choice([0, 4, 32, 500])
    box = crop_region(mask, *size, pad)
    assert box == processor().get_crop_region(mask, *size, pad)
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height


def test_crop_region_of_nothing() -> None:
    with pytest.raises(ValueError, match="black all over"):
        crop_region(Image.new("L", (8, 8)), 64, 64, 4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("box", [None, (10, 5, 60, 45), (0, 0, 70, 51), (5, 5, 25, 50)])
def test_overlay(mode: str, box: Any) -> None:
    original = veiled(PICTURE) if mode == "RGBA" else PICTURE.convert(mode)
    result = tiny.photo(64, 64, 5) if box else tiny.photo(70, 51, 5)
    for mask in (circle(70, 51), circle(70, 51, "RGB"), circle(70, 51, "1")):
        expected = processor().apply_overlay(mask, original, result, box)
        actual = overlay(result, original, mask, box)
        assert (actual.mode, actual.size) == (expected.mode, expected.size)
        assert np.array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("channels", [1, 3])
def test_output(kind: str, channels: int) -> None:
    x = torch.from_numpy(floats(2, channels, 6, 9)) * 2.6 - 1.3
    expected = processor().postprocess(x, kind)
    actual = to_output(x, kind)
    assert type(actual) is type(expected)
    if kind == "pil":
        assert [(one.mode, one.size) for one in actual] == [(one.mode, one.size) for one in expected]
    assert np.array_equal(np.stack([np.asarray(a) for a in actual]), np.stack([np.asarray(e) for e in expected]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_of_half_precision(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8).to(dtype)
    assert np.array_equal(np.asarray(to_output(x, "pil")[0]), np.asarray(processor().postprocess(x, "pil")[0]))
    assert to_output(x, "np").dtype == np.float32


BYTES = (floats(16, 24, 3) * 255).astype(np.uint8)
FULL = torch.from_numpy(BYTES.astype(np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1


@pytest.mark.parametrize(
    "given",
    [
        BYTES,
        BYTES.astype(np.int64),
        BYTES.astype(np.uint16) * 257,
        (BYTES.astype(np.uint16) * 257).astype(">u2"),
        (BYTES / 255).astype(">f8"),
        BYTES / np.float64(255),
        torch.from_numpy(BYTES).permute(2, 0, 1),
        torch.from_numpy(BYTES).permute(2, 0, 1).int(),
        torch.from_numpy(BYTES.astype(np.uint16) * 257).permute(2, 0, 1),
        (torch.from_numpy(BYTES).permute(2, 0, 1) / 255).double(),
        [BYTES, BYTES],
        Image.fromarray(BYTES),
        (BYTES,),
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_numbers_of_every_kind_are_the_same_picture(given: Any) -> None:
    x = pixels(given, multiple=8)
    assert torch.allclose(x, FULL.expand_as(x), atol=1e-6)


def test_half_precision_and_truth_values() -> None:
    half = pixels(torch.from_numpy(BYTES).permute(2, 0, 1).half() / 255, multiple=8)
    assert torch.allclose(half, FULL, atol=2e-3)
    for truth in (BYTES > 127, torch.from_numpy(BYTES).permute(2, 0, 1) > 127):
        assert set(pixels(truth, multiple=8).unique().tolist()) == {-1.0, 1.0}


def test_the_callers_numbers_are_left_alone() -> None:
    """Neither written to nor required to be writable."""
    frozen = floats(16, 16, 3)
    frozen.setflags(write=False)
    before = frozen.copy()
    pixels(frozen, multiple=8).mul_(0)
    assert np.array_equal(frozen, before)
    mask = torch.from_numpy(floats(1, 1, 16, 16))
    kept = mask.clone()
    pixels(mask, multiple=8, **MASKS)
    assert torch.equal(mask, kept)


def test_masks_of_any_numbers() -> None:
    """0 and 1, 0 and 255, truth values; colours become grey by their brightness."""
    pattern = np.zeros((16, 24), bool)
    pattern[4:9, 3:20] = True
    expected = torch.from_numpy(pattern).float()[None, None]
    colours = np.repeat(pattern[..., None], 3, -1)
    alpha = np.concatenate([colours, np.zeros((16, 24, 1), bool)], -1)
    for kind in (bool, np.uint8, np.int32, np.int64, np.float32, np.float64):
        for values in (pattern, pattern[..., None], pattern[None], colours, colours[None], alpha):
            assert torch.equal(pixels(values.astype(kind), multiple=8, **MASKS), expected)
    for kind in (np.uint8, np.int64):
        for values in (pattern, colours):
            assert torch.equal(pixels(values.astype(kind) * 255, multiple=8, **MASKS), expected)
    for tensor in (torch.from_numpy(pattern), torch.from_numpy(pattern)[None], torch.from_numpy(pattern)[None, None]):
        for kind in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16):
            assert torch.equal(pixels(tensor.to(kind), multiple=8, **MASKS), expected)
    red, green = np.zeros((2, 16, 24, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    assert pixels(red, multiple=8, **MASKS).max() == 0
    assert pixels(green, multiple=8, **MASKS).min() == 1
    assert torch.equal(pixels(red, multiple=8, **MASKS), pixels(Image.fromarray(red), multiple=8, **MASKS))


GREY = Image.linear_gradient("L").resize((24, 16))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "PA"])
def test_pictures_of_every_mode(mode: str) -> None:
    """An opaque picture is the same one in every mode that can hold it."""
    source = GREY.point(lambda v: 255 * (v > 99)) if mode == "1" else GREY
    if mode in ("I;16", "I"):
        wide = np.asarray(source).astype(np.uint16) * 257
        picture = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    else:
        picture = source.convert("RGB").convert(mode) if mode not in ("LA", "PA", "1") else source.convert(mode)
    assert picture.mode == mode
    x = pixels(picture, multiple=8)
    assert x.shape == (1, 3, 16, 24)
    tolerance = 2 / 255 * (40 if mode == "P" else 2)
    assert torch.allclose(x, pixels(source.convert("RGB"), multiple=8), atol=tolerance)
    assert torch.equal(x[:, :1].expand(-1, 3, -1, -1), x) or mode in ("P", "YCbCr", "CMYK", "PA")


def test_integers_of_no_known_range() -> None:
    small = Image.fromarray(np.asarray(GREY).astype(np.int32))
    assert small.mode == "I"
    assert torch.equal(pixels(small, multiple=8), pixels(GREY, multiple=8))
    assert torch.equal(pixels(small, multiple=8, **MASKS), pixels(GREY, multiple=8, **MASKS))
    wide = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    assert torch.equal(pixels(wide, multiple=8, **MASKS), pixels(GREY, multiple=8, **MASKS))


def test_transparency_lies_on_white() -> None:
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    keyed = Image.new("P", (16, 16), 0)
    keyed.putpalette([255, 0, 0] * 256)
    keyed.info["transparency"] = 0
    grey = Image.new("LA", (16, 16), (0, 0))
    for clear in (red, keyed, grey, np.asarray(red), np.asarray(red) / 255):
        assert pixels(clear, multiple=8).min() == 1
    for mixed in (half, np.asarray(half), [half], np.asarray(half)[None] / 255):
        colour = pixels(mixed, multiple=8)[0, :, 0, 0]
        assert torch.allclose(colour, torch.tensor([1.0, -0.004, -0.004]), atol=6e-3)


REFUSED: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "list of pictures is empty", []),
    (ValueError, "list of pictures is empty", ()),
    (ValueError, "NaN or infinity", np.full((16, 16, 3), np.nan)),
    (ValueError, "NaN or infinity", np.where(floats(16, 16, 3) > 0.9, np.inf, 0.5)),
    (ValueError, "NaN or infinity", np.where(floats(16, 16, 3) > 0.9, -np.inf, 0.5)),
    (ValueError, "NaN or infinity", np.where(floats(16, 16, 3) > 0.9, np.inf, -np.inf)),
    (ValueError, "NaN or infinity", np.full((16, 16, 3), 1e300)),
    (ValueError, "NaN or infinity", torch.full((3, 16, 16), float("nan"))),
    (ValueError, "NaN or infinity", [torch.zeros(3, 16, 16), torch.full((3, 16, 16), float("inf"))]),
    (ValueError, "from 0 to 255, which is not within 0..1 or -1..1", np.linspace(0, 255, 768).reshape(16, 16, 3)),
    (ValueError, "from 0 to 3, ", torch.linspace(0, 3, 768).reshape(3, 16, 16)),
    (ValueError, "from -127.5 to 127.5, ", (np.linspace(0, 255, 768) - 127.5).reshape(16, 16, 3)),
    (ValueError, "from 0 to 767, which is not within 0..255", np.arange(768).reshape(16, 16, 3)),
    (ValueError, "from -384 to 383, ", torch.arange(-384, 384).reshape(3, 16, 16)),
    (TypeError, "kind complex64", np.zeros((16, 16, 3), np.complex64)),
    (TypeError, "kind object", np.full((16, 16, 3), None)),
    (TypeError, "kind str", np.full((16, 16, 3), "a")),
    (TypeError, "kind complex64", torch.zeros(3, 16, 16, dtype=torch.complex64)),
    (ValueError, "has no pixels", np.zeros((0, 16, 3))),
    (ValueError, "has no pixels", torch.zeros(0, 3, 16, 16)),
    (ValueError, "the shape \\(16,\\)", np.zeros(16)),
    (ValueError, "the shape \\(\\)", torch.tensor(1.0)),
    (ValueError, "the shape \\(1, 2, 3, 16, 16\\)", torch.zeros(1, 2, 3, 16, 16)),
    (ValueError, "has 16 channels; 1 or 3", np.zeros((3, 16, 16))),
    (ValueError, "has 5 channels; 1 or 3", torch.zeros(5, 16, 16)),
    (ValueError, "has 2 channels; 1 or 3", np.zeros((16, 16, 2))),
    (ValueError, "has 4 channels; 1 or 3", torch.zeros(4, 16, 16)),
    (ValueError, "has 4 channels; 1 or 3", floats(16, 16, 4) - 0.5),
    (ValueError, "of one size", [np.zeros((16, 16, 3)), np.zeros((16, 24, 3))]),
    (ValueError, "of one size", [torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)]),
    (TypeError, "all of one kind", [PICTURE, floats(51, 70, 3)]),
    (TypeError, "all of one kind", [floats(51, 70, 3), PICTURE]),
    (TypeError, "not NoneType", None),
    (TypeError, "not int", 5),
    (TypeError, "not dict", {"image": PICTURE}),
    (TypeError, "not bytes", b"\x89PNG"),
    (TypeError, "not list", [[0.5, 0.5]]),
    (ValueError, "7 pixels is too small", tiny.photo(7, 64)),
    (ValueError, "0 pixels is too small", Image.new("RGB", (0, 0))),
    (ValueError, "4 pixels is too small", torch.zeros(3, 16, 4)),
    (ValueError, "mode F", Image.new("F", (16, 16), 0.5)),
    (FileNotFoundError, "^There is no picture nowhere.png\\.$", "nowhere.png"),
    (FileNotFoundError, "There is no picture", [PICTURE, Path("nowhere.png")]),
]


@pytest.mark.parametrize(("error", "says", "given"), REFUSED)
def test_what_is_no_picture(error: type[Exception], says: str, given: Any) -> None:
    with pytest.raises(error, match=says) as raised:
        pixels(given, multiple=8)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("has 2 channels; 1 would do", torch.zeros(1, 2, 16, 16)),
        ("from 0 to 255", np.linspace(0, 255, 256).reshape(16, 16)),
        ("from -1 to 1, which is not within 0..1", np.linspace(-1, 1, 256).reshape(16, 16).astype(np.int8)),
        ("NaN", np.full((16, 16), np.nan)),
    ],
)
def test_what_is_no_mask(says: str, given: Any) -> None:
    with pytest.raises(ValueError, match=says):
        pixels(given, multiple=8, **MASKS)


def test_arrays_are_neither_cropped_nor_filled() -> None:
    for options in (dict(crop=(0, 0, 8, 8)), dict(fill=True)):
        with pytest.raises(ValueError, match="PIL pictures"):
            pixels(floats(16, 16, 3), multiple=8, **options)


def test_paths(tmp_path: Path) -> None:
    """Strings and paths, alone, in lists and among pictures."""
    PICTURE.save(tmp_path / "a.png")
    x = pixels(PICTURE, multiple=8)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), [tmp_path / "a.png"]):
        assert torch.equal(pixels(given, multiple=8), x)
    assert torch.equal(pixels([PICTURE, tmp_path / "a.png"], multiple=8), x.repeat(2, 1, 1, 1))
    assert torch.equal(pixels([str(tmp_path / "a.png"), PICTURE], multiple=8), x.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pictures_are_turned_as_the_camera_says(turn: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / f"a.{ending}"
    PICTURE.save(file, exif=exif)
    assert read(file).size == (PICTURE.size if turn < 5 else PICTURE.size[::-1])
    expected = diffusers.utils.load_image(str(file))
    assert np.array_equal(np.asarray(read(file).convert("RGB")), np.asarray(expected))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} can't be read as a picture"):
        read(tmp_path)
    file = tmp_path / "a.png"
    PICTURE.save(file)
    whole = file.read_bytes()
    header = io.BytesIO(b"P6 3y 4 255\n")
    damaged = (b"", b"text", whole[:100], whole[:-60], whole[:40] + b"\xff" + whole[41:], header.getvalue())
    for content in (*damaged, whole[:33] + b"\0\0\0\1c.\0\0" + whole[41:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.png can't be read as a picture") as raised:
            read(file)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    """Whatever bytes are wrong: a picture or a ValueError."""
    draw = random.Random(seed)
    for ending in ("png", "jpg", "gif", "webp", "bmp", "ppm"):
        file = tmp_path / f"a.{ending}"
        PICTURE.save(file)
        whole = file.read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            for _ in range(draw.randint(1, 6)):
                content[draw.randrange(min(len(content), 300))] = draw.randrange(256)
            file.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert isinstance(read(file), Image.Image)
                except ValueError as error:
                    assert "can't be read as a picture" in str(error)


def test_same_size(tmp_path: Path) -> None:
    """Pictures and masks of every kind are compared; latents and what has no size are let through."""
    PICTURE.save(tmp_path / "a.png")
    image_like = [PICTURE, tmp_path / "a.png", str(tmp_path / "a.png"), floats(51, 70, 3), floats(2, 51, 70, 3)]
    image_like += [floats(51, 70), torch.zeros(3, 51, 70), torch.zeros(2, 3, 51, 70), [PICTURE, PICTURE]]
    good = [circle(70, 51), floats(51, 70), floats(51, 70, 1), floats(2, 51, 70), floats(2, 51, 70, 1)]
    good += [floats(51, 70, 3), torch.zeros(51, 70), torch.zeros(1, 51, 70), torch.zeros(2, 1, 51, 70)]
    bad = [circle(51, 70), floats(51, 71), floats(50, 70, 1), floats(2, 70, 51), torch.zeros(1, 52, 70)]
    bad += [torch.zeros(70, 51), torch.zeros(4, 51, 71)]
    for image in image_like:
        for mask in good:
            same_size(image, mask)
        for mask in bad:
            with pytest.raises(ValueError, match="image is 70 x 51 pixels but mask_image is"):
                same_size(image, mask)
    for latents in (torch.zeros(1, 4, 8, 8), torch.zeros(4, 8, 8), torch.zeros(2, 16, 8, 8), None, 3):
        same_size(latents, circle(64, 64))
    with pytest.raises(ValueError, match="70 x 51"):
        same_size([circle(8, 8), PICTURE], [circle(8, 8), circle(70, 52)])
    with pytest.raises(FileNotFoundError, match=r"nowhere.png"):
        same_size("nowhere.png", PICTURE)


@pytest.mark.parametrize("form", ["batch", "one", "list", "list of batches"])
def test_latents_are_no_pictures(form: str) -> None:
    """With the channels of x, a tensor or a list of them goes through unchanged, as with the peer."""
    vae = SimpleNamespace(config=Config(latent_channels=4, block_out_channels=(1, 1, 1, 1)))
    x = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(0)) * 5
    given = {"batch": x, "one": x[0], "list": list(x), "list of batches": [x[:1], x[1:]]}[form]
    expected = peers(given)
    space: Any = LatentSpace(vae)
    assert torch.equal(space.pixels(None, given), expected)
    run: Any = {"height": 72, "width": 80, "image": given, "mask_image": circle(80, 72)}
    assert torch.equal(space.masked_pixels(run)[0], expected)


CLIP: list[dict[str, Any]] = [
    {},
    dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 48}),
    dict(size=40, crop_size=32),
    dict(size={"height": 30, "width": 50}, crop_size={"height": 24, "width": 24}),
    dict(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 33}),
    dict(size={"shortest_edge": 40}, do_center_crop=False),
    dict(do_resize=False, crop_size={"height": 40, "width": 41}),
    dict(size=40, crop_size=32, resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3]),
    dict(size=40, crop_size=32, do_normalize=False),
    dict(size=40, crop_size=32, do_rescale=False, do_normalize=False),
]


@pytest.mark.parametrize("config", CLIP, ids=str)
@pytest.mark.parametrize("size", [(70, 51), (51, 70), (33, 33), (300, 41)])
def test_preparing_pictures_for_clip(config: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    peer = transformers.CLIPImageProcessorPil(**config)
    pictures = [tiny.photo(*size), tiny.photo(*size, seed=2).convert("L"), veiled(tiny.photo(*size))]
    expected = peer(pictures, return_tensors="pt").pixel_values.float()
    assert torch.allclose(CLIPImageProcessor(**config)(pictures), expected, atol=1e-5, rtol=1e-5)
    peer.save_pretrained(tmp_path)
    assert torch.allclose(CLIPImageProcessor.from_pretrained(tmp_path)(pictures), expected, atol=1e-5, rtol=1e-5)


def test_saving_the_preparation_for_clip(tmp_path: Path) -> None:
    ours = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    ours.save_pretrained(tmp_path)
    peer = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    x = ours([PICTURE])
    assert torch.allclose(x, peer([PICTURE], return_tensors="pt").pixel_values, atol=1e-5)
    assert torch.equal(CLIPImageProcessor.from_pretrained(tmp_path)([PICTURE]), x)
    assert torch.equal(CLIPImageProcessor.from_pretrained(tmp_path.parent, tmp_path.name)([PICTURE]), x)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_damaged_preparations_are_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json"):
        CLIPImageProcessor.from_pretrained(tmp_path)
