"""Language models in miniature, of transformers' own classes, and a tokenizer of Qwen's kind for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tiny

TOLD = (
    "system user assistant Describe the image by detailing the color, quantity, text, shape, size, texture, spatial "
    "relationships of the objects and background: shape, size, texture, quantity, text, You are an image generation "
    "assistant. Follow the user's prompt literally. Pay careful attention to spatial layout: objects described as on "
    "the left must appear on the left, on the right on the right. Match exact object counts and assign colors to the "
    "correct objects. a red cat, sun on the sea\nassistant\nassistant think"
)
"""Words that have to be single tokens, as pipelines cut off a fixed number of them."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VIDEO = "<|video_pad|>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@cache
def _learned() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TOLD], trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def qwen_tokenizer() -> Any:
    """Qwen's tokenizer: bytes and the words above."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _learned()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], VIDEO, "<think>", "</think>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


SHAPE = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=1200,
)


def qwen3(seed: int) -> Any:
    """Qwen 3."""
    from transformers import Qwen3Config, Qwen3Model

    return tiny.redraw(Qwen3Model(Qwen3Config(**SHAPE)), seed)


Z_IMAGE = dict(
    in_channels=4, dim=30, n_layers=3, n_refiner_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=24, axes_dims=[2, 4, 4]
)
Z_CONTROL = dict(
    control_in_dim=9,
    control_layers_places=[0, 2],
    control_refiner_layers_places=[0, 1],
    add_control_noise_refiner="control_noise_refiner",
    n_refiner_layers=2,
    dim=30,
    n_heads=3,
    n_kv_heads=3,
)


def z_controlnet(**changes: Any) -> Any:
    """A ControlNet for Z-Image in miniature."""
    import diffusers

    return tiny.redraw(diffusers.ZImageControlNetModel(**Z_CONTROL | changes), 5)


def z_image(folder: Any, cls: str = "ZImagePipeline", shift: dict[str, Any] | None = None, **parts: Any) -> Any:
    """Z-Image in miniature, 8 pixels a token."""
    import diffusers

    pipe = getattr(diffusers, cls)(
        transformer=tiny.redraw(diffusers.ZImageTransformer2DModel(**Z_IMAGE), 1),
        vae=tiny.redraw(diffusers.AutoencoderKL(**tiny.FLUX_VAE), 2),
        text_encoder=qwen3(3),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift or dict(shift=3.0)),
        **parts,
    )
    pipe.save_pretrained(folder)
    return folder


def qwen3_vl(seed: int, generating: bool = False, patch: int = 8) -> Any:
    """Qwen 3 VL; `generating` keeps its language-model head."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

    tokenizer = qwen_tokenizer()
    names = {"image_token_id": SPECIAL[5], "video_token_id": VIDEO}
    names |= {"vision_start_token_id": SPECIAL[3], "vision_end_token_id": SPECIAL[4]}
    config = Qwen3VLConfig(
        text_config=SHAPE | dict(rope_parameters=dict(mrope_section=[2, 1, 1], rope_type="default", rope_theta=1e6)),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            depth=1,
            out_hidden_size=SHAPE["hidden_size"],
            patch_size=patch,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
    )
    return tiny.redraw((Qwen3VLForConditionalGeneration if generating else Qwen3VLModel)(config), seed)


OVIS = dict(
    in_channels=16,
    out_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=24,
    axes_dims_rope=(2, 2, 4),
)


def ovis(folder: Any) -> Any:
    """Ovis-Image in miniature, 4 pixels a token."""
    import diffusers

    pipe = diffusers.OvisImagePipeline(
        transformer=tiny.redraw(diffusers.OvisImageTransformer2DModel(**OVIS), 1),
        vae=tiny.redraw(diffusers.AutoencoderKL(**tiny.FLUX_VAE), 2),
        text_encoder=qwen3(3),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT),
    )
    pipe.save_pretrained(folder)
    return folder


KREA2 = dict(
    in_channels=16,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    timestep_embed_dim=20,
    text_hidden_dim=24,
    num_text_layers=2,
    text_num_attention_heads=4,
    text_num_key_value_heads=2,
    text_intermediate_size=28,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=2,
    axes_dims_rope=(2, 2, 4),
)


def krea2(folder: Any, **parts: Any) -> Any:
    """Krea 2 in miniature, 8 pixels a token."""
    import diffusers

    import qwenimage

    pipe = diffusers.Krea2Pipeline(
        transformer=tiny.redraw(diffusers.Krea2Transformer2DModel(**KREA2), 1),
        vae=tiny.redraw(diffusers.AutoencoderKLQwenImage(**qwenimage.VAE), 2),
        text_encoder=qwen3_vl(3),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT),
        text_encoder_select_layers=(0, 2),
        **parts,
    )
    pipe.save_pretrained(folder)
    return folder


NUCLEUS = dict(
    in_channels=16,
    out_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(2, 2, 4),
    mlp_ratio=6.0,
    dense_moe_strategy="leave_first_block_dense",
    num_experts=3,
    moe_intermediate_dim=20,
    capacity_factors=[0.0, 2.0, 1.0, 1.5],
)


