"""Qwen-Image in miniature: its autoencoder, its text encoder with eyes, and the checkpoints of its families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import language
import tiny

TRANSFORMER = dict(
    patch_size=2,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(2, 4, 6),
)
VAE = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[False, True],
    latents_mean=[0.3, -0.2, 0.1, 0.0],
    latents_std=[1.2, 0.8, 1.0, 0.6],
)


def text_encoder(seed: int) -> Any:
    """Qwen 2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, special = language.qwen_tokenizer(), language.SPECIAL
    names = {"vision_start": special[3], "vision_end": special[4], "image": special[5], "video": language.VIDEO}
    rope = dict(mrope_section=[2, 1, 1], rope_type="default", rope_theta=1e6)
    text = {name: value for name, value in language.SHAPE.items() if name != "head_dim"}
    config = Qwen2_5_VLConfig(
        text_config=text | dict(rope_parameters=rope),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            depth=2,
            out_hidden_size=24,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        tie_word_embeddings=True,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return tiny.redraw(Qwen2_5_VLForConditionalGeneration(config), seed)


def checkpoint(folder: Path, cls: str = "QwenImagePipeline", **changes: Any) -> Path:
    """8 pixels a token; `changes` are keys of the transformer's config."""
    import diffusers

    layered = "Layered" in cls
    parts: dict[str, Any] = dict(processor=None) if "Edit" in cls or layered else {}
    more: dict[str, Any] = {}
    if layered:  # the peer takes pictures of as many channels as latents have for latents
        more = dict(
            input_channels=4, z_dim=5, latents_mean=[*VAE["latents_mean"], 0.2], latents_std=[*VAE["latents_std"], 1.1]
        )
        changes = dict(in_channels=20, out_channels=5) | changes
    pipe = getattr(diffusers, cls)(
        transformer=tiny.redraw(diffusers.QwenImageTransformer2DModel(**TRANSFORMER | changes), 1),
        vae=tiny.redraw(diffusers.AutoencoderKLQwenImage(**VAE | more), 2),
        text_encoder=text_encoder(3),
        tokenizer=language.qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT, shift_terminal=0.02),
        **parts,
    )
    pipe.save_pretrained(folder)
    if parts:
        _add_processor(folder)
    return folder


VAE21 = dict(
    base_dim=8,
    decoder_base_dim=4,
    z_dim=6,
    dim_mult=[1, 2, 2, 4, 4],
    num_res_blocks=1,
    latents_mean=[0.3, -0.2, 0.1, 0.0, 0.2, -0.1],
    latents_std=[1.2, 0.8, 1.0, 0.6, 1.1, 0.9],
)
TRANSFORMER21 = dict(
    in_channels=6,
    out_channels=6,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    context_in_dim=24,
    axes_dims_rope=(2, 4, 6),
)


def peers_processor21() -> Any:
    """Transformers' own of Qwen 3-VL, put together without the part for films, which wants torchvision."""
    from transformers import Qwen3VLProcessor

    made, tokenizer = object.__new__(Qwen3VLProcessor), language.qwen_tokenizer()
    made.image_processor, made.tokenizer, made.video_processor = image_processor(16), tokenizer, None
    made.image_token, made.video_token, made.chat_template = "<|image_pad|>", "<|video_pad|>", language.CHAT
    for name, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>")):
        setattr(made, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    for name in ("start", "end"):
        setattr(made, f"vision_{name}_token", f"<|vision_{name}|>")
        setattr(made, f"vision_{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>"))
    return made


def checkpoint21(folder: Path, **changes: Any) -> Path:
    """Qwen-Image 2.1 in miniature, 16 pixels a token; `changes` are keys of the transformer's config."""
    import diffusers

    pipe = diffusers.QwenImage21Pipeline(
        transformer=tiny.redraw(diffusers.QwenImage21Transformer2DModel(**TRANSFORMER21 | changes), 1),
        vae=tiny.redraw(diffusers.AutoencoderKLQwenImage21(**VAE21), 2),
        text_encoder=language.qwen3_vl(3, generating=True, patch=16),
        processor=peers_processor21(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT),
    )
    pipe.processor = None
    pipe.register_modules(processor=None)
    pipe.save_pretrained(folder)
    _add_processor(folder, 16, "Qwen3VLProcessor")
    return folder


def controlnet(layers: int = 2, seed: int = 5) -> Any:
    """A ControlNet for that."""
    import diffusers

    return tiny.redraw(diffusers.QwenImageControlNetModel(**TRANSFORMER | dict(num_layers=layers)), seed)


def _add_processor(folder: Path, patch: int = 14, cls: str = "Qwen2VLProcessor") -> None:
    """What the peer can't make without torchvision."""
    from autopipeline.loading import processors

    getattr(processors, cls)(image_processor(patch), language.qwen_tokenizer()).save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["processor"] = ["transformers", cls]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def image_processor(patch: int = 14) -> Any:
    """That of Qwen 2-VL, for few pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84, patch_size=patch)
