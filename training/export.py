"""Write the trained model as an ordinary Stable Diffusion XL checkpoint in float16.

python training/export.py --vae RUN/vae.pt --run RUN/denoiser.pt --out src/autopipeline/shipped/scenes-128
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from autoencoder import CONFIG
from networks import UNET, text_config
from tokenizer import write as write_tokenizer

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_diffusers_version": "0.30.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
PARTICULARS = {  # what each class needs besides
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    "UniPCMultistepScheduler": {"solver_order": 2, "final_sigmas_type": "zero"},
}


def _json(path: Path, value: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    halves = {k: v.half().contiguous() for k, v in state.items() if v.is_floating_point()}
    assert all(v.isfinite().all() for v in halves.values()), "a weight does not fit into float16"
    save_file(halves, path, metadata={"format": "pt"})


def export(vae: Path, run: Path, out: Path, scheduler: str) -> None:
    saved = torch.load(vae, map_location="cpu", weights_only=True)
    mean = torch.load(run, map_location="cpu", weights_only=True)["mean"]
    parts = {name: {} for name in ("unet", "text_encoder", "text_encoder_2")}
    for key, value in mean.items():
        name, inner = key.split(".", 1)
        if name == "text_encoder" and not inner.startswith("text_model."):
            inner = "text_model." + inner
        parts[name][inner] = value
    _json(out / "model_index.json", {**INDEX, "scheduler": ["diffusers", scheduler]})
    settings = {"_class_name": scheduler, **SCHEDULER, **PARTICULARS[scheduler]}
    _json(out / "scheduler/scheduler_config.json", settings)
    _json(out / "unet/config.json", {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", **UNET})
    _json(
        out / "vae/config.json",
        {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", **CONFIG},
    )
    for name, kind in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")):
        _json(
            out / name / "config.json",
            {"architectures": [kind], "model_type": "clip_text_model", "torch_dtype": "float32", **text_config()},
        )
        _weights(out / name / "model.safetensors", parts[name])
    _weights(out / "unet/diffusion_pytorch_model.safetensors", parts["unet"])
    _weights(out / "vae/diffusion_pytorch_model.safetensors", saved["model"])
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(out / name)
    _json(out / "recommended.json", {"guidance_scale": 3.0, "num_inference_steps": 20})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler", choices=list(PARTICULARS))
    args = parser.parse_args()
    export(args.vae, args.run, args.out, args.scheduler)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
