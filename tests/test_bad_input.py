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


def as_shard(folder: Path, name: str) -> None:
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights(folder)), name)}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights(folder).unlink()


def test_an_index_of_safetensors_opens_no_pickled_shard(copy: Any) -> None:
    folder = copy("sd")
    torch.save(load_file(weights(folder)), folder / "unet" / "part.bin")
    as_shard(folder, "part.bin")
    assert "names part.bin, which is not safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd"])
def test_an_index_stays_in_its_folder(copy: Any, name: str) -> None:
    folder = copy("sd")
    as_shard(folder, name)
    assert "outside its folder" in refusal(folder)


class Code:
    """What a hostile pickle holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [Code(), [1, 2], {"a": 1}, b"rubbish"])
def test_pickled_weights_run_no_code(copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy("sd")
    weights(folder).unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ap.CheckpointError, match="without running code|else than tensors"):
        ap.DiffusionPipeline.from_pretrained(folder, use_safetensors=False)
    assert not Path("executed").exists()


def test_pickled_weights_of_old_versions(copy: Any) -> None:
    folder = copy("sd")
    state = load_file(weights(folder))
    weights(folder).unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded = ap.DiffusionPipeline.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(loaded.unet.conv_in.weight, state["conv_in.weight"])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vae/config.json", "[]"),
        ("vae/config.json", "[" * 100_000),
        ("scheduler/scheduler_config.json", "[1]"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "odd"}'),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "many"}'),
    ],
)
def test_odd_configs(copy: Any, file: str, text: str) -> None:
    folder = copy("sd")
    (folder / file).write_text(text)
    assert Path(file).name in refusal(folder)


def test_channels_that_are_no_numbers(copy: Any) -> None:
    folder = copy("sd")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_channels": "x"}))
    with pytest.raises(ValueError, match="4 and 'x' as numbers of channels"):
        ap.AutoPipelineForText2Image.from_pretrained(folder)


def test_whole_numbers_as_weights(copy: Any) -> None:
    folder = copy("sd")
    save_file(load_file(weights(folder)) | {"conv_in.bias": torch.zeros(16, dtype=torch.int32)}, weights(folder))
    assert "conv_in.bias" in refusal(folder)


def test_names_that_are_no_checkpoint(checkpoint: Checkpoint) -> None:
    with pytest.raises(ap.CheckpointError, match="is empty"):
        ap.DiffusionPipeline.from_pretrained("")
    with pytest.raises(ap.CheckpointError, match="is a file; a checkpoint is a folder"):
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd") / "model_index.json")
    with pytest.raises(ap.CheckpointError, match="neither a folder"):
        ap.DiffusionPipeline.from_pretrained("a" * 5000)


LOADS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "can't hold weights", dict(dtype="int8")),
    (ValueError, "can't hold weights", dict(torch_dtype=torch.int8)),
    (ValueError, "dtype names 'unett', which is no component; did you mean 'unet'", dict(dtype={"unett": "float16"})),
    (ValueError, "device_map names 'unett', which is no component; did you", dict(device_map={"unett": "cpu"})),
    (ValueError, "contradict each other", dict(dtype="float32", torch_dtype=torch.float16)),
    (ValueError, "'meta' is no device", dict(device_map="meta")),
    (ValueError, "3.5 is no device", dict(device_map=3.5)),
    (ValueError, "'sequential' is no device", dict(device_map="sequential")),
    (ValueError, "can't use one here", dict(device_map="xpu")),
    (ValueError, "set HTTPS_PROXY", dict(proxies={"https": "x"})),
    (ap.CheckpointError, "no variant 'fp16'; there are no variants at all", dict(variant="fp16")),
    (TypeError, "vae has to be AutoencoderKL or AutoencoderTiny, not str", dict(vae="x")),
    (TypeError, "scheduler has to be Scheduler, not PNDMScheduler of diffusers", "peer"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("error", "says", "options"), LOADS)
def test_bad_options_of_loading(checkpoint: Checkpoint, error: type[Exception], says: str, options: Any) -> None:
    if options == "peer":
        import diffusers

        options = dict(scheduler=diffusers.PNDMScheduler())
    with pytest.raises(error, match=says) as raised:
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there(checkpoint: Checkpoint, pipe: Any) -> None:
    for name in ("cuda", 0, torch.device("cuda"), {"unet": "cuda:1"}):
        with pytest.raises(ValueError, match="no GPU"):
            ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), device_map=name)
    with pytest.raises(ValueError, match="no GPU"):
        pipe.to("cuda")
    with pytest.warns(UserWarning, match="found no GPU; everything goes on the CPU"):
        ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), device_map="balanced")


def test_moving_to_what_is_no_place(pipe: Any) -> None:
    for args, says in ((("gpu",), "no device"), (("meta",), "no device"), (("cpu", "cpu"), "takes one device")):
        with pytest.raises((ValueError, TypeError), match=says):
            pipe.to(*args)
    with pytest.raises(ValueError, match="can't hold weights"):
        pipe.to(torch.int8)
    assert pipe.to("cpu", dtype="float32", silence_dtype_warnings=True) is pipe


def test_a_variant_that_some_components_lack(copy: Any) -> None:
    folder = copy("sd")
    save_file({key: tensor.half() for key, tensor in load_file(weights(folder)).items()}, folder / "unet" / HALF)
    with pytest.warns(UserWarning, match="vae, text_encoder have no variant 'fp16'; the plain weights are taken"):
        loaded = ap.DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype="stored")
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.float16, torch.float32)
    with pytest.raises(ap.CheckpointError, match="no variant 'ema'; there are fp16"):
        ap.DiffusionPipeline.from_pretrained(folder, variant="ema")


HALF = "diffusion_pytorch_model.fp16.safetensors"


def test_the_class_of_another_family(checkpoint: Checkpoint, pipe: Any) -> None:
    with pytest.raises(ValueError, match="components are not those of a StableDiffusionPipeline; AutoPipelineForText2"):
        ap.StableDiffusionPipeline.from_pretrained(checkpoint("xl"))
    with pytest.raises(ValueError, match="components are not those of a StableDiffusionXLImg2ImgPipeline"):
        ap.StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    assert ap.StableDiffusionPipeline.from_pretrained(checkpoint("lcm"))  # relatives


def test_switching_with_components_that_do_not_fit(pipe: Any) -> None:
    with pytest.raises(TypeError, match="vae has to be AutoencoderKL or AutoencoderTiny, not UNet2DConditionModel"):
        ap.AutoPipelineForImage2Image.from_pipe(pipe, vae=pipe.unet)
    with pytest.raises(TypeError, match="from_pipe changes nothing about the components"):
        ap.AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=torch.float16)


def test_code_from_checkpoints_is_not_run(checkpoint: Checkpoint) -> None:
    for options in (dict(trust_remote_code=True), dict(custom_pipeline="x")):
        with pytest.raises(ValueError, match="no code from checkpoints"):
            ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), **options)


CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "did you mean 'guidance_scale'", dict(guidence_scale=3)),
    (ValueError, "height=100 is not a positive multiple of 8", dict(height=100, width=64)),
    (ValueError, "width=0 has to be a whole number of at least 1", dict(width=0)),
    (ValueError, "width=-8 has to be", dict(height=64, width=-8)),
    (ValueError, "strength=1.5 has to be a number from 0 to 1", dict(image=tiny.photo(), strength=1.5)),
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
    (TypeError, "guidance_scale='7' has to be a number", dict(guidance_scale="7")),
    (ValueError, "guidance_scale=nan has to be a number", dict(guidance_scale=float("nan"))),
    (ValueError, "guidance_scale has 0 entries", dict(guidance_scale=[])),
    (ValueError, "guidance_rescale=-1 has to be a number from 0 to 1", dict(guidance_rescale=-1)),
    (ValueError, "height=64.0 has to be a whole number", dict(height=64.0, width=64)),
    (TypeError, "num_images_per_prompt='2' has to be a whole number", dict(num_images_per_prompt="2")),
    (TypeError, "generator=1 has to be a torch.Generator|generator", dict(generator="x")),
    (TypeError, "cancel=True has to be a threading.Event", dict(cancel=True)),
    (TypeError, "callback_on_step_end has to be a function|callback_on_step_end", dict(callback_on_step_end="f")),
    (TypeError, "has to be a list of names", dict(callback_on_step_end_tensor_inputs=None)),
    (TypeError, "cross_attention_kwargs has to be a dict", dict(cross_attention_kwargs=0.5)),
    (TypeError, "seed=True", dict(seed=True)),
    (ValueError, "seed=1.5 has to be a whole number", dict(seed=[1.5])),
    (ValueError, "at most 64 bits", dict(seed=2**70)),
    (TypeError, "timesteps='x' has to be a list of numbers", dict(timesteps="x")),
    (TypeError, "latents=ndarray has to be a torch.Tensor", dict(latents=np.zeros((1, 4, 8, 8)))),
    (TypeError, "prompt_embeds has to be a torch.Tensor", dict(prompt=None, prompt_embeds=[1])),
    (ValueError, "prompt_embeds has the shape", dict(prompt=None, prompt_embeds=torch.zeros(77, 24))),
    (ValueError, "prompt_embeds has NaN", dict(prompt=None, prompt_embeds=torch.full((1, 77, 24), float("nan")))),
    (ValueError, "reads 77; pass negative_prompt_embeds", dict(prompt=None, prompt_embeds=torch.zeros(1, 80, 24))),
    (ValueError, "clip_skip has no effect", dict(prompt=None, prompt_embeds=torch.zeros(1, 77, 24), clip_skip=1)),
    (ValueError, "The list of prompts is empty", dict(prompt=[])),
    (
        ValueError,
        "masked_image_latents has an effect only on networks made for inpainting",
        dict(image=tiny.photo(), mask_image=tiny.mask(), masked_image_latents=torch.zeros(1, 4, 8, 8)),
    ),
    (
        ValueError,
        "image has latents of .4, 4, 4.",
        dict(image=torch.zeros(1, 4, 4, 4), mask_image=tiny.mask()),
    ),
]


@pytest.mark.parametrize(("error", "says", "changes"), CALLS)
def test_bad_calls(pipe: Any, error: type[Exception], says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=says) as raised:
        pipe(**dict(prompt="red cat", num_inference_steps=4) | changes)
    assert "\n" not in str(raised.value)


XL_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("aesthetic_score has no effect on a base model", dict(image=tiny.photo(), aesthetic_score=3.0)),
    ("negative_target_size has no effect without both", dict(negative_target_size=(64, 64))),
    ("negative_crops_coords_top_left has no effect", dict(negative_crops_coords_top_left=(1, 2))),
    ("original_size=.1, 2, 3. has to be a pair", dict(original_size=(1, 2, 3))),
    ("denoising_end=0", dict(denoising_end=0.0)),
    ("denoising_start=0.0 has to be between", dict(image=tiny.photo(), denoising_start=0.0)),
    ("negative_pooled_prompt_embeds needs", dict(negative_pooled_prompt_embeds=torch.zeros(1, 24))),
    ("latents have the shape", dict(image=tiny.photo(), latents=torch.zeros(2, 4, 8, 8))),
]


@pytest.mark.parametrize(("says", "changes"), XL_CALLS)
def test_bad_calls_of_sdxl(checkpoint: Checkpoint, says: str, changes: dict[str, Any]) -> None:
    xl = ap.DiffusionPipeline.from_pretrained(checkpoint("xl"))
    with pytest.raises(ValueError, match=says):
        xl(**dict(prompt="red cat", num_inference_steps=4) | changes)


def test_lcm_needs_its_scheduler(checkpoint: Checkpoint) -> None:
    lcm = ap.DiffusionPipeline.from_pretrained(checkpoint("lcm"))
    lcm.scheduler = ap.DDIMScheduler.from_config(lcm.scheduler.config)
    with pytest.raises(ValueError, match="needs LCMScheduler; DDIMScheduler does not know"):
        lcm("red cat")


def test_callbacks_keep_what_they_set_and_give_back_what_is_known(pipe: Any) -> None:
    seen: list[int] = []

    def counting(view: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        view.count = getattr(view, "count", 0) + 1
        assert view.do_classifier_free_guidance
        seen.append(view.count)
        return {}

    pipe("red cat", num_inference_steps=3, seed=1, callback_on_step_end=counting)
    assert seen == list(range(1, len(seen) + 1))
    assert not hasattr(pipe, "count")
    with pytest.raises(ValueError, match="gave back 'latent'; it may give latents"):
        pipe("red cat", num_inference_steps=3, callback_on_step_end=lambda *_: {"latent": torch.zeros(1)})


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
    stored = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"), dtype="stored")
    assert stored.unet.dtype == torch.float32
