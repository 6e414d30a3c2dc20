"""The Hub, over a real socket: which files are fetched, and what is said when something is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autopipeline as ap
from autopipeline import cli
from autopipeline.loading import hub as ours
from hub_server import TOKEN, Hub, serving

XL, SHAPE, SD = "RunDiffusion/Juggernaut-XL-v9", "openai/shap-e-img2img", "tiny/stable-diffusion"


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> Iterator[Hub]:
    with serving() as running:
        for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub") and m]:
            for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
                if isinstance(getattr(module, name, None), str):
                    monkeypatch.setattr(module, name, running.url)
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add(XL, checkpoint("xl"))
        running.add(SHAPE, shape(tmp_path / "shape"))
        running.add(SD, copied(checkpoint("sd"), tmp_path / "sd"))
        yield running


def shape(folder: Path) -> Path:
    (folder / "prior").mkdir(parents=True)
    (folder / "prior" / "config.json").write_text("{}")
    (folder / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"much" * 1000)
    index = {"_class_name": "ShapEImg2ImgPipeline", "prior": ["shap_e", "PriorTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def copied(source: Path, target: Path) -> Path:
    """A repository as they are: several formats of the same weights side by side."""
    shutil.copytree(source, target)
    plain = target / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, target / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for name in ("diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack", "model.onnx", "openvino_model.bin"):
        (target / "unet" / name).write_bytes(b"not to be fetched")
    (target / "v1-5-pruned.safetensors").write_bytes(b"not to be fetched")
    (target / "README.md").write_text("# tiny")
    return target


def test_the_mission(hub: Hub) -> None:
    pipe = ap.AutoPipelineForImage2Image.from_pretrained(XL, torch_dtype=torch.bfloat16, device_map="cpu")
    assert type(pipe) is ap.StableDiffusionXLImg2ImgPipeline
    assert repr(pipe).startswith("StableDiffusionXLImg2ImgPipeline {\n")
    assert '"_class_name": "StableDiffusionXLImg2ImgPipeline",' in repr(pipe)
    assert f'"_name_or_path": "{XL}"' in repr(pipe)
    assert type(ap.DiffusionPipeline.from_pretrained(XL)) is ap.StableDiffusionXLPipeline
    with pytest.raises(ValueError) as raised:
        ap.AutoPipelineForImage2Image.from_pretrained(SHAPE, torch_dtype=torch.float16)
    lines = str(raised.value).splitlines()
    assert lines[0] == "AutoPipeline can't find a pipeline linked to ShapEImg2ImgPipeline for None"
    assert f"{SHAPE}/prior/diffusion_pytorch_model.safetensors" not in hub.fetched


def test_only_what_is_needed_is_fetched_and_only_once(hub: Hub) -> None:
    ap.AutoPipelineForText2Image.from_pretrained(SD)
    fetched = {name.removeprefix(f"{SD}/") for name in hub.fetched}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert {name for name in fetched if name.endswith((".bin", ".msgpack", ".onnx"))} == set()
    assert not fetched & {"v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(hub.fetched.values()) == {1}
    ap.AutoPipelineForInpainting.from_pretrained(SD)
    assert set(hub.fetched.values()) == {1}


def test_a_component_that_the_caller_brings_is_not_fetched(hub: Hub, checkpoint: Any) -> None:
    vae = ap.AutoencoderKL.from_pretrained(checkpoint("sd") / "vae")
    assert ap.DiffusionPipeline.from_pretrained(SD, vae=vae).vae is vae
    assert f"{SD}/vae/diffusion_pytorch_model.safetensors" not in hub.fetched


def test_explaining_reads_no_weights(hub: Hub) -> None:
    assert ap.explain(XL, "inpaint").class_name == "StableDiffusionXLInpaintPipeline"
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    planned = ours.plan(SD)
    assert {file.file: file.cached for file in planned}["unet/diffusion_pytorch_model.safetensors"] is False
    assert sum(file.bytes for file in planned) > 10_000


def test_variants(hub: Hub) -> None:
    with pytest.warns(UserWarning, match="have no variant 'fp16'; the plain weights are taken"):
        pipe = ap.DiffusionPipeline.from_pretrained(SD, variant="fp16", dtype="stored")
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    assert f"{SD}/unet/diffusion_pytorch_model.safetensors" not in hub.fetched
    with pytest.raises(ap.CheckpointError, match="no variant 'ema'; there are fp16"):
        ap.DiffusionPipeline.from_pretrained(SD, variant="ema")


def test_shards(hub: Hub, checkpoint: Any, tmp_path: Path) -> None:
    whole = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    whole.save_pretrained(tmp_path / "sharded", max_shard_size=50_000)
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 2
    hub.add("tiny/sharded", tmp_path / "sharded")
    loaded = ap.DiffusionPipeline.from_pretrained("tiny/sharded")
    for name, weight in whole.unet.state_dict().items():
        assert torch.equal(weight, loaded.unet.state_dict()[name])


def test_a_repository_with_pickled_weights_only(
    hub: Hub, checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused in a sentence, is taken on request, and `inspect` says what it is, here and over there."""
    folder = shutil.copytree(checkpoint("sd"), tmp_path / "pickled")
    for file in list(folder.rglob("*.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin" if file.stem == "model" else file.stem + ".bin"))
        file.unlink()
    hub.add("tiny/pickled", folder)
    with pytest.raises(ap.CheckpointError, match="pickled"):
        ap.DiffusionPipeline.from_pretrained("tiny/pickled")
    assert cli.run(["inspect", str(folder)]) == 0
    assert "UNet2DConditionModel           only pickled weights" in capsys.readouterr().out
    code = cli.run(["inspect", "tiny/pickled"])
    assert (code, "pickled" in capsys.readouterr().err) == (3, True)
    assert ap.DiffusionPipeline.from_pretrained("tiny/pickled", use_safetensors=False).unet.config.in_channels == 4


