"""Tiny checkpoints with random weights, saved by the peer in its own layout, for tests to load with both libraries."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
)
XL_UNET = UNET | dict(
    sample_size=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    cross_attention_dim=48,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 24,
)
VAE = dict(
    sample_size=64,
    block_out_channels=(8, 8, 16, 16),
    norm_num_groups=4,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
XL_VAE = VAE | dict(
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    scaling_factor=0.13025,
)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def redraw(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights under which every parameter matters (fresh networks have zeros and ones)."""
    random = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, part in network.named_modules() if "Norm" in type(part).__name__}
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim < 2:
                weight.copy_(0.1 * noise + (name in norms))
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return network.eval()


def tokenizer_files(folder: Path) -> Path:
    """A CLIP tokenizer of single bytes and a few words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    vocab = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in ("red", "cat", "sun"):
        merges += [f"{word[0]} {word[1]}", f"{word[:2]} {word[2]}</w>"]
        vocab += [word[:2], f"{word}</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocab)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    special = dict(
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")
    config = special | dict(tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def text_encoder(seed: int, projection: bool = False, **changes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, projection_dim=24)
    config = CLIPTextConfig(vocab_size=520, bos_token_id=518, eos_token_id=2, **sizes | changes)
    return redraw((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
PIECES += [(f"▁{word}", -4.0 - k / 100) for k, word in enumerate(("a", "the", "red", "cat", "sun", "sea", "on"))]
PIECES += [(chr(letter), -9.0) for letter in range(33, 127)]


def t5_tokenizer(length: int = 77) -> Any:
    """A T5 tokenizer of a few words and letters."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast(
        vocab=PIECES, extra_ids=0, additional_special_tokens=["<extra_id_0>"], model_max_length=length
    )


def t5_encoder(seed: int, cls: str = "T5", **changes: Any) -> Any:
    """T5 1.1 in miniature, or UMT5."""
    import transformers

    sizes = dict(vocab_size=112, d_model=24, d_kv=6, d_ff=40, num_heads=3, num_layers=3)
    config = getattr(transformers, f"{cls}Config")(
        **dict(feed_forward_proj="gated-gelu", is_encoder_decoder=False) | sizes | changes
    )
    return redraw(getattr(transformers, f"{cls}EncoderModel")(config), seed)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tokenizer_files(folder / ".tokenizer"))


