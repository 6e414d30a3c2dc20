"""The denoiser and the two text encoders: their sizes, and how a caption conditions the denoiser."""

from __future__ import annotations

import torch
from torch import nn

from autopipeline.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from autopipeline.models.unet import UNet2DConditionModel
from codec import CHANNELS
from tokenizer import LENGTH, vocabulary

WIDTH = 128  # of each text encoder
UNET = {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 2 * WIDTH,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (3, 6),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}


def text_config(projection: int = WIDTH) -> dict[str, object]:
    end = len(vocabulary()[0]) - 1
    return {
        "vocab_size": end + 1,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": projection,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": end - 1,
        "eos_token_id": 2,  # older form: the pooled token is the one with the highest number
        "pad_token_id": end,
    }


class Painter(nn.Module):
    """UNet and text encoders, trained together through the denoising loss."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder = CLIPTextModel(**text_config())
        self.text_encoder_2 = CLIPTextModelWithProjection(**text_config())
        for encoder in (self.text_encoder, self.text_encoder_2):
            for part in encoder.modules():
                if isinstance(part, nn.Embedding):
                    nn.init.normal_(part.weight, std=0.02)
        self._ignore_sizes()

    def _ignore_sizes(self) -> None:
        """SDXL's six size numbers stay without effect: their columns are zero and get no gradient."""
        weight = self.unet.add_embedding.linear_1.weight
        with torch.no_grad():
            weight[:, WIDTH:] = 0
        keep = torch.zeros(weight.shape[1])
        keep[:WIDTH] = 1
        weight.register_hook(lambda grad: grad * keep.to(grad.device))

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, L) -> the tokens' states (B, L, 256) as SDXL takes them, and the pooled vector (B, 128)."""
        first, second = self.text_encoder(ids), self.text_encoder_2(ids)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.pooled

    def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """The velocity (B, 16, 16, 16); keep (B,) is 0 where the caption is dropped."""
        states, pooled = self.encode(ids)
        sizes = torch.zeros(len(x), 6, device=x.device)
        return self.unet(x, t, states * keep[:, None, None], text_embeds=pooled * keep[:, None], time_ids=sizes)
