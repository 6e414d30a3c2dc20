"""Which class a checkpoint leads to: the statements that must hold to the letter, the whole table, odd real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines import auto_pipeline

import autopipeline as ap
from autopipeline import names

MAPPINGS = {
    "text2image": auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    "image2image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    "inpaint": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
DECODERS = {
    "text2image": auto_pipeline._AUTO_TEXT2IMAGE_DECODER_PIPELINES_MAPPING,
    "image2image": auto_pipeline._AUTO_IMAGE2IMAGE_DECODER_PIPELINES_MAPPING,
    "inpaint": auto_pipeline._AUTO_INPAINT_DECODER_PIPELINES_MAPPING,
}
UNBUILT = next(row for row in names.rows() if not row.built and "text2image" in row.classes)
BOTH, INPAINT = ("image2image", "inpaint"), ("inpaint",)
ALL = ("text2image", *BOTH)
PEERS = set().union(*MAPPINGS.values())
OURS = {
    "stable-diffusion-3-pag": INPAINT,
    "hunyuan": BOTH,
    "hunyuan-pag": BOTH,
    "stable-diffusion-3-controlnet": ("image2image",),
    "stable-diffusion-3-controlnet-pag": ALL,
    "lcm": INPAINT,
    "pixart-alpha": BOTH,
    "pixart-alpha-pag": ALL,
    "pixart-sigma": BOTH,
    "sana": BOTH,
    "sana-pag": BOTH,
    "stable-diffusion-controlnet-pag": ("image2image",),
    "stable-diffusion-xl-controlnet-pag": INPAINT,
    "pixart-sigma-pag": BOTH,
    "auraflow": BOTH,
    "ideogram4": BOTH,
    "kandinsky3": INPAINT,
    "krea2": BOTH,
    "nucleusmoe-image": BOTH,
    "lumina": BOTH,
    "lumina2": BOTH,
    "cogview4": BOTH,
    "ovis": BOTH,
    "prx": BOTH,
    "kolors": INPAINT,
    "kolors-pag": BOTH,
}
"""Tasks of the rows that the peer has no class for."""
OURS |= {
    row.key: tuple(row.classes)
    for row in names.ROWS
    if "PAG" in row.addons and row.key not in PEERS and row.key not in OURS
}
MORE = OURS | {"chroma": BOTH}
"""And those that its mapping passes over, although it has the classes."""
CLASSES = sorted({cls.__name__ for table in (MAPPINGS, DECODERS) for rows in table.values() for cls in rows.values()})


@pytest.mark.parametrize("task", list(MAPPINGS))
def test_every_row_of_the_mapping(task: str) -> None:
    ours = {row.key: row.classes[task] for row in names.rows() if task in row.classes}
    ours = {key: name for key, name in ours.items() if task not in MORE.get(key, ())}
    assert ours == {key: cls.__name__ for key, cls in MAPPINGS[task].items()}


def test_every_family_can_have_its_attention_perturbed() -> None:
    """With every combination of its other add-ons, for every task."""
    for row in names.ROWS:
        if row.built and "PAG" not in row.addons:
            for task, name in row.classes.items():
                assert "PAG" in names.select(name, task, add=["PAG"]).row.addons


def test_what_only_we_have() -> None:
    assert {row.key: row.ours for row in names.rows() if row.ours} == OURS
    for key, tasks in MORE.items():
        assert not any(key in MAPPINGS[task] for task in tasks)


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("task", list(MAPPINGS))
def test_every_class_leads_where_the_peer_goes(class_name: str, task: str) -> None:
    try:
        expected = auto_pipeline._get_task_class(MAPPINGS[task], class_name).__name__
    except ValueError as error:
        if task in MORE.get(names.find(class_name).row.key, ()):  # type: ignore[union-attr]
            assert names.select(class_name, task).task == task
            return
        with pytest.raises(ValueError) as raised:
            names.select(class_name, task)
        assert str(raised.value).splitlines()[0] == str(error)
    else:
        chosen = names.select(class_name, task)
        assert chosen.row.classes[task] == expected


IGNORED = ("Combined", "Inpainting")
"""Classes with these in their names the peer finds whatever add-ons are asked for, which it then passes over."""


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """The class that the peer's AutoPipeline would load, by a checkpoint's class, task and options; None: an error."""
    autos = {task: getattr(diffusers, name) for task, name in names.AUTO.items()}
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(lambda cls, *_, **__: cls))
    monkeypatch.setattr(auto_pipeline, "_resolve_revision", lambda *_, **__: None)  # it would ask the Hub

    def ask(class_name: str, task: str, **options: Any) -> str | None:
        said = classmethod(lambda cls, *_, **__: {"_class_name": class_name})
        monkeypatch.setattr(autos[task], "load_config", said)
        try:
            return autos[task].from_pretrained("anywhere", **options).__name__
        except ValueError:
            return None

    return ask


CONTROLS = {
    "": {},
    "ControlNet": {"controlnet": object()},
    "ControlNetUnion": {"controlnet": diffusers.ControlNetUnionModel.__new__(diffusers.ControlNetUnionModel)},
}


@pytest.mark.parametrize("pag", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("task", list(MAPPINGS))
def test_every_class_with_every_option(peer: Callable[..., str | None], task: str, control: str, pag: bool) -> None:
    """Where the peer finds a class, ours is the same; where it ignores an option, ours is an error, never silence."""
    options = CONTROLS[control] | ({"enable_pag": True} if pag else {})
    add = [*([control] if control else []), *(["PAG"] if pag else [])]
    for class_name in CLASSES:
        expected = peer(class_name, task, **options)
        ignored = expected == peer(class_name, task) and bool(add) and any(word in class_name for word in IGNORED)
        try:
            chosen = names.select(class_name, task, add=add)
        except ValueError:
            assert expected is None or ignored, class_name
        else:
            here = names.whole(names.find(class_name))
            assert here is not None
            passed_over = pag and class_name == "FluxControlPipeline"  # the peer forgets one option over the other
            assert expected in (None, chosen.row.classes[task]) or ignored or passed_over, class_name
            assert (chosen.task, chosen.row.family) == (task, here.row.family)
            assert chosen.row.addons >= set(add)


def index(folder: Path, **entries: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "model_index.json").write_text(json.dumps(entries), "utf-8")
    return folder


def test_image_to_image_of_an_xl_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    pipe = ap.AutoPipelineForImage2Image.from_pretrained(checkpoint("xl"), torch_dtype=torch.bfloat16, device_map="cpu")
    assert type(pipe).__name__ == "StableDiffusionXLImg2ImgPipeline"
    assert type(pipe) is ap.StableDiffusionXLImg2ImgPipeline
    assert pipe.dtype == torch.bfloat16
    shown = repr(pipe)
    assert shown.startswith("StableDiffusionXLImg2ImgPipeline {\n")
    assert '\n  "_class_name": "StableDiffusionXLImg2ImgPipeline",\n' in shown


def test_printed_as_the_peer_prints(checkpoint: Callable[[str], Path]) -> None:
    peer = diffusers.AutoPipelineForImage2Image.from_pretrained(checkpoint("xl"))
    ours = ap.AutoPipelineForImage2Image.from_pretrained(checkpoint("xl"))
    assert json.loads(repr(ours).partition(" ")[2]) == json.loads(repr(peer).partition(" ")[2])
    assert repr(ours) == repr(peer)


def test_the_model_only_class(checkpoint: Callable[[str], Path]) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("xl"))
    assert type(pipe) is ap.StableDiffusionXLPipeline
    assert pipe.tasks() == ("text2image", "image2image", "inpaint")


def test_shap_e_is_refused_in_the_known_words(tmp_path: Path) -> None:
    folder = index(tmp_path / "shap-e", _class_name="ShapEImg2ImgPipeline", image_encoder=["transformers", "X"])
    (folder / "image_encoder").mkdir()
    with pytest.raises(ValueError) as raised:
        ap.AutoPipelineForImage2Image.from_pretrained(folder, torch_dtype=torch.float16)
    first, *rest = str(raised.value).splitlines()
    assert first == "AutoPipeline can't find a pipeline linked to ShapEImg2ImgPipeline for None"
    assert any("stable-diffusion-xl" in line for line in rest)


def test_wrong_task_says_what_would_work(tmp_path: Path) -> None:
    folder = index(tmp_path / "kontext", _class_name="FluxKontextPipeline")
    with pytest.raises(ValueError) as raised:
        ap.AutoPipelineForInpainting.from_pretrained(folder)
    lines = str(raised.value).splitlines()
    assert lines[0] == "AutoPipeline can't find a pipeline linked to FluxKontextPipeline for flux-kontext"
    assert lines[1] == "This checkpoint supports text-to-image, image-to-image, not inpainting."
    able = [row.key for row in names.rows() if row.built and "inpaint" in row.classes and not row.addons]
    assert lines[2].endswith(f"stable-diffusion, stable-diffusion-xl, {', '.join(able[2:])}.")


def test_autos_are_not_instantiable() -> None:
    for name in ("ForText2Image", "ForImage2Image", "ForInpainting", ""):
        with pytest.raises(OSError, match="from_pretrained"):
            getattr(ap, f"AutoPipeline{name}")()


def test_a_network_made_for_inpainting_only_inpaints(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("sd-9")
    with pytest.raises(ValueError, match="9 channels: it was made for inpainting"):
        ap.AutoPipelineForText2Image.from_pretrained(folder)
    assert type(ap.AutoPipeline.from_pretrained(folder)) is ap.StableDiffusionInpaintPipeline
    explanation = ap.explain(folder, "text2image")
    assert explanation.class_name is None
    assert explanation.tasks == ("inpaint",)
    assert "9 channels" in explanation.why


def test_explain_without_weights(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    explanation = ap.explain(checkpoint("xl"), "inpaint")
    assert explanation.class_name == "StableDiffusionXLInpaintPipeline"
    assert "model_index.json says StableDiffusionXLPipeline" in str(explanation)
    name = UNBUILT.classes["text2image"]
    other = ap.explain(index(tmp_path / "other", _class_name=name), "text2image")
    assert other.class_name is None
    assert name in other.why


def test_the_wild() -> None:
    """152 real model_index.json files, odd and broken ones included: the peer's class, or an error in our words."""
    rows = json.loads((Path(__file__).parent / "data" / "wild.json").read_text("utf-8"))
    assert len(rows) > 100
    for class_name, task, expected in rows:
        try:
            actual = names.select(class_name, task).row.classes[task]
        except ValueError as error:
            actual = None
            assert str(error).startswith("AutoPipeline can't find a pipeline linked to")
        if expected is not None:
            assert actual == expected, (class_name, task)


