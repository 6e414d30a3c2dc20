"""Z-Image-Omni (Tongyi 2025): Z-Image in sight of any number of pictures, which stand between the pieces of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopipeline.families import z_image
from autopipeline.stage import Slot, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

SLOTS = {
    **{name: z_image.SLOTS[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")},
    "siglip": Slot(("Siglip2VisionModel",), optional=True),
    "siglip_processor": Slot(
        ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil"), optional=True
    ),
}
TASK = TaskRow(task=Text2Image, params=dict(image=None) | z_image.params({}), whole=("image",))
