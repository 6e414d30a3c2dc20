"""Shared fixtures: tiny checkpoints, made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

import language
import tiny

torch.set_num_threads(min(2, torch.get_num_threads()))  # tiny networks gain nothing from more

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.stable_diffusion,
    "sd-v": lambda folder: tiny.stable_diffusion(
        folder,
        scheduler=(
            "DDIMScheduler",
            dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ),
    ),
    "sd-9": lambda folder: tiny.stable_diffusion(folder, in_channels=9),
    "xl": tiny.stable_diffusion_xl,
    "xl-9": lambda folder: tiny.stable_diffusion_xl(folder, in_channels=9),
    "sd3": tiny.stable_diffusion_3,
    "sd35": lambda folder: tiny.stable_diffusion_3(
        folder, dict(use_dynamic_shifting=True), qk_norm="rms_norm", dual_attention_layers=(0, 1)
    ),
    "flux": tiny.flux,
    "schnell": lambda folder: tiny.flux(folder, guidance_embeds=False),
    "flux-control": lambda folder: tiny.flux(folder, "FluxControlPipeline", in_channels=32, out_channels=16),
    "kontext": lambda folder: tiny.flux(folder, "FluxKontextPipeline"),
    "chroma": tiny.chroma,
    "auraflow": tiny.auraflow,
    "ovis": language.ovis,
    "prx": language.prx,
    "prx-256": lambda folder: language.prx(folder, default_sample_size=256, resolution_embeds=True, bottleneck_size=10),
    "hunyuan": tiny.hunyuan,
    "hunyuan-plain": lambda folder: tiny.hunyuan(folder, use_style_cond_and_image_meta_size=False),
    "pixart-alpha": lambda folder: tiny.pixart(folder, "PixArtAlphaPipeline", use_additional_conditions=True),
    "pixart-alpha-1024": lambda folder: tiny.pixart(folder, "PixArtAlphaPipeline", sample_size=128, patch_size=4),
    "pixart-sigma": lambda folder: tiny.pixart(folder, interpolation_scale=2),
    "pixart-sigma-256": lambda folder: tiny.pixart(folder, sample_size=32, norm_elementwise_affine=True),
    "sana": tiny.sana,
    "sana-1.5": lambda folder: tiny.sana(
        folder, flow=True, timestep_scale=0.001, qk_norm="rms_norm_across_heads", interpolation_scale=1.5
    ),
    "lcm": tiny.lcm,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, by name."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = BUILDERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get
