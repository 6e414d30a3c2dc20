"""Coordinates and the public names of pipeline classes: the mapping, as rows. Imports no torch.

A name is stem + add-ons + task + "Pipeline"; the few that are not are spelled on their row. Keys, classes and the
order of rows are those that users of AutoPipeline know.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from autopipeline import families

TASKS = ("text2image", "image2image", "inpaint")
SUFFIXES = {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpaint"}
AUTO = {
    "text2image": "AutoPipelineForText2Image",
    "image2image": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
NOUNS = {"text2image": "text-to-image", "image2image": "image-to-image", "inpaint": "inpainting"}


class Spelling(NamedTuple):
    """What class names are made of."""

    stem: str
    addons: str  # in the order of the names
    endings: dict[str, str]  # by task, before "Pipeline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A key of the mapping: a family with some add-ons, and the class for each task that it has."""

    key: str
    family: str  # the key of the family without add-ons
    addons: frozenset[str]
    classes: dict[str, str]  # task -> class name
    spelling: Spelling | None = None  # how those are made; None where a family from elsewhere names them
    ours: tuple[str, ...] = ()  # tasks with names by the same rule, but of no class that others know
    whole: str | None = None  # of a part: the key that AutoPipeline takes in its place, "" where there is none

    @property
    def built(self) -> bool:
        """Whether this version can run it."""
        here = self.family in families.BUILT or self.family in families.external()
        return here and self.addons <= set(families.ADDONS.get(self.family, ()))


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a pipeline class stands: its row and its task."""

    row: Row
    task: str


_LETTERS = {"t": "text2image", "i": "image2image", "p": "inpaint"}


def _row(key: str, stem: str, tasks: str, addons: str = "", family: str = "", ours: str = "", **endings: str) -> Row:
    """A row; `endings` say what stands after stem and add-ons in the names of tasks where it is not the usual."""
    middle, every = "".join(addons.split()), [_LETTERS[letter] for letter in tasks + ours]
    spelling = Spelling(stem, addons, {task: endings.get(task, SUFFIXES[task]) for task in every})
    classes = {task: f"{stem}{middle}{spelling.endings[task]}Pipeline" for task in every}
    new = tuple(_LETTERS[letter] for letter in ours)
    return Row(
        key=key, family=family or key, addons=frozenset(addons.split()), classes=classes, spelling=spelling, ours=new
    )


def _combined(key: str, stem: str, tasks: str) -> Row:
    """A two-stage family: the class of both stages together."""
    return _row(key, stem, tasks, **{task: f"{ending}Combined" for task, ending in SUFFIXES.items()})


def _perturbed(row: Row) -> Row:
    """The row with PAG, which nobody else has classes for."""
    stem, addons, endings = row.spelling or Spelling("", "", {})
    letters = "".join(letter for letter, task in _LETTERS.items() if task in row.classes)
    return _row(f"{row.key}-pag", stem, "", f"{addons} PAG", row.family, ours=letters, **endings)


def _part(key: str, stem: str, tasks: str, whole: str = "", **endings: str) -> Row:
    """A stage that is a pipeline of its own, which DiffusionPipeline loads."""
    return replace(_row(key, stem, tasks, **endings), whole=whole)


_SD, _XL, _SD3 = "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"
_FLUX, _QWEN, _ZIMAGE = "Flux", "QwenImage", "ZImage"

_NAMED = (
    _row(_SD, "StableDiffusion", "tip"),
    _row(_XL, "StableDiffusionXL", "tip"),
    _row(_SD3, "StableDiffusion3", "tip"),
    _row("stable-diffusion-3-pag", "StableDiffusion3", "ti", "PAG", _SD3, ours="p"),
    _row("if", "IF", "tip", inpaint="Inpainting"),
    _row("hunyuan", "HunyuanDiT", "t", ours="ip"),
    _row("hunyuan-pag", "HunyuanDiT", "t", "PAG", "hunyuan", ours="ip"),
    _combined("kandinsky", "Kandinsky", "tip"),
    _combined("kandinsky22", "KandinskyV22", "tip"),
    _row("kandinsky3", "Kandinsky3", "ti", ours="p"),
    _row("stable-diffusion-controlnet", "StableDiffusion", "tip", "ControlNet", _SD),
    _row("stable-diffusion-xl-controlnet", "StableDiffusionXL", "tip", "ControlNet", _XL),
    _row("stable-diffusion-xl-controlnet-union", "StableDiffusionXL", "tip", "ControlNetUnion", _XL),
    _row(
        "stable-diffusion-3-controlnet",
        "StableDiffusion3",
        "tp",
        "ControlNet",
        _SD3,
        ours="i",
        inpaint="Inpainting",
    ),
    _row("stable-diffusion-3-controlnet-pag", "StableDiffusion3", "", "ControlNet PAG", _SD3, ours="tip"),
    _combined("wuerstchen", "Wuerstchen", "t"),
    _combined("cascade", "StableCascade", "t"),
    _row("lcm", "LatentConsistencyModel", "ti", ours="p"),
    _row("pixart-alpha", "PixArtAlpha", "t", ours="ip"),
    _row("pixart-alpha-pag", "PixArtAlpha", "", "PAG", "pixart-alpha", ours="tip"),
    _row("pixart-sigma", "PixArtSigma", "t", ours="ip"),
    _row("sana", "Sana", "t", ours="ip"),
    _row("sana-pag", "Sana", "t", "PAG", "sana", ours="ip"),
    _row("stable-diffusion-pag", "StableDiffusion", "tip", "PAG", _SD),
    _row("stable-diffusion-controlnet-pag", "StableDiffusion", "tp", "ControlNet PAG", _SD, ours="i"),
    _row("stable-diffusion-xl-pag", "StableDiffusionXL", "tip", "PAG", _XL),
    _row("stable-diffusion-xl-controlnet-pag", "StableDiffusionXL", "ti", "ControlNet PAG", _XL, ours="p"),
    _row("pixart-sigma-pag", "PixArtSigma", "t", "PAG", "pixart-sigma", ours="ip"),
    _row("auraflow", "AuraFlow", "t", ours="ip"),
    _row("flux", _FLUX, "tip"),
    _row("flux-control", _FLUX, "tip", "Control", "flux"),
    _row("flux-controlnet", _FLUX, "tip", "ControlNet", "flux"),
    _row("flux-kontext", "FluxKontext", "ti", image2image=""),
    _row("flux2-klein", "Flux2Klein", "ti", image2image=""),
    _row("flux2", "Flux2", "ti", image2image=""),
    _row("ideogram4", "Ideogram4", "t", ours="ip"),
    _row("krea2", "Krea2", "t", ours="ip"),
    _row("lumina", "Lumina", "t", ours="ip"),
    _row("lumina2", "Lumina2", "t", ours="ip"),
    _row("chroma", "Chroma", "tip"),
    _row("cogview3", "CogView3Plus", "t"),
    _row("cogview4", "CogView4", "t", ours="ip"),
    _row("glm_image", "GlmImage", "t"),
    _row("helios", "Helios", "t"),
    _row("helios-pyramid", "HeliosPyramid", "t"),
    _row("cogview4-control", "CogView4", "t", "Control", "cogview4"),
    _row("nucleusmoe-image", "NucleusMoEImage", "t", ours="ip"),
    _row("qwenimage", _QWEN, "tip"),
    _row("qwenimage21", "QwenImage21", "t"),
    _row("qwenimage-controlnet", _QWEN, "t", "ControlNet", "qwenimage"),
    _row("qwenimage-edit", "QwenImageEdit", "ip", image2image=""),
    _row("qwenimage-edit-plus", "QwenImageEditPlus", "i", image2image=""),
    _row("qwenimage-layered", "QwenImageLayered", "i", image2image=""),
    _row("z-image", _ZIMAGE, "tip"),
    _row("z-image-controlnet", _ZIMAGE, "t", "ControlNet", "z-image"),
    _row("z-image-controlnet-inpaint", _ZIMAGE, "t", "ControlNet Inpaint", "z-image"),
    _row("z-image-omni", "ZImageOmni", "t"),
    _row("ovis", "OvisImage", "t", ours="ip"),
    _row("prx", "PRX", "t", ours="ip"),
    _row("kolors", "Kolors", "ti", ours="p"),
    _row("kolors-pag", "Kolors", "t", "PAG", "kolors", ours="ip"),
)
"""The rows that others have, and those of ours beside one of these."""


def _with_pag() -> Iterable[Row]:
    """Every family with attention, and each of its add-ons, can have it perturbed."""
    there = {(row.family, row.addons) for row in _NAMED}
    for row in _NAMED:
        able = "PAG" in families.ADDONS.get(row.family, ()) and "PAG" not in row.addons
        if able and (row.family, row.addons | {"PAG"}) not in there:
            yield _perturbed(row)


ROWS = (*_NAMED, *_with_pag())
"""The mapping."""

PARTS = (
    _part("kandinsky-decoder", "Kandinsky", "tip", whole="kandinsky"),
    _part("kandinsky-prior", "KandinskyPrior", "t"),
    _part("kandinsky22-decoder", "KandinskyV22", "tip", whole="kandinsky22"),
    _part("kandinsky22-prior", "KandinskyV22Prior", "t"),
    _part("wuerstchen-decoder", "WuerstchenDecoder", "t", whole="wuerstchen"),
    _part("wuerstchen-prior", "WuerstchenPrior", "t"),
    _part("cascade-decoder", "StableCascadeDecoder", "t", whole="cascade"),
    _part("cascade-prior", "StableCascadePrior", "t"),
    _part(
        "if-superresolution",
        "IF",
        "tip",
        text2image="SuperResolution",
        image2image="Img2ImgSuperResolution",
        inpaint="InpaintingSuperResolution",
    ),
)
"""Stages alone. AutoPipeline goes from a decoder to the whole; of the others it knows nothing, as users expect."""


@cache
def rows() -> tuple[Row, ...]:
    """All rows: the mapping, then families from other packages."""
    known = {row.key for row in ROWS}
    return ROWS + tuple(_external(key) for key in families.external() if key not in known)


def _external(key: str) -> Row:
    family = families.load(key)
    classes = {task: f"{family.stem}{SUFFIXES[task]}Pipeline" for task in family.tasks}
    return Row(key=key, family=key, addons=frozenset(), classes=classes)


@cache
def _by_name() -> dict[str, Coordinates]:
    found: dict[str, Coordinates] = {}
    for row in (*rows(), *PARTS):
        for task, name in row.classes.items():
            found.setdefault(name, Coordinates(row, task))
    return found


def find(class_name: object) -> Coordinates | None:
    """The coordinates of a pipeline class by its name; None for one that no row has."""
    return _by_name().get(class_name) if isinstance(class_name, str) else None


def whole(here: Coordinates | None) -> Coordinates | None:
    """Where AutoPipeline goes on from a class: its own coordinates, or those of the family that it is a part of."""
    if here is None or here.row.whole is None:
        return here
    return next((Coordinates(row, here.task) for row in rows() if row.key == here.row.whole), None)


def select(class_name: object, task: str, add: Iterable[str] = (), drop: Iterable[str] = ()) -> Coordinates:
    """The class for `task`, with add-ons added or dropped, that belongs to the checkpoint's class.

    Raises ValueError in the words that users of AutoPipeline know, followed by lines that say what would work.
    """
    here = whole(find(class_name))
    if here is None:
        raise ValueError(_unknown(class_name, task))
    add = frozenset(add)
    replaced = {"Control", "ControlNet", "ControlNetUnion"} if {"ControlNet", "ControlNetUnion"} & add else set[str]()
    wanted = (here.row.addons - frozenset(drop) - replaced) | add
    for row in (here.row, *rows()):
        if row.family == here.row.family and row.addons == wanted and task in row.classes:
            return Coordinates(row, task)
    raise ValueError(_no_task(class_name, here.row, task, wanted))


def _unknown(class_name: object, task: str) -> str:
    lines = [f"AutoPipeline can't find a pipeline linked to {class_name} for None"]
    lines.append(
        "No task: the class is not one that makes pictures from prompts, or one that this version does not know."
    )
    near = difflib.get_close_matches(str(class_name), _by_name(), 1, 0.85)
    if near:
        lines.append(f"The nearest name that is known: {near[0]}.")
    return "\n".join([*lines, _supporting(task)])


def _no_task(class_name: object, row: Row, task: str, addons: frozenset[str]) -> str:
    have = ", ".join(NOUNS[name] for name in row.classes)
    plus = f" with {' and '.join(sorted(addons))}" if addons else ""
    return "\n".join(
        [
            f"AutoPipeline can't find a pipeline linked to {class_name} for {row.key}",
            f"This checkpoint supports {have}, not {NOUNS[task]}{plus}.",
            _supporting(task),
        ]
    )


def _supporting(task: str) -> str:
    able = [row.key for row in rows() if task in row.classes and row.built and not row.addons]
    return f"Families that support {NOUNS[task]} in this version: {', '.join(able)}."


def built() -> dict[str, Coordinates]:
    """Class name -> coordinates of every pipeline class that this version can run."""
    return {name: here for name, here in _by_name().items() if here.row.built}
