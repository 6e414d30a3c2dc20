"""Bad input gets one clear sentence, before anything is computed or written."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import autopipeline as ap
import tiny

Checkpoint = Callable[[str], Path]


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny checkpoint, to be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / "copy"))

    return make


@pytest.fixture(scope="module")
def pipe(checkpoint: Checkpoint) -> Any:
    made = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    made.set_progress_bar_config(disable=True)
    return made


def refusal(folder: Path) -> str:
    """What from_pretrained says; one sentence or two, on one line."""
    with pytest.raises(ap.CheckpointError) as raised:
        ap.AutoPipelineForText2Image.from_pretrained(folder)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path) -> None:
    assert "empty" in refusal(tmp_path)


def test_no_model_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"), [("{oops", "JSON"), ("[1]", "object"), ('{"unet": ["a", "b"]}', "_class_name")]
)
def test_damaged_model_index(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert says in refusal(tmp_path)


def test_unknown_class(copy: Any) -> None:
    folder = copy("sd")
    change_index(folder, _class_name="StableDifusionPipeline")
    with pytest.raises(ValueError, match="linked to StableDifusionPipeline for None\n(.*\n)*.*StableDiffusionPipeline"):
        ap.AutoPipelineForText2Image.from_pretrained(folder)
    with pytest.raises(ValueError, match="StableDifusionPipeline"):
        ap.DiffusionPipeline.from_pretrained(folder)


def change_index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_missing_component_folder(copy: Any) -> None:
    folder = copy("sd")
    shutil.rmtree(folder / "unet")
    assert "unet" in refusal(folder)


def test_component_outside_the_checkpoint(copy: Any, tmp_path: Path) -> None:
    folder = copy("sd")
    shutil.move(folder / "vae", tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    assert "outside" in refusal(folder)
    change_index(folder, **{"../elsewhere": ["diffusers", "AutoencoderKL"]})
    assert "elsewhere" in refusal(folder)


def test_component_of_an_unknown_class(copy: Any) -> None:
    folder = copy("sd")
    change_index(folder, unet=["diffusers", "UNet9DModel"])
    assert "UNet9DModel" in refusal(folder)


def weights(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("keep", [0, 6, 500, -40])
def test_truncated_weights(copy: Any, keep: int) -> None:
    folder = copy("sd")
    weights(folder).write_bytes(weights(folder).read_bytes()[:keep])
    assert "diffusion_pytorch_model.safetensors" in refusal(folder)


def test_corrupted_header(copy: Any) -> None:
    folder = copy("sd")
    weights(folder).write_bytes(struct.pack("<Q", 1 << 40) + b"x" * 100)
    assert "diffusion_pytorch_model.safetensors" in refusal(folder)


def test_misshaped_tensor_names_both_shapes(copy: Any) -> None:
    folder = copy("sd")
    tensors = load_file(weights(folder))
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()
    save_file(tensors, weights(folder))
    text = refusal(folder)
    assert "conv_in.weight" in text
    assert "16, 3, 3, 3" in text
    assert "16, 4, 3, 3" in text


def test_missing_tensor_is_named(copy: Any) -> None:
    folder = copy("sd")
    tensors = load_file(weights(folder))
    del tensors["conv_in.bias"]
    save_file(tensors, weights(folder))
    assert "conv_in.bias" in refusal(folder)


def test_pickled_weights_are_not_opened(copy: Any) -> None:
    folder = copy("sd")
    torch.save(load_file(weights(folder)), folder / "unet" / "diffusion_pytorch_model.bin")
    weights(folder).unlink()
    text = refusal(folder)
    assert "pickle" in text
    assert "use_safetensors=False" in text
    loaded = ap.DiffusionPipeline.from_pretrained(folder, use_safetensors=False)
    assert loaded.unet.config.in_channels == 4


def test_code_from_checkpoints_is_not_run(checkpoint: Checkpoint) -> None:
    for options in (dict(trust_remote_code=True), dict(custom_pipeline="x")):
        with pytest.raises(ValueError, match="no code from checkpoints"):
            ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), **options)


CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "did you mean 'guidance_scale'", dict(guidence_scale=3)),
    (ValueError, "height=100 is not a positive multiple of 8", dict(height=100, width=64)),
    (ValueError, "width=-8", dict(height=64, width=-8)),
    (ValueError, "strength has to be between 0 and 1, not 1.5", dict(image=tiny.photo(), strength=1.5)),
    (TypeError, "strength has no effect on text-to-image", dict(strength=0.5)),
    (TypeError, "height has no effect on image-to-image", dict(image=tiny.photo(), height=64)),
    (ValueError, "needs image", dict(mask_image=tiny.mask())),
    (ValueError, "mask", dict(image=tiny.photo(64, 64), mask_image=tiny.mask(64, 72))),
    (ValueError, "2 generators were given for 1 pictures", dict(generator=[torch.Generator(), torch.Generator()])),
    (ValueError, "2 seeds were given for 3 pictures", dict(prompt=["a", "b", "c"], seed=[1, 2])),
    (ValueError, "either seed or generator", dict(seed=1, generator=torch.Generator())),
    (ValueError, "negative_prompt has 2 entries for 1 prompts", dict(negative_prompt=["a", "b"])),
    (ValueError, "A prompt is needed", dict(prompt=None)),
    (ValueError, "not both", dict(prompt_embeds=torch.zeros(1, 77, 24))),
    (ValueError, "output_type='jpg'", dict(output_type="jpg")),
    (ValueError, "no adapter|none is loaded", dict(cross_attention_kwargs={"scale": 0.5})),
    (ValueError, "eta", dict(eta=0.5)),
    (ValueError, "callback_on_step_end_tensor_inputs", dict(callback_on_step_end_tensor_inputs=["x"])),
    (ValueError, "shape", dict(latents=torch.zeros(1, 4, 3, 3))),
    (ValueError, "timesteps", dict(timesteps=[1, 2], sigmas=[1.0, 2.0])),
    (ValueError, "clip_skip=9", dict(clip_skip=9)),
    (ValueError, "num_images_per_prompt=0", dict(num_images_per_prompt=0)),
    (ValueError, "num_inference_steps", dict(num_inference_steps=0)),
    (ValueError, "guidance_scale has 3 entries for 2 prompts", dict(prompt=["a", "b"], guidance_scale=[1, 2, 3])),
    (
        ValueError,
        "padding_mask_crop needs output_type='pil'",
        dict(image=tiny.photo(), mask_image=tiny.mask(), padding_mask_crop=4, output_type="np"),
    ),
]


@pytest.mark.parametrize(("error", "says", "changes"), CALLS)
def test_bad_calls(pipe: Any, error: type[Exception], says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=says) as raised:
        pipe(**dict(prompt="red cat", num_inference_steps=4) | changes)
    assert "\n" not in str(raised.value)


def test_a_strength_that_leaves_no_step(checkpoint: Checkpoint) -> None:
    gentle = ap.AutoPipelineForImage2Image.from_pretrained(checkpoint("sd-v"))
    with pytest.raises(ValueError, match="strength=0.1 leaves none of the 4 steps"):
        gentle("red cat", image=tiny.photo(), strength=0.1, num_inference_steps=4)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_is_lost(pipe: Any) -> None:
    long = "red " * 80 + "sun"
    with pytest.warns(UserWarning, match="red sun"):
        pipe(long, num_inference_steps=1, output_type="latent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("red " * 70, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_nan_names_the_component(checkpoint: Checkpoint, component: str) -> None:
    broken = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    broken.set_progress_bar_config(disable=True)
    with torch.no_grad():
        next(getattr(broken, component).parameters()).fill_(float("nan"))
        for name, weight in getattr(broken, component).named_parameters():
            if name.endswith("bias"):
                weight.fill_(float("nan"))
    with pytest.raises(ap.NotFiniteError, match=f"The {component} gave NaN"):
        broken("red cat", num_inference_steps=2)


def test_unknown_component_and_settings(checkpoint: Checkpoint) -> None:
    with pytest.raises(TypeError, match="did you mean 'unet'"):
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), unett=None)
    with pytest.raises(ValueError, match="is no dtype"):
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), torch_dtype="float17")
    with pytest.raises(ValueError, match="no device|no GPU"):
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), device_map="gpu")


def test_saving_over_a_file_or_into_nothing_leaves_nothing(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_dtypes_by_component(checkpoint: Checkpoint) -> None:
    half = ap.DiffusionPipeline.from_pretrained(
        checkpoint("sd"), torch_dtype={"unet": torch.bfloat16, "default": "float32"}
    )
    assert (half.unet.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    half.set_progress_bar_config(disable=True)
    assert np.isfinite(half("red cat", num_inference_steps=2, output_type="np").images).all()
    half.save_pretrained  # noqa: B018 - still there after loading in parts
    stored = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), dtype="auto")
    assert stored.unet.dtype == torch.float32
