"""The pictures of the peer: same checkpoint, same call, same seed. Built on the spot, compared in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny

TOLERANCE = 2e-3
AUTO = {
    "text2image": "AutoPipelineForText2Image",
    "image2image": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
UNFOUND = {("chroma", "image2image"): "ChromaImg2ImgPipeline", ("chroma", "inpaint"): "ChromaInpaintPipeline"}
"""Classes of the peer that its AutoPipeline does not find."""
GENTLE = dict(strength=0.6, num_inference_steps=6)
EMBEDS = dict(prompt=None, prompt_embeds=(1, 77, 24), negative_prompt_embeds=(1, 77, 24))
XL_EMBEDS = dict(
    prompt=None,
    prompt_embeds=(1, 77, 48),
    negative_prompt_embeds=(1, 77, 48),
    pooled_prompt_embeds=(1, 24),
    negative_pooled_prompt_embeds=(1, 24),
)
SD3_EMBEDS = dict(
    prompt=None,
    prompt_embeds=(1, 90, 60),
    negative_prompt_embeds=(1, 90, 60),
    pooled_prompt_embeds=(1, 36),
    negative_pooled_prompt_embeds=(1, 36),
)
SKIP = dict(skip_guidance_layers=[1, 3], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.8)
FLUX = dict(height=32, width=32, max_sequence_length=16)
PIXART = dict(max_sequence_length=16, clean_caption=False, use_resolution_binning=False, height=64, width=64)
BINS = PIXART | dict(use_resolution_binning=True)
PIXART_EMBEDS = PIXART | dict(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=(1, 9, 24),
    negative_prompt_embeds=(1, 9, 24),
    prompt_attention_mask=torch.arange(9)[None] < 4,
    negative_prompt_attention_mask=torch.arange(9)[None] < 2,
)
PIXART_NEGATIVE = dict(negative_prompt_embeds=None, negative_prompt_attention_mask=None, negative_prompt="cat")
FLUX_EMBEDS = FLUX | dict(prompt=None, prompt_embeds=(1, 9, 24), pooled_prompt_embeds=(1, 24))
TRUE = FLUX | dict(true_cfg_scale=3.0)
SIGMAS = dict(sigmas=[0.9, 0.6, 0.5, 0.2], strength=0.8)
STAGES = dict(height=64, width=64, prior_num_inference_steps=3)
SANA = FLUX | dict(use_resolution_binning=False)
TOLD = ["Paint the sun:", "- a red cat", "Words: "]
SANA_EMBEDS = dict(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=(1, 16, 24),
    negative_prompt_embeds=(1, 16, 24),
    prompt_attention_mask=torch.arange(16)[None] < 9,
    negative_prompt_attention_mask=torch.arange(16)[None] < 1,
)
KOLORS_EMBEDS = dict(prompt=None, prompt_embeds=(1, 256, 24), pooled_prompt_embeds=(1, 24))
KOLORS_NEGATIVE = dict(negative_prompt_embeds=(1, 256, 24), negative_pooled_prompt_embeds=(1, 24))
LUMINA = dict(clean_caption=False)
LUMINA2 = dict(system_prompt="sun", max_sequence_length=40)
LUMINA2_EMBEDS = dict(negative_prompt_embeds=None, negative_prompt_attention_mask=None, negative_prompt="cat")
LUMINA2_EMBEDS = SANA_EMBEDS | LUMINA2_EMBEDS | dict(max_sequence_length=24)  # of other lengths
KONTEXT = FLUX | dict(max_area=32 * 32, _auto_resize=False)
FLUX2 = dict(height=32, width=32, max_sequence_length=64, text_encoder_out_layers=[1, 3])
FLUX2_EMBEDS = dict(height=32, width=32, prompt=None, prompt_embeds=(1, 9, 48))
IDEOGRAM4 = dict(height=32, width=40, guidance_scale=3.0, guidance_schedule=None, max_sequence_length=64)
AURA_EMBEDS = FLUX | dict(prompt=None, prompt_embeds=(1, 9, 24), prompt_attention_mask=(1, 9, 1))
OVIS = FLUX | dict(max_sequence_length=40)
OVIS_EMBEDS = OVIS | dict(
    prompt=None, prompt_embeds=(1, 9, 24), negative_prompt=None, negative_prompt_embeds=(1, 4, 24)
)
PRX = dict(height=32, width=32, use_resolution_binning=False)
PRX_EMBEDS = dict(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=(1, 9, 24),
    negative_prompt_embeds=(1, 9, 24),
    prompt_attention_mask=torch.arange(9)[None] < 4,
    negative_prompt_attention_mask=torch.arange(9)[None] < 2,
)
HUNYUAN = dict(height=64, width=64, use_resolution_binning=False)
HUNYUAN_EMBEDS = dict(
    prompt=None,
    prompt_embeds=(1, 77, 24),
    prompt_embeds_2=(1, 256, 24),
    prompt_attention_mask=(1, 77),
    prompt_attention_mask_2=(1, 256),
)
COGVIEW_EMBEDS = FLUX | dict(prompt=None, prompt_embeds=(1, 9, 24))
Z_IMAGE = dict(height=32, width=32)
Z_EMBEDS = dict(
    prompt=None,
    prompt_embeds=[torch.randn(5, 24), torch.randn(40, 24)],
    negative_prompt_embeds=[torch.randn(33, 24), torch.randn(2, 24)],
)
MICRO = dict(original_size=(32, 48), crops_coords_top_left=(5, 9), target_size=(64, 72))
NEGATIVE_MICRO = dict(
    negative_original_size=(24, 32), negative_crops_coords_top_left=(3, 1), negative_target_size=(72, 56)
)
QWEN = dict(height=32, width=32, negative_prompt="sun", true_cfg_scale=3.0)
QWEN_EMBEDS = dict(
    prompt=None,
    negative_prompt=None,
    prompt_embeds=(1, 9, 24),
    negative_prompt_embeds=(1, 6, 24),
    prompt_embeds_mask=torch.arange(9)[None] < 7,
)
IF = dict(clean_caption=False)
IF_EMBEDS = dict(prompt=None, prompt_embeds=(1, 9, 24), negative_prompt_embeds=(1, 9, 24))
CROP = dict(padding_mask_crop=4, output_type="pil", image=tiny.photo(120, 90), mask_image=tiny.mask(120, 90))

WIDE3 = dict(height=64, width=96)
K3_EMBEDS = dict(
    prompt=None,
    prompt_embeds=(1, 9, 24),
    attention_mask=(torch.arange(9)[None] < 7).long(),
    negative_prompt_embeds=(1, 9, 24),
    negative_attention_mask=(torch.arange(9)[None] < 3).long(),
)
KREA2 = dict(height=32, width=32, max_sequence_length=30)
KREA2_EMBEDS = dict(
    prompt=None,
    prompt_embeds=(1, 9, 2, 24),
    prompt_embeds_mask=torch.arange(9)[None] < 7,
    negative_prompt_embeds=(1, 9, 2, 24),
    negative_prompt_embeds_mask=torch.arange(9)[None] < 3,
)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sd", "text2image", {}),
    ("sd", "text2image", dict(negative_prompt="sun", num_images_per_prompt=2, guidance_rescale=0.7)),
    ("sd", "text2image", dict(clip_skip=1, width=96, height=56)),
    ("sd", "text2image", dict(guidance_scale=1.0, latents=(1, 4, 8, 8))),
    ("sd", "text2image", EMBEDS),
    ("sd", "text2image", dict(prompt=None, prompt_embeds=(1, 20, 24), negative_prompt="cat")),
    ("sd", "image2image", GENTLE),
    ("sd", "image2image", GENTLE | dict(image=tiny.photo(70, 101), num_images_per_prompt=2)),
    ("sd", "inpaint", {}),
    ("sd", "inpaint", GENTLE | dict(height=96, width=64, negative_prompt="cat")),
    ("sd", "inpaint", GENTLE | CROP),
    ("sd-9", "inpaint", {}),
    ("sd-9", "inpaint", GENTLE),
    ("sd-v", "text2image", dict(guidance_rescale=0.5)),
    ("sd-v", "image2image", GENTLE | dict(eta=0.7)),
    ("sd3", "text2image", dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("sd3", "text2image", dict(prompt_2="cat", prompt_3="a sun", negative_prompt="cat", negative_prompt_3="sea")),
    ("sd3", "text2image", dict(clip_skip=1, width=96, height=56, max_sequence_length=8)),
    ("sd3", "text2image", dict(guidance_scale=1.0, latents=(1, 16, 16, 16), sigmas=[1.0, 0.7, 0.3])),
    ("sd3", "text2image", SD3_EMBEDS),
    ("sd3", "text2image", SKIP | dict(num_inference_steps=6)),
    ("sd3", "image2image", GENTLE),
    ("sd3", "image2image", dict(image=(1, 16, 16, 16), strength=0.9, num_images_per_prompt=2)),
    ("sd3", "inpaint", {}),
    ("sd3", "inpaint", GENTLE | CROP),
    ("sd3", "inpaint", dict(strength=1.0, height=96, width=64)),
    ("sd35", "text2image", dict(width=96)),
    ("sd35", "text2image", SKIP | dict(skip_layer_guidance_scale=1.7)),
    ("sd35", "text2image", dict(mu=0.3)),
    ("sd35", "image2image", GENTLE | dict(height=96)),
    ("sd35", "inpaint", GENTLE),
    ("flux", "text2image", FLUX | dict(guidance_scale=1.5, num_images_per_prompt=2)),
    ("flux", "text2image", TRUE | dict(negative_prompt="sun", prompt_2="cat", negative_prompt_2="sea", width=48)),
    ("flux", "text2image", FLUX_EMBEDS | dict(latents=(1, 16, 16), output_type="latent")),
    ("flux", "text2image", FLUX_EMBEDS | TRUE | dict(prompt=None, negative_prompt="sun", num_images_per_prompt=2)),
    ("flux", "text2image", FLUX | dict(height=45, width=37)),
    ("flux", "image2image", FLUX | GENTLE | dict(num_images_per_prompt=2)),
    ("flux", "image2image", FLUX | SIGMAS | dict(image=(1, 4, 8, 8))),
    ("flux", "image2image", FLUX | dict(latents=(1, 16, 16), strength=0.9)),
    ("flux", "inpaint", TRUE | GENTLE | dict(negative_prompt="sun")),
    ("flux", "inpaint", FLUX | SIGMAS | dict(strength=1.0, num_images_per_prompt=2)),
    ("flux", "inpaint", FLUX | dict(latents=(1, 4, 8, 8), strength=0.7)),
    ("flux", "inpaint", FLUX | GENTLE | CROP),
    ("schnell", "text2image", FLUX | dict(prompt="cat", max_sequence_length=3, width=40)),
    ("schnell", "image2image", FLUX | GENTLE),
    ("kontext", "text2image", KONTEXT | dict(width=48)),
    ("kontext", "image2image", KONTEXT | dict(true_cfg_scale=2.0, negative_prompt="sun", num_images_per_prompt=2)),
    ("kontext", "image2image", KONTEXT | dict(image=tiny.photo(45, 70))),
    ("kontext", "image2image", KONTEXT | dict(image=(1, 4, 6, 10))),
    ("flux2", "text2image", FLUX2 | dict(num_images_per_prompt=2, width=40, guidance_scale=1.5)),
    ("flux2", "text2image", FLUX2_EMBEDS | dict(latents=(1, 16, 4, 4), output_type="latent")),
    ("flux2", "image2image", FLUX2 | dict(prompt=["a cat", "sun"], num_images_per_prompt=2, sigmas=[1.0, 0.5])),
    ("flux2", "image2image", FLUX2 | dict(image=[tiny.photo(77, 91), tiny.photo(80, 64, 1)], height=None, width=None)),
    ("klein", "text2image", FLUX2 | dict(num_images_per_prompt=2, text_encoder_out_layers=[2, -1], width=40)),
    ("klein", "text2image", FLUX2_EMBEDS | dict(negative_prompt_embeds=(1, 5, 48), output_type="latent")),
    ("klein", "image2image", FLUX2 | dict(image=[tiny.photo(1200, 1000), tiny.photo(65, 99)], width=48)),
    ("klein-distilled", "text2image", FLUX2 | dict(height=45, width=37)),
    ("ideogram4", "text2image", IDEOGRAM4 | dict(prompt=["a cat", "red sun on"], num_images_per_prompt=2, mu=-0.4)),
    (
        "ideogram4",
        "text2image",
        IDEOGRAM4 | dict(latents=(1, 20, 16), guidance_scale=None, guidance_schedule=[5.0, 1.0, 0.0, 2.0], std=1.0),
    ),
    ("chroma", "text2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("chroma", "text2image", FLUX | dict(guidance_scale=1.0, width=48, sigmas=[1.0, 0.5])),
    ("chroma", "image2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2, strength=0.7, width=48)),
    ("chroma", "image2image", FLUX | SIGMAS | dict(image=(1, 4, 8, 8), guidance_scale=1.0)),
    ("chroma", "inpaint", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("chroma", "inpaint", FLUX | dict(latents=(1, 4, 8, 8), strength=0.7)),
    ("chroma", "inpaint", FLUX | GENTLE | CROP),
    ("auraflow", "text2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("auraflow", "text2image", FLUX | dict(guidance_scale=1.0, width=72, sigmas=[1.0, 0.5])),
    ("auraflow", "text2image", AURA_EMBEDS | dict(negative_prompt="a sun")),
    ("ovis", "text2image", OVIS | dict(negative_prompt="sun", num_images_per_prompt=2, width=48)),
    ("ovis", "text2image", OVIS | dict(prompt=["cat", "a red sun on the sea"])),
    ("ovis", "text2image", OVIS_EMBEDS | dict(sigmas=[1.0, 0.6, 0.2], output_type="latent")),
    ("ovis", "text2image", OVIS_EMBEDS | dict(negative_prompt_embeds=None, negative_prompt="sun", latents=(1, 16, 16))),
    ("ovis", "text2image", OVIS | dict(guidance_scale=1.0, height=45, width=37)),
    ("cogview3", "text2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("cogview3", "text2image", FLUX | dict(prompt=["red", "a cat"], original_size=(40, 60), width=48)),
    ("cogview3", "text2image", COGVIEW_EMBEDS | dict(guidance_scale=1.0, latents=(1, 4, 8, 8), output_type="latent")),
    ("cogview4", "text2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("cogview4", "text2image", FLUX | dict(prompt=["sun", "a red " + "cat " * 9], crops_coords_top_left=(4, 7))),
    ("cogview4", "text2image", FLUX | dict(negative_prompt="sea, " * 9, max_sequence_length=30, width=48)),
    ("cogview4", "text2image", COGVIEW_EMBEDS | dict(negative_prompt="a sun", latents=(1, 4, 8, 8))),
    ("cogview4", "text2image", COGVIEW_EMBEDS | dict(negative_prompt_embeds=(1, 5, 24), output_type="latent")),
    ("cogview4", "text2image", FLUX | dict(timesteps=[900.0, 500.5, 20.0])),
    ("cogview4", "text2image", FLUX | dict(sigmas=[0.9, 0.5, 0.4, 0.1])),
    ("krea2", "text2image", KREA2 | dict(negative_prompt="sun", num_images_per_prompt=2, width=48)),
    ("krea2", "text2image", KREA2 | dict(prompt=["cat", "a red sun on the sea"], height=45, width=37)),
    ("krea2", "text2image", KREA2 | KREA2_EMBEDS | dict(sigmas=[1.0, 0.6, 0.2], output_type="latent")),
    ("krea2", "text2image", KREA2 | dict(guidance_scale=0.0, latents=(1, 16, 16))),
    ("krea2-distilled", "text2image", KREA2 | dict(guidance_scale=0.0, width=64, max_sequence_length=12)),
    ("prx", "text2image", PRX | dict(negative_prompt="Sun", width=48)),
    ("prx", "text2image", PRX | dict(guidance_scale=1.0, prompt=["red", "a cat (on) sun"], num_images_per_prompt=2)),
    ("prx", "text2image", PRX | dict(timesteps=[900.0, 500.0, 100.0], latents=(1, 4, 8, 8), output_type="latent")),
    ("prx", "text2image", PRX | PRX_EMBEDS),
    ("prx", "text2image", PRX | PRX_EMBEDS | dict(prompt_attention_mask=None, negative_prompt_attention_mask=None)),
    ("prx", "text2image", PRX | dict(skip_text_cleaning=True, tokenizer_max_length=20)),
    ("prx-256", "text2image", dict(height=70, width=150, num_inference_steps=2)),
    ("hunyuan", "text2image", HUNYUAN | dict(negative_prompt="sun", num_images_per_prompt=2, guidance_rescale=0.6)),
    ("hunyuan", "text2image", HUNYUAN | MICRO | dict(prompt=["red", "a cat on sun"], num_images_per_prompt=2)),
    ("hunyuan", "text2image", HUNYUAN | HUNYUAN_EMBEDS | dict(guidance_scale=1.0, width=112)),
    ("hunyuan", "text2image", HUNYUAN | dict(height=90, width=50)),
    ("hunyuan-plain", "text2image", HUNYUAN | dict(height=32, latents=(1, 4, 4, 8))),
    ("sana", "text2image", SANA | dict(negative_prompt="Sun ", num_images_per_prompt=2)),
    ("sana", "text2image", SANA | dict(complex_human_instruction=TOLD, guidance_scale=1.0, width=64)),
    ("sana", "text2image", SANA | dict(prompt=["Cat", "a red sun"], num_images_per_prompt=2, output_type="latent")),
    ("sana", "text2image", SANA | SANA_EMBEDS | dict(latents=(1, 4, 8, 8))),
    ("sana", "text2image", dict(height=70, width=250, max_sequence_length=16, complex_human_instruction=None)),
    ("sana-1.5", "text2image", SANA | dict(height=96, num_inference_steps=3)),
    ("sana-1.5", "text2image", SANA | dict(timesteps=[950, 600, 100], num_inference_steps=3)),
    ("sana-1.5", "text2image", SANA | dict(sigmas=[0.9, 0.4])),
    ("lumina", "text2image", LUMINA | dict(negative_prompt="Sun ", num_images_per_prompt=2, width=96)),
    ("lumina", "text2image", LUMINA | dict(guidance_scale=1.0, latents=(1, 4, 8, 8), sigmas=[0.9, 0.4])),
    ("lumina", "text2image", LUMINA | dict(height=96, scaling_watershed=0.5, proportional_attn=False)),
    ("lumina", "text2image", LUMINA | dict(prompt=["Cat", "a red sun"], num_images_per_prompt=2)),
    ("lumina", "text2image", LUMINA | SANA_EMBEDS | dict(output_type="latent")),
    ("lumina2", "text2image", LUMINA2 | dict(negative_prompt="Sun ", num_images_per_prompt=2, width=96)),
    ("lumina2", "text2image", LUMINA2 | dict(guidance_scale=1.0, latents=(1, 4, 8, 8), sigmas=[0.9, 0.4])),
    ("lumina2", "text2image", LUMINA2 | dict(prompt=["Cat", "a red sun"], num_images_per_prompt=2)),
    ("lumina2", "text2image", LUMINA2 | dict(cfg_trunc_ratio=0.5, cfg_normalization=False)),
    ("lumina2", "text2image", LUMINA2 | dict(cfg_trunc_ratio=0.1, output_type="latent")),
    ("lumina2", "text2image", dict(system_prompt=None)),
    ("lumina2", "text2image", SANA_EMBEDS | dict(max_sequence_length=24)),
    ("lumina2", "text2image", LUMINA2_EMBEDS),
    ("pixart-alpha-1024", "text2image", PIXART | dict(negative_prompt="sun", num_images_per_prompt=2, width=96)),
    ("pixart-sigma", "text2image", PIXART | dict(negative_prompt="sun", num_images_per_prompt=2, width=96)),
    (
        "pixart-sigma",
        "text2image",
        PIXART | dict(guidance_scale=1.0, latents=(1, 4, 16, 16), prompt="cat", max_sequence_length=3),
    ),
    ("pixart-sigma", "text2image", PIXART_EMBEDS | dict(num_images_per_prompt=2)),
    ("pixart-sigma", "text2image", PIXART_EMBEDS | PIXART_NEGATIVE),
    ("pixart-sigma-256", "text2image", BINS | dict(height=50, width=91, prompt=["a Red cat ", "sun"])),
    ("pixart-sigma-256", "text2image", BINS | dict(height=300, width=130, output_type="latent")),
    ("qwenimage", "text2image", QWEN | dict(prompt=["red cat", "a cat on the sea, sun"], negative_prompt=["sun", ""])),
    (
        "qwenimage",
        "text2image",
        QWEN | dict(prompt=["red", "a cat on sea"], negative_prompt=["", "sun"], num_images_per_prompt=2),
    ),
    ("qwenimage", "text2image", QWEN | dict(negative_prompt=None, true_cfg_scale=4.0, width=52, max_sequence_length=3)),
    ("qwenimage", "text2image", QWEN | QWEN_EMBEDS | dict(latents=(1, 16, 16), output_type="latent")),
    ("qwenimage", "image2image", QWEN | SIGMAS | dict(image=(1, 4, 8, 8), num_images_per_prompt=2)),
    ("qwenimage", "image2image", QWEN | GENTLE | dict(image=tiny.photo(45, 70), width=48)),
    ("qwenimage", "inpaint", QWEN | GENTLE | CROP),
    ("qwenimage", "inpaint", QWEN | SIGMAS | dict(strength=1.0, num_images_per_prompt=2)),
    ("z-image", "text2image", FLUX | dict(negative_prompt="sun", num_images_per_prompt=2, cfg_normalization=0.6)),
    ("z-image", "text2image", Z_IMAGE | dict(guidance_scale=0.0, latents=(1, 4, 6, 8), width=32, height=24)),
    ("z-image", "text2image", Z_IMAGE | dict(cfg_truncation=0.4, cfg_normalization=True, num_inference_steps=6)),
    ("z-image", "text2image", Z_IMAGE | Z_EMBEDS | dict(num_images_per_prompt=2)),
    ("z-image", "image2image", GENTLE | dict(num_images_per_prompt=2)),
    ("z-image", "image2image", dict(image=tiny.photo(45, 70), latents=(1, 4, 16, 10), sigmas=[0.9, 0.7, 0.4, 0.1])),
    ("z-image", "inpaint", dict(cfg_truncation=0.5, negative_prompt="sun", num_images_per_prompt=2)),
    ("z-image", "inpaint", GENTLE | dict(latents=(1, 4, 16, 16))),
    (
        "z-image-shifted",
        "text2image",
        dict(height=48, width=64, prompt=["red", TOLD[2] * 20], negative_prompt=["", "a"]),
    ),
    ("kolors", "text2image", dict(negative_prompt="sun", num_images_per_prompt=2, max_sequence_length=64)),
    ("kolors", "text2image", MICRO | NEGATIVE_MICRO | dict(prompt=["sun", "一只红  cat"], width=48)),
    ("kolors", "text2image", KOLORS_EMBEDS | dict(guidance_scale=1.0, latents=(1, 4, 16, 16))),
    ("kolors", "text2image", KOLORS_EMBEDS | KOLORS_NEGATIVE | dict(denoising_end=0.6, output_type="latent")),
    ("kolors", "text2image", KOLORS_NEGATIVE | dict(sigmas=[9.0, 3.0, 0.5])),
    ("kolors", "image2image", GENTLE | dict(num_images_per_prompt=2)),
    ("kolors", "image2image", GENTLE | MICRO | NEGATIVE_MICRO | dict(image=tiny.photo(72, 40))),
    ("kolors", "image2image", GENTLE | dict(image=tiny.photo(72, 40), height=48, width=80)),
    ("kolors", "image2image", dict(image=(1, 4, 16, 16), denoising_start=0.5, denoising_end=0.9)),
    ("kolors", "image2image", GENTLE | dict(latents=(1, 4, 16, 16), negative_prompt="a cat")),
    ("lcm", "text2image", dict(guidance_scale=3.0)),
    ("lcm", "image2image", dict(original_inference_steps=20)),
    ("kandinsky22", "text2image", STAGES | dict(negative_prompt="sun", num_images_per_prompt=2, height=20)),
    ("kandinsky22", "text2image", STAGES | dict(prior_guidance_scale=1.0, latents=(1, 24), output_type="latent")),
    ("kandinsky22", "text2image", STAGES | dict(prompt=["red", "a cat"], guidance_scale=1.0, output_type="pt")),
    ("kandinsky22", "image2image", STAGES | GENTLE | dict(num_images_per_prompt=2)),
    ("kandinsky22", "image2image", STAGES | GENTLE | dict(height=40, width=40, output_type="pt")),
    ("kandinsky22-9", "inpaint", STAGES | dict(width=96, negative_prompt="sea", num_images_per_prompt=2)),
    ("kandinsky", "text2image", STAGES | dict(negative_prompt="sun", num_images_per_prompt=2, height=20)),
    ("kandinsky", "text2image", STAGES | dict(prompt=["a red", "cat on the sun " * 3], output_type="pt")),
    ("kandinsky", "image2image", STAGES | GENTLE),
    ("if", "text2image", IF | dict(negative_prompt="sun", num_images_per_prompt=2, height=38, width=48)),
    ("if", "text2image", IF | dict(prompt=["A red", " cat on the sun " * 20], guidance_scale=1.0, output_type="pt")),
    ("if", "text2image", IF_EMBEDS | dict(timesteps=[900, 500, 200, 3])),
    (
        "if",
        "text2image",
        dict(prompt="A red <person> CAT &amp; http://sun.com 123456", negative_prompt="Sun #22 (sea)"),
    ),
    ("if", "image2image", IF | dict(image=tiny.photo(90, 50), num_images_per_prompt=2)),
    ("if", "image2image", IF | dict(image=torch.rand(1, 3, 36, 24), strength=0.3, output_type="pt")),
    ("if", "inpaint", IF | dict(image=tiny.photo(50, 90), mask_image=tiny.mask(50, 90), negative_prompt="sea")),
    (
        "if",
        "inpaint",
        IF | dict(image=tiny.photo(32, 32), mask_image=torch.rand(1, 1, 32, 32), strength=0.6, output_type="pt"),
    ),
    ("kandinsky3", "text2image", dict(height=70, width=64, negative_prompt="sun", num_images_per_prompt=2)),
    ("kandinsky3", "text2image", WIDE3 | dict(prompt=["red", "a cat, a sun"], negative_prompt=["sea", "red cat on"])),
    ("kandinsky3", "text2image", WIDE3 | K3_EMBEDS | dict(output_type="latent", latents=(1, 4, 8, 16))),
    ("kandinsky3", "text2image", WIDE3 | dict(guidance_scale=1.0, output_type="pt")),
    ("kandinsky3", "image2image", dict(strength=0.8, image=tiny.photo(64, 96), num_images_per_prompt=2)),
    ("kandinsky3", "image2image", K3_EMBEDS | dict(strength=0.6, output_type="pt")),
    ("kandinsky-9", "inpaint", STAGES | dict(width=96, negative_prompt="sea", guidance_scale=7.0)),
    ("xl", "text2image", {}),
    ("xl", "text2image", dict(prompt_2="sun", negative_prompt="cat", negative_prompt_2="sun", clip_skip=1)),
    ("xl", "text2image", MICRO | NEGATIVE_MICRO | dict(num_images_per_prompt=2)),
    ("xl", "text2image", XL_EMBEDS | dict(denoising_end=0.6, output_type="latent")),
    ("xl", "text2image", dict(negative_prompt="cat", negative_pooled_prompt_embeds=(1, 24))),
    ("xl", "text2image", dict(denoising_end=1.0)),
    ("xl", "image2image", GENTLE),
    ("xl", "image2image", MICRO | NEGATIVE_MICRO | GENTLE | dict(guidance_rescale=0.7)),
    ("xl", "image2image", dict(image=(1, 4, 16, 16), denoising_start=0.5, denoising_end=0.9, num_inference_steps=8)),
    ("xl", "inpaint", {}),
    ("xl", "inpaint", GENTLE | CROP),
    ("xl-9", "inpaint", dict(strength=0.99)),
]


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path]) -> Any:
    @cache
    def load(name: str, task: str) -> tuple[Any, Any]:
        cls = UNFOUND.get((name, task), AUTO[task])
        loaded = [getattr(lib, cls).from_pretrained(checkpoint(name)) for lib in (diffusers, ap)]
        for pipe in loaded:
            pipe.set_progress_bar_config(disable=True)
        peer = loaded[0]
        if name == "chroma":  # the peer's inpainting asks for it
            peer.transformer.register_to_config(guidance_embeds=False)
        encoder = getattr(peer, "text_encoder", None)
        if encoder is not None and not hasattr(encoder, "text_model"):  # where the peer looks when clip_skip is given
            object.__setattr__(encoder, "text_model", encoder)
        return loaded[0], loaded[1]

    return load


def draw(value: Any) -> Any:
    """Shapes in CASES stand for random tensors; (1, width) is one of them too."""
    if (isinstance(value, tuple) and len(value) > 2) or (isinstance(value, tuple) and value[0] == 1):
        return torch.randn(value, generator=torch.Generator().manual_seed(len(value)))
    return list(value) if isinstance(value, list) else value  # some pipelines of the peer write into their prompts


def picture(pipe: Any, task: str, changes: dict[str, Any]) -> np.ndarray:
    call = dict(prompt="a red cat, sun", num_inference_steps=4, output_type="np") | tiny.inputs(task)
    call |= {name: draw(value) for name, value in changes.items()}
    out = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    if isinstance(out, torch.Tensor):
        return out.numpy()
    return out if isinstance(out, np.ndarray) else np.stack([np.asarray(p, np.float32) / 255 for p in out])


@pytest.mark.filterwarnings("ignore:The prompt is longer:UserWarning")
@pytest.mark.filterwarnings("ignore:.* are made:UserWarning", "ignore:max_area:UserWarning")  # sizes are rounded
@pytest.mark.parametrize(("name", "task", "changes"), CASES)
def test_same_picture_as_the_peer(pair: Any, name: str, task: str, changes: dict[str, Any]) -> None:
    peer, ours = pair(name, task)
    assert type(ours).__name__ == type(peer).__name__
    expected, actual = picture(peer, task, changes), picture(ours, task, changes)
    assert actual.shape == expected.shape
    level = 1 / 255 if changes.get("output_type") == "pil" else 0
    assert np.abs(actual - expected).max() <= level + TOLERANCE * max(1, np.abs(expected).max())
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sd", {}),
        ("xl", {}),
        ("sd3", {}),
        ("flux", FLUX),
        ("chroma", FLUX),
        ("auraflow", FLUX),
        ("ovis", OVIS),
        ("krea2", KREA2),
        ("lcm", {}),
        ("kolors", {}),
        ("kandinsky3", WIDE3),
        ("lumina", LUMINA),
        ("lumina2", LUMINA2),
    ],
)
def test_callbacks_see_and_change_the_same(pair: Any, name: str, size: dict[str, int]) -> None:
    traces: list[list[Any]] = []
    results = []
    for pipe in pair(name, "text2image"):
        trace: list[Any] = []

        def fade(pipe: Any, step: int, t: Any, tensors: dict[str, Any], trace: list[Any] = trace) -> dict[str, Any]:
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            trace.append((int(step), round(float(t), 3), shapes))
            return {"latents": tensors["latents"] * 0.9}

        results.append(
            picture(
                pipe,
                "text2image",
                size | dict(callback_on_step_end=fade, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]),
            )
        )
        traces.append(trace)
    assert traces[0] == traces[1]
    assert np.abs(results[0] - results[1]).max() <= TOLERANCE


def test_interrupting_keeps_what_there_is(pair: Any) -> None:
    def stop(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    peer, ours = (picture(pipe, "text2image", dict(callback_on_step_end=stop)) for pipe in pair("sd", "text2image"))
    assert np.abs(peer - ours).max() <= TOLERANCE
    assert not hasattr(pair("sd", "text2image")[1], "_interrupt")


def test_ending_the_guidance_from_a_callback(pair: Any) -> None:
    def end(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = dict(callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    peer, ours = (picture(pipe, "text2image", options) for pipe in pair("sd", "text2image"))
    assert np.abs(peer - ours).max() <= TOLERANCE


def test_swapping_the_scheduler(pair: Any) -> None:
    for name in ("DDIM", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"):
        results = []
        for lib, pipe in zip((diffusers, ap), pair("sd", "text2image"), strict=True):
            before = pipe.scheduler
            pipe.scheduler = getattr(lib, f"{name}Scheduler").from_config(pipe.scheduler.config)
            results.append(picture(pipe, "text2image", {}))
            pipe.scheduler = before
        assert np.abs(results[0] - results[1]).max() <= TOLERANCE
