"""The families. This file is the registry; it imports no family, so that names can be listed without torch."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from autopipeline import addons

if TYPE_CHECKING:
    from autopipeline.stage import Family

BUILT = {
    "stable-diffusion": "autopipeline.families.stable_diffusion",
    "stable-diffusion-xl": "autopipeline.families.stable_diffusion_xl",
    "stable-diffusion-3": "autopipeline.families.stable_diffusion_3",
    "if": "autopipeline.families.deepfloyd_if",
    "if-superresolution": "autopipeline.families.deepfloyd_if:SUPERRESOLUTION",
    "lcm": "autopipeline.families.lcm",
    "flux": "autopipeline.families.flux",
    "flux2": "autopipeline.families.flux2",
    "flux2-klein": "autopipeline.families.flux2_klein",
    "ideogram4": "autopipeline.families.ideogram4",
    "flux-kontext": "autopipeline.families.flux_kontext",
    "chroma": "autopipeline.families.chroma",
    "auraflow": "autopipeline.families.auraflow",
    "cogview3": "autopipeline.families.cogview3",
    "cogview4": "autopipeline.families.cogview4",
    "ovis": "autopipeline.families.ovis",
    "prx": "autopipeline.families.prx",
    "krea2": "autopipeline.families.krea2",
    "nucleusmoe-image": "autopipeline.families.nucleus_moe",
    "glm_image": "autopipeline.families.glm_image",
    "hunyuan": "autopipeline.families.hunyuan",
    "kandinsky": "autopipeline.families.kandinsky",
    "kandinsky-decoder": "autopipeline.families.kandinsky:DECODER",
    "kandinsky-prior": "autopipeline.families.kandinsky:PRIOR",
    "kandinsky22": "autopipeline.families.kandinsky22",
    "kandinsky22-decoder": "autopipeline.families.kandinsky22:DECODER",
    "kandinsky22-prior": "autopipeline.families.kandinsky22:PRIOR",
    "sana": "autopipeline.families.sana",
    "pixart-alpha": "autopipeline.families.pixart_alpha",
    "pixart-sigma": "autopipeline.families.pixart_sigma",
    "qwenimage": "autopipeline.families.qwenimage",
    "qwenimage-edit": "autopipeline.families.qwenimage_edit",
    "qwenimage-edit-plus": "autopipeline.families.qwenimage_edit_plus",
    "qwenimage21": "autopipeline.families.qwenimage21",
    "qwenimage-layered": "autopipeline.families.qwenimage_layered",
    "z-image": "autopipeline.families.z_image",
    "z-image-omni": "autopipeline.families.z_image_omni",
    "lumina": "autopipeline.families.lumina",
    "lumina2": "autopipeline.families.lumina2",
    "kolors": "autopipeline.families.kolors",
    "kandinsky3": "autopipeline.families.kandinsky3",
    "wuerstchen": "autopipeline.families.wuerstchen",
    "wuerstchen-decoder": "autopipeline.families.wuerstchen:DECODER",
    "wuerstchen-prior": "autopipeline.families.wuerstchen:PRIOR",
    "cascade": "autopipeline.families.stable_cascade",
    "cascade-decoder": "autopipeline.families.stable_cascade:DECODER",
    "cascade-prior": "autopipeline.families.stable_cascade:PRIOR",
}
"""Family key -> the module whose FAMILY it is, or "module:NAME" of a family beside it."""

ADDONS = dict.fromkeys(BUILT, ("PAG",)) | {
    "cogview4": ("Control", "PAG"),
    "flux": ("Control", "ControlNet", "PAG"),
    "qwenimage": ("ControlNet", "PAG"),
    "stable-diffusion": ("ControlNet", "PAG"),
    "stable-diffusion-xl": ("ControlNet", "ControlNetUnion", "PAG"),
    "stable-diffusion-3": ("ControlNet", "PAG"),
    "z-image": ("ControlNet", "Inpaint", "PAG"),
}
"""Family key -> its add-ons. All networks here have attention that can be perturbed."""


@cache
def external() -> dict[str, str]:
    """Families from other packages: entry points of the group `autopipeline.families`, key = module."""
    return {point.name: point.value for point in entry_points(group="autopipeline.families")}


@cache
def load(key: str, wanted: frozenset[str] = frozenset()) -> Family:
    """The family of that key, with the add-ons that are wanted."""
    module = BUILT.get(key) or external().get(key)
    if module is None:
        raise KeyError(key)
    home, _, name = module.partition(":")
    return addons.attach(getattr(importlib.import_module(home), name or "FAMILY"), wanted)
