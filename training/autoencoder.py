"""Train the autoencoder: its encoder learns the linear codec, its decoder learns to invert it sharply.

    python training/autoencoder.py --out RUN/vae.pt --minutes 20

The run is seeded and resumes from its own file; the learning rate follows the time used, so that it has decayed when
time is up.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import codec
import scenes
from autopipeline.models.autoencoder_kl import AutoencoderKL

CONFIG = {
    "sample_size": 128,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (24, 48, 64, 64),
    "layers_per_block": 1,
    "latent_channels": codec.CHANNELS,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
    "force_upcast": False,
}
NOISE = 0.25
"""The most noise on the latents that the decoder has to see through; a denoiser's result is never exact."""


def build() -> AutoencoderKL:
    """A fresh autoencoder without doubt about its latents: the variance is next to nothing, without gradient."""
    model = AutoencoderKL(**CONFIG)
    with torch.no_grad():
        model.quant_conv.weight[codec.CHANNELS :] = 0
        model.quant_conv.bias[codec.CHANNELS :] = -14
    return model


def crops(whole: torch.Tensor, rng: np.random.Generator, side: int) -> torch.Tensor:
    """One crop of each picture; three in four on the latent grid, the others anywhere."""
    if side == scenes.SIDE:
        return whole
    step = codec.CELL if rng.random() < 0.75 else 1
    y, x = (step * rng.integers(0, (scenes.SIDE - side) // step + 1, size=(2, len(whole)))).tolist()
    return torch.stack([w[:, b : b + side, a : a + side] for w, a, b in zip(whole, x, y, strict=True)])


def loss_of(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's error, and the reconstruction's from slightly noised latents; and the plain L1 of the latter."""
    codes = codec.encode(x)
    level = NOISE * torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) ** 2
    noise = torch.randn(codes.shape, generator=generator).to(x.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        mean = model.encode(x).mean.float()
        y = model.decode(codes + level * noise).float()
    l1 = F.l1_loss(y, x)
    return F.mse_loss(mean, codes) + l1 + 2 * F.mse_loss(y, x), l1.detach()


def train(out: Path, minutes: float, seed: int, device: str, batch: int, lr: float) -> None:
    torch.manual_seed(seed)
    model = build().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    step, used = 0, 0.0
    if out.exists():
        saved = torch.load(out, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step, used = saved["step"], saved["used"]
    began = saved_at = time.monotonic() - used
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * max(0.02, 1 - done) ** 0.8
        side, size = (64, batch) if done < 0.75 else (scenes.SIDE, batch // 4)
        rng, generator = np.random.default_rng((seed, 1, step)), torch.Generator().manual_seed(seed * 1_000_003 + step)
        x = crops(codec.pictures(seed, step * batch, size), rng, side).to(device)
        loss, l1 = loss_of(model, x, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0:
            print(
                f"{time.monotonic() - began:.0f} s, step {step}, loss {loss.item():.4f}, l1 {l1.item():.4f}", flush=True
            )
        if time.monotonic() - saved_at > 60:
            save(out, model, optimiser, step, time.monotonic() - began)
            saved_at = time.monotonic()
    save(out, model, optimiser, step, time.monotonic() - began)


def save(out: Path, model, optimiser, step: int, used: float) -> None:
    part = out.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "used": used}, part)
    part.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(args.out, args.minutes, args.seed, args.device, args.batch, args.lr)


if __name__ == "__main__":
    main()
