"""The autoencoder of Flux 2: that of latent diffusion, with the statistics of its latents in patches."""

from __future__ import annotations

import math

from torch import Tensor, nn

from autopipeline.models.autoencoder_kl import AutoencoderKL, Decoder, Encoder, check_blocks
from autopipeline.models.network import Network


class AutoencoderKLFlux2(Network):
    """Pictures to latents and back; `bn` knows mean and variance of patches of latents, and is never called."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        decoder_block_out_channels: tuple[int, ...] | None = None,
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 32,
        norm_num_groups: int = 32,
        sample_size: int = 1024,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        batch_norm_eps: float = 1e-4,
        batch_norm_momentum: float = 0.1,
        patch_size: tuple[int, int] = (2, 2),
    ) -> None:
        check_blocks((*down_block_types, *up_block_types), act_fn)
        rest = layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, 2 * latent_channels, list(block_out_channels), *rest)
        back = list(decoder_block_out_channels or block_out_channels)
        self.decoder = Decoder(latent_channels, out_channels, back, *rest)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.bn = nn.BatchNorm2d(math.prod(patch_size) * latent_channels, affine=False)

    encode, decode = AutoencoderKL.encode, AutoencoderKL.decode

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (4 C,) of patches, in the precision and place of `like`."""
        mean, variance = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        return mean.to(like), (variance + self.config.batch_norm_eps).sqrt().to(like)