def nucleus_moe(folder: Any) -> Any:
    """NucleusMoE-Image in miniature, 8 pixels a token; with a tokenizer, as its processor needs torchvision."""
    import diffusers

    import qwenimage

    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=tiny.redraw(diffusers.NucleusMoEImageTransformer2DModel(**NUCLEUS), 1),
        vae=tiny.redraw(diffusers.AutoencoderKLQwenImage(**qwenimage.VAE), 2),
        text_encoder=qwen3_vl(3, generating=True),
        processor=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT),
    )
    pipe.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["processor"] = ["transformers", "Qwen2Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


GEMMA = dict(
    vocab_size=400,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    query_pre_attn_scalar=6,
    sliding_window=3,
    attn_logit_softcapping=0.8,
)


def t5gemma(seed: int) -> Any:
    """The encoder of T5Gemma, found under its own name, where the peer looks for it."""
    import transformers
    from diffusers.pipelines.prx import T5GemmaEncoder as Peer  # reads the part of the configuration that it needs
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaConfig, T5GemmaEncoder, T5GemmaModuleConfig

    if not hasattr(transformers, "T5GemmaEncoder"):
        transformers.T5GemmaEncoder = Peer
    config = T5GemmaConfig(encoder=T5GemmaModuleConfig(**GEMMA), is_encoder_decoder=False)
    encoder = tiny.redraw(T5GemmaEncoder(config.encoder), seed)
    encoder.config = config  # what is saved, and looked for when loading
    return encoder


PRX = dict(
    in_channels=4,
    patch_size=2,
    context_in_dim=24,
    hidden_size=24,
    mlp_ratio=2.0,
    num_heads=3,
    depth=2,
    axes_dim=[4, 4],
)


def prx(folder: Any, **changes: Any) -> Any:
    """PRX in miniature, 8 pixels a token; `changes` are keys of the transformer's config, or default_sample_size."""
    import diffusers

    own = {key: changes.pop(key) for key in ("default_sample_size",) if key in changes}
    pipe = diffusers.PRXPipeline(
        transformer=tiny.redraw(diffusers.PRXTransformer2DModel(**PRX | changes), 1),
        vae=tiny.redraw(diffusers.AutoencoderKL(**tiny.XL_VAE | dict(shift_factor=0.1)), 2),
        text_encoder=t5gemma(3),
        tokenizer=tiny.gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **own,
    )
    pipe.tokenizer.model_max_length = 40
    pipe.save_pretrained(folder)
    file = Path(folder, "tokenizer", "tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"padding_side": "right"}), "utf-8")
    return folder


GLM_MARKS = dict(image_token="<|image|>", grid_bos_token="<sop>", grid_eos_token="<eop>")
GLM_CHAT = (
    "[gMASK]{% for message in messages %}<|user|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|img|><|image|><|eoi|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
GLM_CODES = 64
GLM_IMAGE = dict(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=3,
    text_embed_dim=24,
    time_embed_dim=16,
    condition_dim=8,
    prior_vq_quantizer_codebook_size=GLM_CODES,
)


def glm_tokenizer() -> Any:
    """GLM-Image's tokenizer: tokens of pictures first, then words and letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    codes = [f"<|{k}|>" for k in range(GLM_CODES)] + ["<|img|>", "<|eoi|>"]
    letters = [chr(k) for k in range(32, 127)]
    words = [*codes, "<pad>", "<unk>", "[gMASK]", "<|user|>", *GLM_MARKS.values(), *letters]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|img|>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=dict(GLM_MARKS),
    )
    tokenizer.add_special_tokens(dict(additional_special_tokens=["[gMASK]", "<|user|>", "<|eoi|>"]))
    tokenizer.chat_template = GLM_CHAT
    return tokenizer


def glm_speaker(seed: int, tokenizer: Any) -> Any:
    """GLM-Image's language model."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    text = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    text |= dict(vocab_size=len(tokenizer), vision_vocab_size=GLM_CODES + 1, pad_token_id=tokenizer.pad_token_id)
    text |= dict(
        eos_token_id=GLM_CODES + 1, rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e4)
    )
    config = GlmImageConfig(
        text_config=text,
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=16, image_size=64),
        vq_config=dict(embed_dim=8, num_embeddings=GLM_CODES, latent_channels=16),
        image_start_token_id=GLM_CODES,
        image_end_token_id=GLM_CODES + 1,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    model = tiny.redraw(GlmImageForConditionalGeneration(config), seed)
    drawn = dict(do_sample=True, temperature=0.9, top_p=0.75, top_k=40, eos_token_id=GLM_CODES + 1)
    model.generation_config.update(**drawn, pad_token_id=tokenizer.pad_token_id)
    return model


def glm_image(folder: Any) -> Any:
    """GLM-Image in miniature, 16 pixels a patch and 32 a token."""
    import diffusers
    from transformers import ByT5Tokenizer
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    tokenizer = glm_tokenizer()
    stretched = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 0.9], scaling_factor=0.3)
    stretched |= dict(block_out_channels=[8] * 4, norm_num_groups=4)
    stretched |= dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    pipe = diffusers.GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=None,
        text_encoder=tiny.t5_encoder(4, vocab_size=384),
        vision_language_encoder=glm_speaker(5, tokenizer),
        transformer=tiny.redraw(diffusers.GlmImageTransformer2DModel(**GLM_IMAGE), 1),
        vae=tiny.redraw(diffusers.AutoencoderKL(**tiny.FLUX_VAE | stretched), 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )
    pipe.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "processor")
    GlmImageImageProcessorPil(patch_size=16, merge_size=1, temporal_patch_size=1).save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["processor"] = ["transformers", "GlmImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


def siglip2(seed: int) -> Any:
    """SigLIP 2's vision encoder."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, patch_size=16)
    return tiny.redraw(Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)), seed)


def z_image_omni(folder: Any) -> Any:
    """Z-Image-Omni in miniature."""
    import diffusers
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    pipe = diffusers.ZImageOmniPipeline(
        transformer=tiny.redraw(diffusers.ZImageTransformer2DModel(**Z_IMAGE, siglip_feat_dim=24), 1),
        vae=tiny.redraw(diffusers.AutoencoderKL(**tiny.FLUX_VAE), 2),
        text_encoder=qwen3(3),
        tokenizer=qwen_tokenizer(),
        siglip=siglip2(6),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)
    return folder