def test_revisions(hub: Hub, checkpoint: Any) -> None:
    hub.add(SD, checkpoint("sd-9"), "inpainting")
    assert ap.AutoPipelineForInpainting.from_pretrained(SD, revision="inpainting").unet.config.in_channels == 9
    assert ap.AutoPipelineForInpainting.from_pretrained(SD).unet.config.in_channels == 4
    with pytest.raises(ap.CheckpointError, match="no revision 'v9'"):
        ap.DiffusionPipeline.from_pretrained(SD, revision="v9")


def test_tokens_and_gates(hub: Hub) -> None:
    hub.private.add(SD)
    with pytest.raises(ap.CheckpointError, match="a private one needs token="):
        ap.DiffusionPipeline.from_pretrained(SD, token=False)
    assert ap.DiffusionPipeline.from_pretrained(SD, token=TOKEN)
    hub.gated.add(XL)
    with pytest.raises(ap.CheckpointError, match="gated: accept its terms"):
        ap.DiffusionPipeline.from_pretrained(XL, token=False)


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ap.CheckpointError, match="neither a folder here nor a repository"):
        ap.DiffusionPipeline.from_pretrained("nobody/nothing")
    with pytest.raises(ap.CheckpointError, match="neither a folder here, nor a shipped model, nor a repository"):
        ap.DiffusionPipeline.from_pretrained("a/b/c/d")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.add("tiny/bare", tmp_path / "bare")
    with pytest.raises(ap.CheckpointError, match="has no model_index.json"):
        ap.DiffusionPipeline.from_pretrained("tiny/bare")
    with pytest.raises(ap.CheckpointError, match="local_files_only is set"):
        ap.DiffusionPipeline.from_pretrained(SD, local_files_only=True)


def test_the_cache_is_enough(hub: Hub) -> None:
    ap.DiffusionPipeline.from_pretrained(SD)
    hub.folders.clear()
    assert ap.AutoPipelineForImage2Image.from_pretrained(SD, local_files_only=True).unet is not None


def test_an_interrupted_download_is_taken_up_again(hub: Hub) -> None:
    hub.cut.add(f"{SD}/unet/diffusion_pytorch_model.safetensors")
    try:
        pipe = ap.DiffusionPipeline.from_pretrained(SD)
    except ap.CheckpointError:
        pipe = ap.DiffusionPipeline.from_pretrained(SD)
    assert torch.isfinite(pipe.unet.conv_in.weight).all()


def test_the_endpoint_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    code = f"import autopipeline as ap; print(ap.explain({XL!r}, 'image2image').class_name)"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "StableDiffusionXLImg2ImgPipeline"


def test_a_decoder_and_the_prior_that_its_card_names(hub: Hub, checkpoint: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("kandinsky22-decoder"), tmp_path / "decoder")
    (tmp_path / "decoder" / "README.md").write_text("---\nprior:\n- tiny/prior\n---\n")
    hub.add("tiny/decoder", tmp_path / "decoder")
    hub.add("tiny/prior", checkpoint("kandinsky22-prior"))
    pipe = ap.AutoPipelineForText2Image.from_pretrained("tiny/decoder")
    assert type(pipe) is ap.KandinskyV22CombinedPipeline
    assert "tiny/prior/prior/diffusion_pytorch_model.safetensors" in hub.fetched
    assert set(hub.fetched.values()) == {1}
    local = ap.AutoPipelineForText2Image.from_pretrained(tmp_path / "decoder", prior="tiny/prior")
    call = dict(prompt="cat", height=32, width=32, num_inference_steps=2, prior_num_inference_steps=2, seed=7)
    assert (pipe(**call, output_type="pt").images == local(**call, output_type="pt").images).all()


def test_a_card_from_the_hub_names_no_folder_of_this_machine(hub: Hub, checkpoint: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("kandinsky22-decoder"), tmp_path / "decoder")
    card = f"---\nprior:\n- {checkpoint('kandinsky22-prior')}\n---\n"
    (tmp_path / "decoder" / "README.md").write_text(card)
    hub.add("tiny/decoder", tmp_path / "decoder")
    with pytest.raises(ap.CheckpointError):
        ap.AutoPipelineForText2Image.from_pretrained("tiny/decoder")


def test_a_prior_that_is_not_there(hub: Hub, checkpoint: Any) -> None:
    with pytest.raises(ap.CheckpointError, match="tiny/nowhere"):
        ap.AutoPipelineForText2Image.from_pretrained(checkpoint("kandinsky22-decoder"), prior="tiny/nowhere")
