"""The layout of x: sizes, noise shapes, and the way from pictures to x and back."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images
from autopipeline.errors import NotFiniteError
from autopipeline.stage import Random, Run


class Space(Protocol):
    """Where x lives."""

    @property
    def channels(self) -> int:
        """Channels of the latents that a caller may give."""
        ...

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """The shape of x for pictures of height x width pixels."""
        ...

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard-normal noise of the shape of x, drawn in the order that users of the seed know."""
        ...

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), as a caller gives them, in the layout of x; what has it already is left alone."""
        ...

    def pixels(self, run: Run, image: Any) -> Tensor:
        """The caller's pictures as (B, 3, H, W) in -1..1; latents with their channels (B, C, h, w) are left alone."""
        ...

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """The caller's `image` and `mask_image`, of one size: (B, 3, H, W) in -1..1 and (B, 1, H, W), 0 or 1."""
        ...

    def mask(self, mask: Tensor) -> Tensor:
        """A mask of the size of x."""
        ...

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """Pictures to x, sampled (without random numbers: the most likely one).

        `plain` leaves out the statistics that some autoencoders give.
        """
        ...

    def decode(self, x: Tensor) -> Tensor:
        """X to pictures, about -1..1."""
        ...

    def preview(self, x0: Tensor) -> Tensor:
        """A cheap look at the pictures; none (0, 3, H, W) where x shows none."""
        ...


