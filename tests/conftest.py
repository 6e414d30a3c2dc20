"""Shared fixtures: tiny checkpoints, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

import language
import patched
import qwenimage
import tiny

torch.set_num_threads(1)  # tiny networks gain nothing from more, and the tests run in several processes

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
    "flux2": patched.flux2,
    "klein": lambda folder: patched.flux2(folder, "Flux2KleinPipeline"),
    "klein-distilled": lambda folder: patched.flux2(folder, "Flux2KleinPipeline", distilled=True),
    "ideogram4": patched.ideogram4,
    "chroma": tiny.chroma,
    "auraflow": tiny.auraflow,
    "ovis": language.ovis,
    "cogview3": tiny.cogview3,
    "cogview4": tiny.cogview4,
    "cogview4-control": lambda folder: tiny.cogview4(folder, "CogView4ControlPipeline", in_channels=8),
    "krea2": language.krea2,
    "krea2-distilled": lambda folder: language.krea2(folder, is_distilled=True),
    "nucleus": language.nucleus_moe,
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
    "lumina": tiny.lumina,
    "lumina2": tiny.lumina2,
    "kolors": tiny.kolors,
    "kolors-9": lambda folder: tiny.kolors(folder, in_channels=9),
    "lcm": tiny.lcm,
    "qwenimage": qwenimage.checkpoint,
    "qwenimage-edit": lambda folder: qwenimage.checkpoint(folder, "QwenImageEditPipeline"),
    "qwenimage-edit-plus": lambda folder: qwenimage.checkpoint(folder, "QwenImageEditPlusPipeline", zero_cond_t=True),
    "glm": language.glm_image,
    "if": tiny.deepfloyd,
    "if-looks": lambda folder: tiny.deepfloyd(folder, looks=True),
    "if-upscaler": lambda folder: tiny.deepfloyd(folder, upscaler=True),
    "if-upscaler-looks": lambda folder: tiny.deepfloyd(folder, upscaler=True, looks=True),
    "qwenimage-layered": lambda folder: qwenimage.checkpoint(
        folder, "QwenImageLayeredPipeline", use_additional_t_cond=True, use_layer3d_rope=True
    ),
    "qwenimage21": qwenimage.checkpoint21,
    "qwenimage21-unkept": lambda folder: qwenimage.checkpoint21(folder, causal_condition=False),
    "kandinsky3": tiny.kandinsky3,
    "wuerstchen": tiny.wuerstchen,
    "wuerstchen-decoder": lambda folder: tiny.wuerstchen(folder, "decoder"),
    "wuerstchen-prior": lambda folder: tiny.wuerstchen(folder, "prior"),
    "cascade": tiny.cascade,
    "cascade-decoder": lambda folder: tiny.cascade(folder, "decoder"),
    "cascade-prior": lambda folder: tiny.cascade(folder, "prior"),
    "kandinsky22": tiny.kandinsky,
    "kandinsky22-9": lambda folder: tiny.kandinsky(folder, in_channels=9),
    "kandinsky22-decoder": lambda folder: tiny.kandinsky(folder, parts="decoder"),
    "kandinsky22-prior": lambda folder: tiny.kandinsky(folder, parts="prior"),
    "kandinsky": lambda folder: tiny.kandinsky(folder, "21"),
    "kandinsky-9": lambda folder: tiny.kandinsky(folder, "21", in_channels=9),
    "kandinsky-decoder": lambda folder: tiny.kandinsky(folder, "21", "decoder"),
    "omni": language.z_image_omni,
    "z-image": language.z_image,
    "z-image-shifted": lambda folder: language.z_image(folder, shift=tiny.FLUX_SHIFT),
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


@pytest.fixture(scope="session")
def small_edits() -> Iterator[None]:
    """Qwen-Image-Edit and -Layered scale their pictures to few pixels, not to a million."""
    from autopipeline.families import qwenimage_edit, qwenimage_edit_plus, qwenimage_layered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwenimage_edit, "AREA", 64 * 64)
        patch.setattr(qwenimage_edit_plus, "SEEN", 64 * 64)
        patch.setattr(qwenimage_layered, "SIDES", {640: 64, 1024: 96})
        yield