def stable_diffusion(folder: Path, cls: str = "StableDiffusionPipeline", **changes: Any) -> Path:
    """Stable Diffusion 1 in miniature; `changes` are keys of the U-Net's config, or scheduler=(class, config)."""
    import diffusers

    name, config = changes.pop("scheduler", ("PNDMScheduler", dict(skip_prk_steps=True, steps_offset=1)))
    pipe = getattr(diffusers, cls)(
        unet=redraw(diffusers.UNet2DConditionModel(**UNET | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**VAE), 2),
        text_encoder=text_encoder(3),
        tokenizer=_tokenizer(folder),
        scheduler=getattr(diffusers, name)(**BETAS | config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    tokenizer_files(folder / "tokenizer")
    return folder


def stable_diffusion_xl(folder: Path, cls: str = "StableDiffusionXLPipeline", **changes: Any) -> Path:
    """Stable Diffusion XL in miniature; `changes` are keys of the U-Net's config."""
    import diffusers

    pipe = getattr(diffusers, cls)(
        unet=redraw(diffusers.UNet2DConditionModel(**XL_UNET | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=text_encoder(3),
        text_encoder_2=text_encoder(4, projection=True, hidden_act="gelu"),
        tokenizer=_tokenizer(folder),
        tokenizer_2=_tokenizer(folder),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )
    pipe.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer_files(folder / name)
    return folder


SD3 = dict(
    sample_size=16,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=60,
    caption_projection_dim=24,
    pooled_projection_dim=36,
    pos_embed_max_size=24,
)
SD3_VAE = XL_VAE | dict(
    latent_channels=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
)


def stable_diffusion_3(folder: Path, shift: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Stable Diffusion 3 in miniature; `changes` are keys of the transformer's config, `shift` of the scheduler's."""
    import diffusers

    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=redraw(diffusers.SD3Transformer2DModel(**SD3 | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**SD3_VAE), 2),
        text_encoder=text_encoder(3, projection=True, projection_dim=12),
        text_encoder_2=text_encoder(4, projection=True, hidden_act="gelu"),
        text_encoder_3=t5_encoder(5, d_model=60),
        tokenizer=_tokenizer(folder),
        tokenizer_2=_tokenizer(folder),
        tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**shift or dict(shift=3.0)),
    )
    pipe.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer_files(folder / name)
    return folder


FLUX = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(2, 4, 6),
)
FLUX_VAE = XL_VAE | dict(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False)
FLUX_SHIFT = dict(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=128)


def flux(folder: Path, cls: str = "FluxPipeline", **changes: Any) -> Path:
    """Flux in miniature, 8 pixels a token; `changes` are keys of the transformer's config."""
    import diffusers

    config = FLUX | dict(pooled_projection_dim=24, guidance_embeds=True) | changes
    pipe = getattr(diffusers, cls)(
        transformer=redraw(diffusers.FluxTransformer2DModel(**config), 1),
        vae=redraw(diffusers.AutoencoderKL(**FLUX_VAE), 2),
        text_encoder=text_encoder(3),
        text_encoder_2=t5_encoder(4),
        tokenizer=_tokenizer(folder),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SHIFT if config["guidance_embeds"] else {}),
    )
    pipe.save_pretrained(folder)
    tokenizer_files(folder / "tokenizer")
    return folder


def chroma(folder: Path) -> Path:
    """Chroma in miniature."""
    import diffusers

    small = dict(approximator_num_channels=16, approximator_hidden_dim=20, approximator_layers=2)
    pipe = diffusers.ChromaPipeline(
        transformer=redraw(diffusers.ChromaTransformer2DModel(**FLUX | small), 1),
        vae=redraw(diffusers.AutoencoderKL(**FLUX_VAE), 2),
        text_encoder=t5_encoder(4),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
    )
    pipe.save_pretrained(folder)
    return folder


def llama_tokenizer(length: int = 64, **changes: Any) -> Any:
    """Llama's tokenizer as AuraFlow has it: bytes, letters and a few words, ended by nothing."""
    from transformers import LlamaTokenizer

    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("r", "e"), ("▁", "re"), ("▁re", "d"), ("s", "u"), ("su", "n")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(letter) for letter in range(33, 127)] + [left + right for left, right in merges]
    options = dict(pad_token="</s>", padding_side="right", add_bos_token=False) | changes
    vocab = {token: k for k, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=merges, model_max_length=length, **options)


AURAFLOW = dict(
    sample_size=16,
    num_mmdit_layers=2,
    num_single_dit_layers=1,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=24,
    caption_projection_dim=24,
    pos_embed_max_size=13 * 13,
)


def auraflow(folder: Path) -> Path:
    """AuraFlow in miniature, 8 pixels a token."""
    import diffusers

    pipe = diffusers.AuraFlowPipeline(
        transformer=redraw(diffusers.AuraFlowTransformer2DModel(**AURAFLOW), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=t5_encoder(4, "UMT5", vocab_size=400),
        tokenizer=llama_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.save_pretrained(folder)
    return folder


COGVIEW = dict(
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=3,
    text_embed_dim=24,
    time_embed_dim=12,
    condition_dim=6,
    pos_embed_max_size=13,
    sample_size=16,
)


def cogview3(folder: Path) -> Path:
    """CogView3-Plus in miniature, 8 pixels a token."""
    import diffusers

    pipe = diffusers.CogView3PlusPipeline(
        transformer=redraw(diffusers.CogView3PlusTransformer2DModel(**COGVIEW), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=t5_encoder(4),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=4.0,
        ),
    )
    pipe.save_pretrained(folder)
    return folder


def glm_tokenizer(length: int = 64) -> Any:
    """GLM's tokenizer: words, begun by two marks, padded on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "[gMASK]", "<sop>", "a", "red", "cat", ",", "sun", "sea", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(word, words.index(word)) for word in words[1:3]]
    tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side="left", pad_token=words[0], unk_token="?"
    )


def cogview4(folder: Path, cls: str = "CogView4Pipeline", **changes: Any) -> Path:
    """CogView4 in miniature, 8 pixels a token."""
    import diffusers
    from transformers import GlmConfig, GlmModel

    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, head_dim=8)
    glm = GlmModel(GlmConfig(vocab_size=10, num_key_value_heads=1, pad_token_id=0, eos_token_id=0, **sizes))
    pipe = getattr(diffusers, cls)(
        transformer=redraw(diffusers.CogView4Transformer2DModel(**COGVIEW | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=redraw(glm, 4),
        tokenizer=glm_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )
    pipe.save_pretrained(folder)
    return folder


BERT_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "cat",
    "sun",
    "##s",
    "on",
    "sea",
    "猫",
    ",",
    ".",
]
BERT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=80)
HUNYUAN = dict(
    sample_size=8,
    in_channels=4,
    patch_size=2,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=3,
    hidden_size=24,
    cross_attention_dim=24,
    cross_attention_dim_t5=24,
    pooled_projection_dim=20,
)


def bert_tokenizer(length: int = 77) -> Any:
    """BERT's tokenizer of a few words and letters."""
    from transformers import BertTokenizer

    letters = [f"{mark}{chr(k)}" for k in range(97, 123) for mark in ("", "##")]
    vocab = {token: k for k, token in enumerate(dict.fromkeys(BERT_WORDS + letters))}
    return BertTokenizer(vocab=vocab, model_max_length=length)


def bert(seed: int, **changes: Any) -> Any:
    """BERT in miniature."""
    from transformers import BertConfig, BertModel

    return redraw(BertModel(BertConfig(**BERT | dict(max_position_embeddings=80) | changes)), seed)


def hunyuan(folder: Path, **changes: Any) -> Path:
    """Hunyuan-DiT in miniature, 16 pixels a token; `changes` are keys of the transformer's config."""
    import diffusers

    pipe = diffusers.HunyuanDiTPipeline(
        transformer=redraw(diffusers.HunyuanDiT2DModel(**HUNYUAN | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**VAE), 2),
        text_encoder=bert(3),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_encoder(4),
        tokenizer_2=t5_tokenizer(256),
        scheduler=diffusers.DDPMScheduler(
            **BETAS | dict(beta_end=0.03), prediction_type="v_prediction", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


PIXART = dict(
    sample_size=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=3,
    cross_attention_dim=24,
    caption_channels=24,
)


def pixart(folder: Path, cls: str = "PixArtSigmaPipeline", **changes: Any) -> Path:
    """PixArt in miniature; `changes` are keys of the transformer's config."""
    import diffusers

    pipe = getattr(diffusers, cls)(
        transformer=redraw(diffusers.PixArtTransformer2DModel(**PIXART | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=t5_encoder(4),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipe.save_pretrained(folder)
    return folder


def gemma_tokenizer(add_bos_token: bool = True) -> Any:
    """A Gemma tokenizer of a few words and letters, with bytes for the rest."""
    from transformers import GemmaTokenizer

    words = ["▁cat", "▁red", "▁sun"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(letter) for letter in range(33, 127)]
    merges = []
    for word in words:
        merges += [(word[:k], word[k]) for k in range(1, len(word))]
        pieces += [word[: k + 1] for k in range(1, len(word))]
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=256, add_bos_token=add_bos_token)


def gemma2(seed: int, **changes: Any) -> Any:
    """Gemma 2 in miniature."""
    from transformers import Gemma2Config, Gemma2Model

    sizes = dict(vocab_size=384, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
    more = dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=9, sliding_window=6)
    return redraw(Gemma2Model(Gemma2Config(**sizes | more | changes)), seed)


SANA = dict(
    in_channels=4,
    out_channels=4,
    num_layers=3,
    num_attention_heads=3,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=10,
    cross_attention_dim=24,
    caption_channels=24,
    sample_size=16,
)
DC_VAE = dict(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(8, 8, 16),
    decoder_block_out_channels=(8, 8, 16),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_qkv_multiscales=((), (), (5,)),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    scaling_factor=0.41407,
)
FLOW_DPM = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def sana(folder: Path, **changes: Any) -> Path:
    """Sana in miniature, 4 pixels a latent; `changes` are keys of the transformer's config, or flow=True."""
    import diffusers

    flow = changes.pop("flow", False)
    pipe = diffusers.SanaPipeline(
        transformer=redraw(diffusers.SanaTransformer2DModel(**SANA | changes), 1),
        vae=redraw(diffusers.AutoencoderDC(**DC_VAE), 2),
        text_encoder=gemma2(3),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if flow
        else diffusers.DPMSolverMultistepScheduler(**FLOW_DPM),
    )
    pipe.save_pretrained(folder)
    return folder


LUMINA = dict(
    sample_size=8,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    cross_attention_dim=24,
)
LUMINA2 = dict(
    sample_size=8,
    in_channels=4,
    hidden_size=32,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=16,
    axes_dim_rope=(4, 6, 6),
    cap_feat_dim=24,
)


def gemma(seed: int, **changes: Any) -> Any:
    """Gemma in miniature."""
    from transformers import GemmaConfig, GemmaModel

    sizes = dict(vocab_size=384, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
    return redraw(GemmaModel(GemmaConfig(**sizes | dict(num_key_value_heads=1, head_dim=8) | changes)), seed)


def lumina(folder: Path, **changes: Any) -> Path:
    """Lumina-Next in miniature; `changes` are keys of the transformer's config."""
    import diffusers

    pipe = diffusers.LuminaPipeline(
        transformer=redraw(diffusers.LuminaNextDiT2DModel(**LUMINA | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**VAE), 2),
        text_encoder=gemma(3),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.save_pretrained(folder)
    return folder


def lumina2(folder: Path, **changes: Any) -> Path:
    """Lumina-Image 2.0 in miniature; `changes` are keys of the transformer's config."""
    import diffusers

    pipe = diffusers.Lumina2Pipeline(
        transformer=redraw(diffusers.Lumina2Transformer2DModel(**LUMINA2 | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**VAE, shift_factor=0.11), 2),
        text_encoder=gemma2(3),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=6.0),
    )
    pipe.save_pretrained(folder)
    return folder


def controlnet(unet: dict[str, Any], widths: tuple[int, ...]) -> Any:
    """A ControlNet for a U-Net of that config, whose residuals are not zero."""
    import diffusers

    network = diffusers.UNet2DConditionModel(**unet)
    return redraw(diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=widths), 20)


def _network(name: str, **config: Any) -> Any:
    import diffusers

    return redraw(getattr(diffusers, name)(**config), 20)


UNION = dict(num_control_type=6, num_trans_channel=16, num_trans_head=4, num_proj_channel=16)


def controlnet_union(seed: int = 20, **changes: Any) -> Any:
    """A ControlNet union for the U-Net of Stable Diffusion XL, whose residuals are not zero."""
    import diffusers

    known = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    shape = {name: value for name, value in XL_UNET.items() if name in known}
    widths = dict(conditioning_embedding_out_channels=(4, 8, 8))
    return redraw(diffusers.ControlNetUnionModel(**shape | widths | UNION | changes), seed)


CONTROLNETS: dict[str, Callable[[], Any]] = {
    "xl-union": controlnet_union,
    "sd": lambda: controlnet(UNET, (4, 8, 8, 8)),
    "xl": lambda: controlnet(XL_UNET, (4, 8, 8)),
    "sd3": lambda: _network("SD3ControlNetModel", **SD3 | dict(num_layers=2)),
    "sd3-inpaint": lambda: _network("SD3ControlNetModel", **SD3 | dict(num_layers=2, extra_conditioning_channels=1)),
    "flux": lambda: _network(
        "FluxControlNetModel",
        **FLUX | dict(num_layers=1, num_single_layers=2, pooled_projection_dim=24, guidance_embeds=True),
    ),
}
"""Control networks for the checkpoints above, to be saved by their peers' `save_pretrained`."""


def chatglm_pieces(file: Path, algorithm: str = "bpe", **options: Any) -> Path:
    """A SentencePiece model as ChatGLM has it: no word is unknown, no space is left out."""
    from sentencepiece import SentencePieceTrainer

    words = ["a photo of a red cat on the sea", "the sun and  the red sea,", "a cat, a sun!", "一只红色的猫", "x\ty"]
    options = dict(vocab_size=340, byte_fallback=True, remove_extra_whitespaces=False, hard_vocab_limit=False) | options
    kind = dict(model_type=algorithm, normalization_rule_name="identity", minloglevel=2)
    SentencePieceTrainer.train(
        sentence_iterator=iter(words * 9), model_prefix=str(file.with_suffix("")), **kind, **options
    )
    file.with_suffix(".vocab").unlink()
    return file


CHATGLM = dict(
    num_layers=3,
    padded_vocab_size=360,
    hidden_size=24,
    ffn_hidden_size=20,
    kv_channels=8,
    num_attention_heads=4,
    multi_query_attention=True,
    multi_query_group_num=2,
    add_qkv_bias=True,
    seq_length=256,
    original_rope=True,
)


def chatglm(seed: int, **changes: Any) -> Any:
    """ChatGLM in miniature."""
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    return redraw(ChatGLMModel(ChatGLMConfig(**CHATGLM | changes)), seed).eval()


def kolors(folder: Path, **changes: Any) -> Path:
    """Kolors in miniature; `changes` are keys of the U-Net's config."""
    import diffusers
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    pipe = diffusers.KolorsPipeline(
        unet=redraw(diffusers.UNet2DConditionModel(**XL_UNET | dict(encoder_hid_dim=24) | changes), 1),
        vae=redraw(diffusers.AutoencoderKL(**XL_VAE), 2),
        text_encoder=chatglm(3),
        tokenizer=ChatGLMTokenizer(str(chatglm_pieces(folder / "tokenizer.model"))),
        scheduler=diffusers.EulerDiscreteScheduler(
            **BETAS | dict(beta_end=0.014), num_train_timesteps=1100, timestep_spacing="leading", steps_offset=1
        ),
    )
    pipe.save_pretrained(folder)
    return folder


def lcm(folder: Path) -> Path:
    """A latent consistency model in miniature."""
    return stable_diffusion(
        folder, "LatentConsistencyModelPipeline", time_cond_proj_dim=16, scheduler=("LCMScheduler", {})
    )


KANDINSKY_UNET = UNET | dict(
    out_channels=8,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    attention_head_dim=8,
    resnet_time_scale_shift="scale_shift",
)
MOVQ = dict(
    block_out_channels=(32, 32, 64),
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    layers_per_block=1,
    latent_channels=4,
    num_vq_embeddings=16,
    vq_embed_dim=4,
    norm_type="spatial",
)


def kandinsky_prior(folder: Path) -> dict[str, Any]:
    """The components of the prior of both Kandinsky 2 in miniature."""
    import diffusers
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=24)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    shape = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, embedding_dim=24)
    drawn = dict(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return dict(
        prior=redraw(diffusers.PriorTransformer(**shape), 41),
        image_encoder=redraw(CLIPVisionModelWithProjection(vision), 42),
        text_encoder=text_encoder(43, projection=True),
        tokenizer=_tokenizer(folder),
        scheduler=diffusers.UnCLIPScheduler(**drawn),
        image_processor=CLIPImageProcessor(size=8, crop_size=8),
    )


def kandinsky(folder: Path, version: str = "22", parts: str = "both", **changes: Any) -> Path:
    """Kandinsky 2.1 ("21") or 2.2 in miniature: "both" stages, the "decoder" or the "prior" alone."""
    import diffusers

    stem = {"21": "Kandinsky", "22": "KandinskyV22"}[version]
    infix = "Inpaint" if changes.get("in_channels") == 9 else ""
    prior = kandinsky_prior(folder) if parts != "decoder" else {}
    if parts == "prior":
        getattr(diffusers, f"{stem}PriorPipeline")(**prior).save_pretrained(folder)
        return folder
    kind = "image" if version == "22" else "text_image"
    seen = dict(addition_embed_type=kind, encoder_hid_dim_type=f"{kind}_proj")
    seen |= dict(encoder_hid_dim=24 if version == "22" else 20)
    learned = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range")
    decoder: dict[str, Any] = dict(
        unet=redraw(diffusers.UNet2DConditionModel(**KANDINSKY_UNET | seen | changes), 44),
        scheduler=diffusers.DDPMScheduler(**learned),
        movq=redraw(diffusers.VQModel(**MOVQ), 45),
    )
    decoder |= multilingual() if version == "21" else {}
    decoder |= {f"prior_{name}": part for name, part in prior.items()}
    suffix = "Combined" if parts == "both" else ""
    getattr(diffusers, f"{stem}{infix}{suffix}Pipeline")(**decoder).save_pretrained(folder)
    return folder


KANDINSKY3 = dict(
    time_embedding_dim=16,
    groups=4,
    attention_head_dim=8,
    layers_per_block=2,
    block_out_channels=(16, 24, 32, 40),
    cross_attention_dim=12,
    encoder_hid_dim=24,
)


def kandinsky3(folder: Path, **changes: Any) -> Path:
    """Kandinsky 3 in miniature; `changes` are keys of the U-Net's config."""
    import diffusers

    pipe = diffusers.Kandinsky3Pipeline(
        unet=redraw(diffusers.Kandinsky3UNet(**KANDINSKY3 | changes), 6),
        scheduler=diffusers.DDPMScheduler(clip_sample_range=2.0),
        movq=redraw(diffusers.VQModel(**MOVQ), 45),
        text_encoder=t5_encoder(4),
        tokenizer=t5_tokenizer(128),
    )
    pipe.save_pretrained(folder)
    return folder


IF_UNET = dict(
    sample_size=32,
    in_channels=3,
    out_channels=6,
    block_out_channels=(16, 24),
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    layers_per_block=1,
    cross_attention_dim=32,
    encoder_hid_dim=24,
    attention_head_dim=8,
    addition_embed_type="text",
    addition_embed_type_num_heads=2,
    cross_attention_norm="group_norm",
    resnet_time_scale_shift="scale_shift",
    mid_block_scale_factor=1.4,
    act_fn="gelu",
    norm_num_groups=4,
)
IF_UPSCALER = IF_UNET | dict(
    sample_size=64,
    in_channels=6,
    class_embed_type="timestep",
    addition_embed_type=None,
    only_cross_attention=True,
    mid_block_only_cross_attention=True,
    resnet_skip_time_act=True,
    resnet_out_scale_factor=0.7,
    mid_block_scale_factor=0.7,
    time_embedding_act_fn="gelu",
    time_embedding_dim=40,
)


def if_safety_checker() -> Any:
    """DeepFloyd's safety checker in miniature."""
    from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
    from transformers import CLIPConfig

    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=24)
    config = CLIPConfig(text_config=sizes, vision_config=sizes | dict(image_size=8, patch_size=4), projection_dim=24)
    return redraw(IFSafetyChecker(config), 8)


def if_looks(folder: Path) -> None:
    """Add it, and a watermark; by hand, as transformers 5 neither saves nor loads this class of the peer's."""
    from diffusers.pipelines.deepfloyd_if import IFWatermarker
    from transformers import CLIPImageProcessor

    checker, watermarker = if_safety_checker(), IFWatermarker()
    watermarker.watermark_image.copy_(torch.arange(62 * 62 * 4).view(62, 62, 4) % 256)
    checker.config.save_pretrained(folder / "safety_checker")
    save_file(checker.state_dict(), folder / "safety_checker" / "model.safetensors")
    watermarker.save_pretrained(folder / "watermarker")
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index |= dict(safety_checker=["deepfloyd_if", "IFSafetyChecker"], watermarker=["deepfloyd_if", "IFWatermarker"])
    index |= dict(feature_extractor=["transformers", "CLIPImageProcessor"])
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def deepfloyd(folder: Path, upscaler: bool = False, looks: bool = False, **changes: Any) -> Path:
    """A stage of DeepFloyd IF in miniature; `changes` are keys of the U-Net's config."""
    import diffusers

    drawn = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range", sample_max_value=1.5
    )
    parts = dict(tokenizer=t5_tokenizer(77), text_encoder=t5_encoder(4), scheduler=drawn)
    parts |= dict(unet=redraw(diffusers.UNet2DConditionModel(**(IF_UPSCALER if upscaler else IF_UNET) | changes), 7))
    parts |= dict(safety_checker=None, feature_extractor=None, watermarker=None)
    if upscaler:
        parts |= dict(image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    cls = diffusers.IFSuperResolutionPipeline if upscaler else diffusers.IFPipeline
    cls(**parts, requires_safety_checker=looks).save_pretrained(folder)
    if looks:
        if_looks(folder)
    return folder


def multilingual() -> dict[str, Any]:
    """Kandinsky 2.1's text encoder and tokenizer in miniature."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
    from transformers import XLMRobertaTokenizer

    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *PIECES[3:], ("<mask>", 0.0)]
    sizes = dict(hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(vocab_size=len(vocab), max_position_embeddings=90, transformerDimSize=20, imageDimSize=24)
    return dict(
        text_encoder=redraw(MultilingualCLIP(MCLIPConfig(**sizes)), 46),
        tokenizer=XLMRobertaTokenizer(vocab=vocab, model_max_length=77),
    )


def photo(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture of smooth colours."""
    y, x = np.mgrid[0:height, 0:width] / 16
    waves = np.stack([np.sin(x + seed), np.cos(y - seed), np.sin(x * y / 4)], -1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


def mask(width: int = 64, height: int = 64) -> Image.Image:
    """White in the middle."""
    picture = Image.new("L", (width, height), 0)
    picture.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return picture


def inputs(task: str) -> dict[str, Any]:
    """What a task needs beside a prompt."""
    return {"text2image": {}, "image2image": dict(image=photo()), "inpaint": dict(image=photo(), mask_image=mask())}[
        task
    ]


def _paella(seed: int, scale: float) -> Any:
    """Paella's autoencoder, whose pictures stay within 0..1."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    made = redraw(PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=24, scale_factor=scale), seed)
    with torch.no_grad():
        made.out_block[0].weight.mul_(0.25)
        made.out_block[0].bias.add_(0.5)
    return made


def _known_to_the_peer() -> None:
    """Published checkpoints name models of `pipelines.wuerstchen`: moved by the peer, but still looked for there."""
    from diffusers import pipelines
    from diffusers.pipelines.deprecated import wuerstchen

    pipelines.wuerstchen = wuerstchen


WUERSTCHEN = dict(
    c_r=8,
    c_cond=24,
    clip_embd=24,
    c_hidden=[16, 32],
    nhead=[-1, 4],
    blocks=[1, 2],
    level_config=["CT", "CTA"],
    inject_effnet=[False, True],
)


def wuerstchen(folder: Path, parts: str = "both") -> Path:
    """Wuerstchen in miniature: "both" stages, the "decoder" or the "prior" alone."""
    import diffusers
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior

    _known_to_the_peer()
    prior: dict[str, Any] = dict(
        tokenizer=_tokenizer(folder),
        text_encoder=text_encoder(43),
        prior=redraw(WuerstchenPrior(c_in=16, c=32, c_cond=24, c_r=8, depth=1, nhead=4), 41),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )
    with torch.no_grad():
        prior["prior"].out[1].weight.mul_(0.2)
    decoder: dict[str, Any] = dict(
        tokenizer=_tokenizer(folder),
        text_encoder=text_encoder(3),
        decoder=redraw(WuerstchenDiffNeXt(**WUERSTCHEN), 1),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=_paella(2, 0.5),
    )
    with torch.no_grad():  # what the noise is divided by is kept away from zero
        decoder["decoder"].clf[1].weight.mul_(0.3)
        decoder["decoder"].clf[1].bias[16:] += 3
    return _two_stages("Wuerstchen", folder, parts, prior, decoder)


def _two_stages(stem: str, folder: Path, parts: str, prior: dict[str, Any], decoder: dict[str, Any]) -> Path:
    import diffusers

    classes = {"prior": "Prior", "decoder": "Decoder", "both": "Combined"}
    own = {
        "prior": prior,
        "decoder": decoder,
        "both": decoder | {f"prior_{name}": part for name, part in prior.items()},
    }
    getattr(diffusers, f"{stem}{classes[parts]}Pipeline")(**own[parts]).save_pretrained(folder)
    return folder


CASCADE = dict(timestep_ratio_embedding_dim=8, clip_text_pooled_in_channels=24, clip_seq=4, conditioning_dim=24)
CASCADE_KINDS = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
CASCADE_PRIOR = CASCADE | dict(
    block_out_channels=(24, 32),
    num_attention_heads=(4, 4),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    block_types_per_layer=(CASCADE_KINDS,) * 2,
    clip_text_in_channels=24,
    clip_image_in_channels=24,
    switch_level=(False,),
)
CASCADE_DECODER = CASCADE | dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    num_attention_heads=(-1, 4),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1),
    up_blocks_repeat_mappers=(2, 2),
    block_types_per_layer=(CASCADE_KINDS[:2], CASCADE_KINDS),
    effnet_in_channels=16,
    patch_size=2,
)


def cascade(folder: Path, parts: str = "both") -> Path:
    """Stable Cascade in miniature: "both" stages, the "decoder" or the "prior" alone."""
    import diffusers

    _known_to_the_peer()
    seen = kandinsky_prior(folder)
    prior = dict(
        prior=redraw(diffusers.StableCascadeUNet(**CASCADE_PRIOR), 41),
        tokenizer=_tokenizer(folder),
        text_encoder=text_encoder(43, projection=True),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        image_encoder=seen["image_encoder"],
        feature_extractor=seen["image_processor"],
    )
    decoder = dict(
        decoder=redraw(diffusers.StableCascadeUNet(**CASCADE_DECODER), 1),
        tokenizer=_tokenizer(folder),
        text_encoder=text_encoder(3, projection=True),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=_paella(2, 0.008),
    )
    return _two_stages("StableCascade", folder, parts, prior, decoder)