class LatentSpace(NamedTuple):
    """The latents of an autoencoder."""

    vae: Any  # AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny or AutoencoderDC
    upcast: bool = False  # compute in float32 where the autoencoder asks for it (`force_upcast`)
    patch: int = 1  # sides are multiples of so many latents
    shifted: bool = True  # by the autoencoder's `shift_factor`, where it has one
    made: tuple[int, int] | None = None  # height and width that pictures are made at, whatever is asked for

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        config = self.vae.config
        return int(config["latent_channels"] if "latent_channels" in config else config["z_dim"])

    @property
    def factor(self) -> int:
        """Pixels of the picture for each latent, along one side."""
        return factor(self.vae)

    @property
    def multiple(self) -> int:
        """Sides of pictures are multiples of so many pixels."""
        return self.factor * self.patch

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, C, H / factor, W / factor)."""
        height, width = self.made or (height, width)
        return run.batch, self.channels, height // self.factor, width // self.factor

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as it is."""
        return random.normal(shape, dtype=dtype, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def pixels(self, run: Run, image: Any) -> Tensor:
        """Pictures of any kind, at the call's size if it has one; rounded down to multiples of the factor."""
        latents = self._given(image)
        if latents is not None:
            return latents
        return images.pixels(image, run.get("height"), run.get("width"), multiple=self.multiple)

    def _given(self, image: Any) -> Tensor | None:
        """Latents that the caller gives for a picture: a tensor with their channels, or a list of such."""
        many: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        if not all(isinstance(x, Tensor) and x.ndim in (3, 4) and x.shape[-3] == self.channels for x in many):
            return None
        return torch.cat([x if x.ndim == 4 else x[None] for x in many]).float() if many else None

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """Picture and mask, both cropped around the mask if `padding_mask_crop` is given, at the size of the result."""
        height, width, image = run["height"], run["width"], run["image"]
        box = crop_box(run)
        fit: dict[str, Any] = {"crop": box, "fill": box is not None, "multiple": self.multiple}
        latents = self._given(image)
        pixels = images.pixels(image, height, width, **fit) if latents is None else latents
        return pixels, images.pixels(run["mask_image"], height, width, signed=False, grey=True, binary=True, **fit)

    def mask(self, mask: Tensor) -> Tensor:
        """Nearest neighbours at the size of the latents."""
        return functional.interpolate(mask, size=(mask.shape[-2] // self.factor, mask.shape[-1] // self.factor))

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """A sample of the posterior (with its draw), scaled; an autoencoder without doubt gives its one answer."""
        vae = self._computing(always=True)
        posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype))
        x = posterior.mode()
        if random is not None and posterior.std is not None:
            x = posterior.sample(random.like(posterior.mean))
        x = x - self._shift
        scale, shift = self._scale or 1.0, None if plain and self._scale else self._statistics(x)
        return x * scale if shift is None else (x - shift[0]) * scale / shift[1]

    def decode(self, x: Tensor) -> Tensor:
        """Pictures; raises NotFiniteError, naming the autoencoder, where they are not finite."""
        vae = self._computing()
        scale, shift = self._scale or 1.0, self._statistics(x)
        z = x / scale if shift is None else x * shift[1] / scale + shift[0]
        z = z + self._shift
        pictures = vae.decode(z.to(device=vae.device, dtype=vae.dtype))
        if not torch.isfinite(pictures).all():
            raise NotFiniteError("The vae gave NaN or infinity while decoding; float16 is too narrow for some of them.")
        return pictures

    def preview(self, x0: Tensor) -> Tensor:
        """A cheap look at the pictures: latents averaged to at most 16 a side, then decoded."""
        window = max(1, -(-max(x0.shape[-2:]) // 16))
        return self.decode(functional.avg_pool2d(x0, window, ceil_mode=True))

    @property
    def _shift(self) -> float:
        """The mean of all latents, where the autoencoder names one."""
        return (self.vae.config.get("shift_factor") or 0.0) if self.shifted else 0.0

    @property
    def _scale(self) -> float | None:
        """How latents are stretched; None where the statistics alone say it."""
        return self.vae.config.get("scaling_factor")

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return None
        return x.new_tensor(mean).view(1, -1, 1, 1), x.new_tensor(std).view(1, -1, 1, 1)

    def _computing(self, always: bool = False) -> Any:
        """The autoencoder, or a float32 copy of it: the one that others may be using is not touched."""
        narrow = self.vae.dtype == torch.float16 or (always and self.vae.dtype != torch.float32)
        if self.upcast and narrow and self.vae.config.get("force_upcast", False):
            return copy.deepcopy(self.vae).float()
        return self.vae


class Packed(NamedTuple):
    """Latents in patches of 2 x 2, row by row: (B, h / 2 * w / 2, 4 C), as transformers take them."""

    latents: LatentSpace
    height: int  # h, w of the latents
    width: int
    patch: int = 2  # what says 2 here

    @property
    def channels(self) -> int:
        """C."""
        return self.latents.channels

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, h / 2 * w / 2, 4 C)."""
        patch = self.patch
        return run.batch, self.height // patch * (self.width // patch), patch**2 * self.channels

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as latents, packed then."""
        full = (shape[0], self.channels, self.height, self.width)
        return self.pack(random.normal(full, dtype=dtype, device=device))

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), or one frame (B, 1, C, h, w) of a film, to (B, h / 2 * w / 2, 4 C)."""
        if latents.ndim == 5:
            latents = latents.flatten(1, 2)
        if latents.ndim != 4:
            return latents
        patches = latents.unflatten(2, (-1, self.patch)).unflatten(4, (-1, self.patch))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        """And back."""
        patch = self.patch
        patches = x.unflatten(1, (self.height // patch, self.width // patch)).unflatten(3, (-1, patch, patch))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def pixels(self, run: Run, image: Any) -> Tensor:
        """As for the latents."""
        return self.latents.pixels(run, image)

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """As for the latents."""
        return self.latents.masked_pixels(run)

    def mask(self, mask: Tensor) -> Tensor:
        """A mask for every channel, packed."""
        return self.pack(self.latents.mask(mask).expand(-1, self.channels, -1, -1).contiguous())

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """As for the latents, packed."""
        return self.pack(self.latents.encode(pixels, random, plain))

    def decode(self, x: Tensor) -> Tensor:
        """Unpacked, then as for the latents."""
        return self.latents.decode(self.unpack(x))

    def preview(self, x0: Tensor) -> Tensor:
        """Unpacked, then as for the latents."""
        return self.latents.preview(self.unpack(x0))


class VectorSpace(NamedTuple):
    """Embeddings, one a picture: (B, D), or (B, D, h, w). There is no way from pictures to them or back."""

    channels: int  # D
    times: int = 1  # rows a picture: such as one of the prompt, and then one of the negative prompt
    sides: tuple[int, ...] = ()  # h and w, of embeddings that have places

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B * times, D, *sides)."""
        return run.batch * self.times, self.channels, *self.sides

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as it is."""
        return random.normal(shape, dtype=dtype, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        """The embeddings themselves."""
        return latents

    def preview(self, x0: Tensor) -> Tensor:
        """Nothing to see."""
        return x0.new_zeros(0, 3, 1, 1)

    def pixels(self, run: Run, image: Any) -> Tensor:
        """Never asked for."""
        raise TypeError("Embeddings are not made from pictures here.")

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """Never asked for."""
        raise TypeError("Embeddings have no mask.")

    def mask(self, mask: Tensor) -> Tensor:
        """Never asked for."""
        raise TypeError("Embeddings have no mask.")

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """Never asked for."""
        raise TypeError("Embeddings are not made from pictures here.")

    def decode(self, x: Tensor) -> Tensor:
        """Never asked for."""
        raise TypeError("Embeddings are no pictures; a decoder makes them.")


class Patches(NamedTuple):
    """Patches of 2 x 2 latents, row by row: (B, h / 2 * w / 2, 4 C), each channel normalised by the autoencoder's `bn`.

    `channels_first`: a patch lists all places of the first channel, then of the second, and noise is drawn that way,
    (B, 4 C, h / 2, w / 2). Else it lists all channels of the first place, and noise is drawn patch by patch.
    """

    packed: Packed
    channels_first: bool = True

    @property
    def channels(self) -> int:
        """4 C."""
        return 4 * self.packed.channels

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, h / 2 * w / 2, 4 C)."""
        return self.packed.shape(run, height, width)

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn in patches."""
        if self.channels_first:
            shape = (shape[0], shape[2], self.packed.height // 2, self.packed.width // 2)
        return self.pack(random.normal(shape, dtype=dtype, device=device))

    def pack(self, latents: Tensor) -> Tensor:
        """(B, 4 C, h / 2, w / 2) to (B, h / 2 * w / 2, 4 C)."""
        return latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents

    def unpack(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the autoencoder has them."""
        mean, std = self.packed.latents.vae.statistics(x)
        x = x * std + mean
        return self.packed.unpack(x if self.channels_first else x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2))

    def pixels(self, run: Run, image: Any) -> Tensor:
        """As for the latents."""
        return self.packed.pixels(run, image)

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """As for the latents."""
        return self.packed.masked_pixels(run)

    def mask(self, mask: Tensor) -> Tensor:
        """A mask for every latent, in patches."""
        return self._ordered(self.packed.mask(mask))

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """As for the latents, in patches, normalised; of whatever size the pictures are."""
        x = self._ordered(self.packed.encode(pixels, random, plain))
        mean, std = self.packed.latents.vae.statistics(x)
        return (x - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        """As for the latents."""
        return self.packed.latents.decode(self.unpack(x))

    def preview(self, x0: Tensor) -> Tensor:
        """As for the latents."""
        return self.packed.latents.preview(self.unpack(x0))

    def _ordered(self, x: Tensor) -> Tensor:
        """Patches that list channel by channel, in this space's own order."""
        return x if self.channels_first else x.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


def factor(vae: Any) -> int:
    """Pixels of the picture for each latent, along one side; 8 without an autoencoder."""
    if vae is None:
        return 8
    config = vae.config
    widths = config.get("block_out_channels") or config.get("dim_mult") or config["encoder_block_out_channels"]
    return 2 ** (len(widths) - 1)


def crop_box(run: Run) -> tuple[int, int, int, int] | None:
    """The part of the picture that `padding_mask_crop` selects: left, top, right, bottom in pixels."""
    pad = run.get("padding_mask_crop")
    return None if pad is None else images.crop_region(run["mask_image"], run["width"], run["height"], pad)
