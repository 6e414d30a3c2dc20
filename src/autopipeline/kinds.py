"""What the arguments of a call may be: one sentence for whatever they are not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

INFINITE = math.inf


class Number(NamedTuple):
    """A number in a range, ends included."""

    least: float = -INFINITE
    most: float = INFINITE
    whole: bool = False
    optional: bool = False

    def refused(self, value: Any) -> str | None:
        """What it has to be, if the value is not that."""
        if value is None and self.optional:
            return None
        kind = Integral if self.whole else Real
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if fits and math.isfinite(value) and self.least <= value <= self.most:  # type: ignore[arg-type]
            return None
        return f"{'a whole number' if self.whole else 'a number'}{self._range()}"

    def _range(self) -> str:
        if self.least == -INFINITE:
            return ""
        return f" of at least {self.least:g}" if self.most == INFINITE else f" from {self.least:g} to {self.most:g}"


_SIZE = Number(1, whole=True, optional=True)
_SHARE = Number(0, 1, optional=True)

NUMBERS: dict[str, Number] = {
    "height": _SIZE,
    "width": _SIZE,
    "num_images_per_prompt": Number(1, whole=True),
    "original_inference_steps": _SIZE,
    "guidance_scale": Number(),
    "prior_guidance_scale": Number(),
    "decoder_guidance_scale": Number(),
    "guidance_rescale": Number(0, 1),
    "true_cfg_scale": Number(),
    "max_sequence_length": Number(1, whole=True),
    "tokenizer_max_length": _SIZE,
    "mu": Number(optional=True),
    "std": Number(0),
    "skip_layer_guidance_scale": Number(),
    "skip_layer_guidance_start": Number(),
    "skip_layer_guidance_stop": Number(),
    "max_area": Number(1, whole=True),
    "layers": Number(1, whole=True),
    "eta": Number(0),
    "clip_skip": Number(0, whole=True, optional=True),
    "strength": Number(0, 1),
    "aesthetic_score": Number(),
    "negative_aesthetic_score": Number(),
    "denoising_start": _SHARE,
    "denoising_end": _SHARE,
    "padding_mask_crop": Number(0, whole=True, optional=True),
    "pag_scale": Number(0),
    "pag_adaptive_scale": Number(0),
    "noise_level": Number(0, whole=True),
    "reuse": Number(0, 1, optional=True),
}
PAIRS = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crops_coords_top_left", "negative_crops_coords_top_left")
RANKS = {"image_embeds": 2, "prompt_embeds": 3, "prompt_embeds_2": 3, "pooled_prompt_embeds": 2}
SHAPES = {2: "width", 3: "tokens, width", 4: "tokens, layers, width"}
TENSORS = ("latents", "masked_image_latents", "controlnet_pooled_projections")


def check(args: Mapping[str, Any], prompts: int, optional: Collection[str] = (), rank: int = 3) -> None:
    """Raise TypeError or ValueError for an argument of a kind or range that can't work.

    `optional` ones may be None; `rank`: how many dimensions the embeddings of a family have.
    """
    for name in NUMBERS:
        if name in args and not (args[name] is None and name in optional):
            check_one(name, args[name])
    for name in (*PAIRS, *CROPS):
        if name in args and not _is_pair(args[name], optional=name in PAIRS):
            raise _wrong(name, args[name], "a pair of numbers")
    for name in TENSORS:
        if args.get(name) is not None and not isinstance(args[name], Tensor):
            raise _wrong(name, args[name], "a torch.Tensor")
    for name, usual in RANKS.items():
        if name == "image_embeds" and "images" in args:
            continue  # pictures beside the prompts, not one for each
        for full in (name, f"negative_{name}"):
            if args.get(full) is not None:
                _check_embeds(full, args[full], rank if name == "prompt_embeds" else usual, prompts)
    for name in ("timesteps", "sigmas", "skip_guidance_layers", "guidance_schedule"):
        if args.get(name) is not None and not _is_row(args[name]):
            raise _wrong(name, args[name], "a list of numbers")
    _check_objects(args)


def check_one(name: str, value: Any) -> None:
    """Raise TypeError or ValueError for one number that can't work."""
    wanted = NUMBERS[name].refused(value)
    if wanted is not None:
        raise _wrong(name, value, wanted)


def _check_objects(args: Mapping[str, Any]) -> None:
    generator = args["generator"]
    many = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in many):
        raise _wrong("generator", generator, "a torch.Generator, or a list of them")
    if args["cancel"] is not None and not hasattr(args["cancel"], "is_set"):
        raise _wrong("cancel", args["cancel"], "a threading.Event")
    chosen = args["scheduler"]
    if chosen is not None and not isinstance(chosen, str) and not hasattr(chosen, "solver"):
        raise _wrong("scheduler", chosen, "a scheduler, or the name of one")
    if args["callback_on_step_end"] is not None and not callable(args["callback_on_step_end"]):
        raise _wrong("callback_on_step_end", args["callback_on_step_end"], "a function")


def seeds(seed: Any) -> int | list[int]:
    """A seed or one for each picture, as plain numbers."""
    many = list(seed) if isinstance(seed, list | tuple) else [seed]
    for one in many:
        if isinstance(one, bool) or not isinstance(one, Integral) or not -(2**63) <= int(one) < 2**64:
            raise _wrong("seed", one, "a whole number of at most 64 bits, or a list of them")
    plain = [int(one) for one in many]
    return plain if isinstance(seed, list | tuple) else plain[0]


def _wrong(name: str, value: Any, wanted: str) -> TypeError | ValueError:
    said = repr(value) if isinstance(value, Real | str | list | tuple | None) else type(value).__name__
    error = ValueError if isinstance(value, Real | list | tuple) and not isinstance(value, bool) else TypeError
    return error(f"{name}={said if len(said) < 80 else type(value).__name__} has to be {wanted}.")


def _is_pair(value: Any, optional: bool) -> bool:
    if value is None:
        return optional
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(isinstance(one, Real) and math.isfinite(one) for one in value)


def _is_row(value: Any) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return isinstance(value, list | tuple) and all(isinstance(one, Real) for one in value)


def _check_embeds(name: str, value: Any, rank: int, prompts: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _wrong(name, value, "a torch.Tensor of floats")
    if value.ndim != rank or len(value) != prompts:
        shape = f"({prompts}, {SHAPES[rank]})"
        raise ValueError(f"{name} has the shape {tuple(value.shape)}; here it has to be {shape}.")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has NaN or infinity in it.")