def test_no_controlnet_is_none(checkpoint: Callable[[str], Path]) -> None:
    for cls in (ap.AutoPipeline, ap.AutoPipelineForText2Image):
        assert type(cls.from_pretrained(checkpoint("xl"), controlnet=None)) is ap.StableDiffusionXLPipeline


def test_a_class_that_is_not_built_says_so() -> None:
    name = UNBUILT.classes["text2image"]
    with pytest.raises(AttributeError, match=f"{name} is not built in this version"):
        getattr(ap, name)


def test_dtypes_and_devices_in_every_spelling(checkpoint: Callable[[str], Path]) -> None:
    load = ap.DiffusionPipeline.from_pretrained
    assert load(checkpoint("sd"), torch_dtype=torch.float16, dtype="float16").dtype == torch.float16
    mixed = load(checkpoint("sd"), dtype={"unet": "auto", "default": "bfloat16"}, device_map={"default": "cpu"})
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.float32, torch.bfloat16)
    assert load(checkpoint("sd"), device_map=torch.device("cpu")).device.type == "cpu"


def test_a_network_made_for_inpainting_refuses_other_calls_and_switches(checkpoint: Callable[[str], Path]) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd-9"))
    with pytest.raises(ValueError, match="made for inpainting and can't do text-to-image"):
        pipe("red cat")
    with pytest.raises(ValueError, match="made for inpainting and can't do image-to-image"):
        ap.AutoPipelineForImage2Image.from_pipe(pipe)
    assert ap.AutoPipelineForInpainting.from_pipe(pipe).tasks() == ("inpaint",)


def test_from_pipe_takes_pipelines() -> None:
    for cls in (ap.DiffusionPipeline, ap.AutoPipelineForText2Image, ap.StableDiffusionPipeline):
        with pytest.raises(TypeError, match="takes a loaded pipeline, not str"):
            cls.from_pipe("x")  # type: ignore[arg-type]
