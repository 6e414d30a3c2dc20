"""From a call's keywords to runs: which task, which defaults, which random numbers, one run or several."""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from autopipeline import kinds, prompts
from autopipeline.names import NOUNS, TASKS
from autopipeline.stage import Family, Random, Run

OURS: dict[str, Any] = {"seed": None, "cancel": None, "scheduler": None, "reuse": None}
"""Parameters that every pipeline has beyond those of its family."""

INPUTS = {"image2image": "image", "inpaint": "mask_image"}
BATCHED = ("image", "original_image", "mask_image", "masked_image_latents", "control_mask", *prompts.TEXTS)
EMBEDS = [
    *("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("prompt_attention_mask", "negative_prompt_attention_mask", "latents"),
    *("prompt_embeds_mask", "negative_prompt_embeds_mask", "image_embeds", "negative_image_embeds"),
    *("image_embeddings", "prompt_embeds_pooled", "negative_prompt_embeds_pooled"),
    *("prompt_embeds_2", "negative_prompt_embeds_2"),
    *("prompt_attention_mask_2", "negative_prompt_attention_mask_2"),
]
NUMBERS = [  # and other single values
    "height",
    "width",
    "num_inference_steps",
    "original_inference_steps",
    "guidance_scale",
    "prior_num_inference_steps",
    "prior_guidance_scale",
    "decoder_guidance_scale",
    "guidance_rescale",
    "true_cfg_scale",
    "cfg_normalization",
    "cfg_truncation",
    "max_sequence_length",
    "mu",
    "std",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_start",
    "skip_layer_guidance_stop",
    "max_area",
    "layers",
    "resolution",
    "output_resolution",
    "eta",
    "clip_skip",
    "strength",
    "aesthetic_score",
    "negative_aesthetic_score",
    "denoising_start",
    "denoising_end",
    "padding_mask_crop",
    "pag_scale",
    "pag_adaptive_scale",
    "noise_level",
    "scheduler",
    "reuse",
]
SEQUENCES = [
    "skip_guidance_layers",
    "timesteps",
    "prior_timesteps",
    "decoder_timesteps",
    "sigmas",
    "guidance_schedule",
    "original_size",
    "target_size",
    "crops_coords_top_left",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
]


class Bound(NamedTuple):
    """A call's task and its complete arguments."""

    task: str
    args: dict[str, Any]


def signature(family: Family, task: str) -> inspect.Signature:
    """The signature of a pipeline's call: its own task's parameters, then those of the tasks that it can turn to."""
    kind = inspect.Parameter
    own = family.tasks[task].params
    parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    parameters += [kind(name, kind.POSITIONAL_OR_KEYWORD, default=default) for name, default in own.items()]
    names = list(own)
    for other in richer(family, task):
        names += [name for name in family.tasks[other].params if name not in names]
    keyword_only = names[len(own) :] + list(OURS)
    parameters += [kind(name, kind.KEYWORD_ONLY, default=None) for name in keyword_only]
    return inspect.Signature(parameters)


def richer(family: Family, task: str) -> list[str]:
    """The tasks whose inputs include those of `task`, itself first."""
    return [name for name in TASKS[TASKS.index(task) :] if name in family.tasks]


def bind(family: Family, task: str, class_name: str, given: dict[str, Any]) -> Bound:
    """Find the task from the inputs and fill in its defaults; TypeError for anything it has no use for."""
    allowed = richer(family, task)
    _refuse_unknown(family, allowed, class_name, given)
    chosen = task
    for other in allowed:
        if given.get(family.tasks[other].trigger or INPUTS.get(other, "")) is not None:
            chosen = other
    params = family.tasks[chosen].params
    surplus = [name for name, value in given.items() if name not in params and name not in OURS and value is not None]
    if surplus:
        raise TypeError(_surplus(family, chosen, surplus[0]))
    missing = [name for name in _needed(family, chosen) if given.get(name) is None]
    if missing:
        raise ValueError(f"{NOUNS[chosen].capitalize()} needs {' and '.join(missing)}.")
    return Bound(
        chosen, {**params, **OURS, **{name: value for name, value in given.items() if name in params or name in OURS}}
    )


def _needed(family: Family, task: str) -> Sequence[str]:
    own = family.tasks[task].needs
    return own if own is not None else {"image2image": ["image"], "inpaint": ["image", "mask_image"]}.get(task, [])


def _refuse_unknown(family: Family, allowed: list[str], class_name: str, given: Iterable[str]) -> None:
    known = [*OURS, *dict.fromkeys(name for task in allowed for name in family.tasks[task].params)]
    for name in given:
        if name not in known:
            raise TypeError(f"{class_name} has no parameter {name!r}{nearest(name, known)}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest one that is known."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _surplus(family: Family, task: str, name: str) -> str:
    able = [NOUNS[other] for other, row in family.tasks.items() if name in row.params]
    needs = {"image2image": "image", "inpaint": "image and mask_image"}
    how = next((needs[other] for other, row in family.tasks.items() if name in row.params and other in needs), "")
    needed = f", which needs {how}" if how else ""
    return f"{name} has no effect on {NOUNS[task]} (it belongs to {' and '.join(able)}{needed})."


def runs(family: Family, bound: Bound, settings: Mapping[str, Any]) -> list[Run]:
    """One run, or one for each prompt where an argument is given item by item."""
    kinds.check_one("num_images_per_prompt", bound.args["num_images_per_prompt"])
    row = family.tasks[bound.task]
    optional = [name for name, default in row.params.items() if default is None]
    return [_run(args, settings, optional, family.embeds_rank) for args in _items(bound.args, row.whole)]


def _run(args: dict[str, Any], settings: Mapping[str, Any], optional: Sequence[str], rank: int) -> Run:
    count = prompts.count(args)
    kinds.check(args, count, optional, rank)
    batch = count * args["num_images_per_prompt"]
    random = Random(_generators(args, batch), batch, apart=args["seed"] is not None)
    run = Run(args, settings, count, batch, random, guidance_scale=args["guidance_scale"] or 0.0)
    run.cancel = args["cancel"] or threading.Event()
    return run


def _generators(args: Mapping[str, Any], batch: int) -> torch.Generator | list[torch.Generator] | None:
    """The caller's generators, or one for each picture from `seed`: an int counts up, a list names each."""
    seed, generator = args["seed"], args["generator"]
    if seed is None:
        return list(generator) if isinstance(generator, tuple) else generator
    if generator is not None:
        raise ValueError("Pass either seed or generator, not both.")
    seed = kinds.seeds(seed)
    if isinstance(seed, int):
        seed = [seed + k for k in range(batch)]
    if len(seed) != batch:
        raise ValueError(f"{len(seed)} seeds were given for {batch} pictures; give one, or one for each picture.")
    return [torch.Generator().manual_seed(s) for s in seed]


def _items(args: dict[str, Any], whole: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The arguments of each run: all at once, or prompt by prompt if any number is given as a list.

    Lists that are named in `whole` belong to every prompt.
    """
    listed = {name: args[name] for name in args if name not in whole and _is_per_item(name, args[name])}
    if not listed:
        yield args
        return
    count = prompts.count(args)
    single = isinstance(args.get("prompt"), str)
    count = len(next(iter(listed.values()))) if single else count
    for name, values in listed.items():
        if not len(values) or len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} prompts.")
    if isinstance(args["generator"], torch.Generator):
        raise ValueError(f"With {next(iter(listed))} given item by item, pass seed= or a list of generators.")
    for k in range(count):
        yield _item(args, listed, k, count) | {name: args[name] for name in whole}


def _item(args: dict[str, Any], listed: Mapping[str, Sequence[Any]], k: int, count: int) -> dict[str, Any]:
    one = dict(args)
    for name, value in args.items():
        if name in listed:
            one[name] = listed[name][k]
        elif name in BATCHED or name.startswith("control_image"):
            one[name] = _part(value, k, count)
        elif name in EMBEDS and isinstance(value, torch.Tensor) and len(value) == count:
            one[name] = value[k : k + 1]
    per = args["num_images_per_prompt"]
    if isinstance(args.get("latents"), torch.Tensor) and len(args["latents"]) == count * per:
        one["latents"] = args["latents"][k * per : (k + 1) * per]
    if args["seed"] is not None and not isinstance(args["seed"], list | tuple):
        one["seed"] = kinds.seeds(args["seed"]) + k * per  # type: ignore[operator]
    for name in ("seed", "generator"):
        if isinstance(args[name], list | tuple):
            one[name] = list(args[name][k * per : (k + 1) * per])
    return one


def _part(value: Any, k: int, count: int) -> Any:
    """The k-th prompt's part of texts or pictures: an item of a list, a picture of a batch; else all of it."""
    if isinstance(value, list | tuple) and len(value) == count:
        return value[k]
    if getattr(value, "ndim", 0) == 4 and len(value) == count:
        return value[k : k + 1]
    return value


def _extent(picture: Any) -> tuple[int, ...] | None:
    """What tells sizes apart: that of a PIL picture, or the shape of numbers; None for what has neither."""
    return tuple(picture.shape) if hasattr(picture, "shape") else getattr(picture, "size", None)


def _is_per_item(name: str, value: Any) -> bool:
    """Whether a list is one item a prompt; pairs and schedules are lists themselves, so there a list of lists is."""
    if name in NUMBERS:
        return isinstance(value, list | tuple)
    if name in SEQUENCES:
        return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    if name == "image" and isinstance(value, list):
        extents = {_extent(picture) for picture in value}
        return len(extents) > 1 and None not in extents
    return False
