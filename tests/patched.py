"""Checkpoints in miniature that work on patches normalised by their autoencoder: Flux 2 and Ideogram 4."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import language
import tiny

VAE = {name: value for name, value in tiny.XL_VAE.items() if name != "scaling_factor"}
FLUX2 = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=48,
    timestep_guidance_channels=20,
    axes_dims_rope=(2, 4, 4, 2),
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)


def vae(seed: int) -> Any:
    """An autoencoder whose patches are not standard-normal."""
    import diffusers

    made = tiny.redraw(diffusers.AutoencoderKLFlux2(**VAE), seed)
    random = torch.Generator().manual_seed(seed)
    made.bn.running_mean.copy_(0.3 * torch.randn(16, generator=random))
    made.bn.running_var.copy_(0.5 + torch.rand(16, generator=random))
    return made


@cache
def _mistral() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from autopipeline.families.flux2 import SYSTEM

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    core.train_from_iterator(
        [SYSTEM, "a red cat, sun"],
        trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return core.to_str()


def mistral_tokenizer() -> Any:
    """Mistral's tokenizer: bytes and the words of the system's message; it pads on the left."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    named = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_mistral()), model_max_length=4096, padding_side="left", **named
    )
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def mistral3(seed: int) -> Any:
    """Mistral Small 3."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, head_dim=8)
    config = Mistral3Config(
        text_config=language.SHAPE | dict(model_type="mistral", sliding_window=None),
        vision_config=vision | dict(model_type="pixtral", image_size=64, patch_size=8),
        image_token_index=8,
    )
    return tiny.redraw(Mistral3ForConditionalGeneration(config), seed)


def qwen3(seed: int) -> Any:
    """Qwen 3 with its language-model head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return tiny.redraw(Qwen3ForCausalLM(Qwen3Config(**language.SHAPE)), seed)


def flux2(folder: Path, cls: str = "Flux2Pipeline", distilled: bool = False) -> Path:
    """Flux 2 in miniature, 8 pixels a token."""
    import diffusers

    klein = cls == "Flux2KleinPipeline"
    pipe = getattr(diffusers, cls)(
        transformer=tiny.redraw(diffusers.Flux2Transformer2DModel(**FLUX2, guidance_embeds=not klein), 1),
        vae=vae(2),
        text_encoder=qwen3(3) if klein else mistral3(3),
        tokenizer=language.qwen_tokenizer() if klein else mistral_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**tiny.FLUX_SHIFT),
        **dict(is_distilled=distilled) if klein else {},
    )
    pipe.save_pretrained(folder)
    return folder


IDEOGRAM4 = dict(
    in_channels=16,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=2,
    intermediate_size=40,
    adaln_dim=10,
    llm_features_dim=13 * 8,
    mrope_section=(3, 2, 1),
)


def ideogram4(folder: Path) -> Path:
    """Ideogram 4 in miniature, 8 pixels a token; its text encoder is narrow, but as deep as it has to be."""
    import diffusers

    shape = language.SHAPE | dict(hidden_size=8, intermediate_size=12, num_hidden_layers=36, num_attention_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "SHAPE", shape)
        encoder = language.qwen3_vl(3)
    pipe = diffusers.Ideogram4Pipeline(
        transformer=tiny.redraw(diffusers.Ideogram4Transformer2DModel(**IDEOGRAM4), 1),
        unconditional_transformer=tiny.redraw(diffusers.Ideogram4Transformer2DModel(**IDEOGRAM4), 5),
        vae=vae(2),
        text_encoder=encoder,
        tokenizer=language.qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.save_pretrained(folder)
    return folder
