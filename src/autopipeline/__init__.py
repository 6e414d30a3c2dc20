"""autopipeline: any diffusion checkpoint, any task, the right pipeline, fast.

Importing this package imports next to nothing; names are looked up when they are used, and torch is imported when a
network is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from autopipeline.schedulers import HOMES as _SCHEDULERS

__version__ = "0.1.0"

_HOMES: dict[str, Sequence[str]] = {
    "autopipeline.auto": (
        "AutoPipeline",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
        "AutoPipelineForText2Image",
    ),
    "autopipeline.pipeline": ("DiffusionPipeline", "Output"),
    "autopipeline.selection": ("Explanation", "explain"),
    "autopipeline.errors": ("Cancelled", "CheckpointError", "NotFiniteError"),
    "autopipeline.models.unet": ("UNet2DConditionModel",),
    "autopipeline.models.controlnet": ("ControlNetModel", "MultiControlNetModel"),
    "autopipeline.models.controlnet_union": ("ControlNetUnionModel", "MultiControlNetUnionModel"),
    "autopipeline.models.bert": ("BertModel",),
    "autopipeline.models.multilingual_clip": ("MultilingualCLIP",),
    "autopipeline.models.prior_transformer": ("PriorTransformer",),
    "autopipeline.models.vq_model": ("VQModel",),
    "autopipeline.models.hunyuan": ("HunyuanDiT2DModel",),
    "autopipeline.models.auraflow": ("AuraFlowTransformer2DModel",),
    "autopipeline.models.cogview": ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    "autopipeline.models.chroma": ("ChromaTransformer2DModel",),
    "autopipeline.models.flux": ("FluxTransformer2DModel",),
    "autopipeline.models.flux2": ("Flux2Transformer2DModel",),
    "autopipeline.models.flux_controlnet": ("FluxControlNetModel", "FluxMultiControlNetModel"),
    "autopipeline.models.autoencoder_kl": ("AutoencoderKL",),
    "autopipeline.models.autoencoder_kl_flux2": ("AutoencoderKLFlux2",),
    "autopipeline.models.autoencoder_kl_qwenimage": ("AutoencoderKLQwenImage",),
    "autopipeline.models.qwenimage": (
        "QwenImageControlNetModel",
        "QwenImageMultiControlNetModel",
        "QwenImageTransformer2DModel",
    ),
    "autopipeline.models.autoencoder_tiny": ("AutoencoderTiny",),
    "autopipeline.models.autoencoder_dc": ("AutoencoderDC",),
    "autopipeline.models.gemma2": ("Gemma2Model", "GemmaModel"),
    "autopipeline.models.chatglm": ("ChatGLMModel",),
    "autopipeline.models.lumina": ("LuminaNextDiT2DModel",),
    "autopipeline.models.lumina2": ("Lumina2Transformer2DModel",),
    "autopipeline.models.ideogram4": ("Ideogram4PromptEnhancerHead", "Ideogram4Transformer2DModel"),
    "autopipeline.models.sana": ("SanaTransformer2DModel",),
    "autopipeline.models.clip": ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
    "autopipeline.models.ovis": ("OvisImageTransformer2DModel",),
    "autopipeline.models.kandinsky3": ("Kandinsky3UNet",),
    "autopipeline.models.glm_image": ("GlmImageTransformer2DModel",),
    "autopipeline.models.autoencoder_kl_qwenimage21": ("AutoencoderKLQwenImage21",),
    "autopipeline.models.qwenimage21": ("QwenImage21Transformer2DModel",),
    "autopipeline.models.krea2": ("Krea2Transformer2DModel",),
    "autopipeline.models.paella_vq": ("PaellaVQModel",),
    "autopipeline.models.stable_cascade": ("StableCascadeUNet",),
    "autopipeline.models.wuerstchen": ("WuerstchenDiffNeXt", "WuerstchenPrior"),
    "autopipeline.models.nucleus_moe": ("NucleusMoEImageTransformer2DModel",),
    "autopipeline.models.prx": ("PRXTransformer2DModel",),
    "autopipeline.models.t5gemma": ("T5GemmaEncoder",),
    "autopipeline.models.pixart": ("PixArtTransformer2DModel",),
    "autopipeline.models.sd3": ("SD3ControlNetModel", "SD3MultiControlNetModel", "SD3Transformer2DModel"),
    "autopipeline.models.z_image": ("ZImageTransformer2DModel",),
    "autopipeline.models.z_image_controlnet": ("ZImageControlNetModel",),
    "autopipeline.models.t5": ("T5EncoderModel", "UMT5EncoderModel"),
    "autopipeline.text": (
        *("BertTokenizer", "CLIPTokenizer", "ChatGLMTokenizer", "GemmaTokenizer", "LlamaTokenizer", "T5Tokenizer"),
    ),
    "autopipeline.images": ("CLIPImageProcessor",),
    "autopipeline.loading.processors": ("Qwen2VLProcessor", "Qwen3VLProcessor"),
    **_SCHEDULERS,
}
_PUBLIC = {name: home for home, listed in _HOMES.items() for name in listed}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        found = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name.endswith("Pipeline"):
        found = _pipeline(name)
    else:
        raise AttributeError(f"module 'autopipeline' has no attribute {name!r}")
    globals()[name] = found
    return found


def _pipeline(name: str) -> Any:
    from autopipeline import names

    coordinates = names.built().get(name)
    if coordinates is None:
        if names.find(name) is not None:
            raise AttributeError(f"{name} is not built in this version of autopipeline")
        raise AttributeError(f"module 'autopipeline' has no attribute {name!r}")
    from autopipeline.pipeline import pipeline_class

    return pipeline_class(coordinates)


def __dir__() -> list[str]:
    from autopipeline import names

    return sorted([*_PUBLIC, *names.built(), "__version__"])
