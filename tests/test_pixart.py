"""PixArt: the network, sizes, captions, callbacks and PAG, beside what the common tests try."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma

import autopipeline as ap
import tiny
from autopipeline import captions
from autopipeline.families import bins

Checkpoint = Callable[[str], Path]
CALL = dict(
    prompt="a red cat, sun",
    num_inference_steps=3,
    output_type="np",
    height=64,
    width=64,
    max_sequence_length=16,
    clean_caption=False,
    use_resolution_binning=False,
)
TEXT = dict(cross_attention_dim=1152, caption_channels=4096)
PUBLISHED = {
    "alpha-1024": TEXT | dict(sample_size=128, norm_type="ada_norm_single"),
    "alpha-512": TEXT | dict(sample_size=64),
    "sigma-1024": TEXT | dict(sample_size=128, use_additional_conditions=False, interpolation_scale=2),
    "sigma-2k": TEXT | dict(sample_size=256, use_additional_conditions=False, interpolation_scale=4),
}


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint) -> Any:
    @cache
    def get(lib: Any, name: str, cls: str, **options: Any) -> Any:
        pipe = getattr(lib, cls).from_pretrained(checkpoint(name), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def picture(pipe: Any, **changes: Any) -> Any:
    return pipe(**CALL | changes, generator=torch.Generator().manual_seed(3)).images


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        networks = [lib.PixArtTransformer2DModel(**PUBLISHED[name]) for lib in (diffusers, ap)]
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in networks]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "changes",
    [
        dict(sample_size=24, patch_size=1, interpolation_scale=0.7),
        dict(norm_elementwise_affine=True, norm_eps=1e-3, attention_bias=False, out_channels=None),
        dict(caption_channels=None, num_attention_heads=2, attention_head_dim=12, num_layers=1),
        dict(use_additional_conditions=True, in_channels=6),
    ],
)
def test_the_network_is_the_peers(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.PixArtTransformer2DModel(**tiny.PIXART | changes), 1)
    ours = ap.PixArtTransformer2DModel(**tiny.PIXART | changes).eval()
    ours.load_state_dict(peer.state_dict())
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, ours.config.in_channels, 8, 12, generator=random)
    text, mask = torch.randn(2, 5, 24, generator=random), torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    t = torch.tensor([981, 20])
    size: dict[str, Any] = {}
    if ours.sized:
        size = dict(resolution=torch.tensor([[512.0, 768.0]] * 2), aspect_ratio=torch.tensor([[0.6667]] * 2))
    with torch.no_grad():
        told = size or None
        expected = peer(x, text, t, told, encoder_attention_mask=mask).sample
        places = ours.places(8, 12)
        made = ours(x, t, encoder_hidden_states=ours.captions(text), encoder_attention_mask=mask, places=places, **size)
    assert torch.allclose(made, expected, atol=1e-5)


def test_odd_networks_are_refused() -> None:
    for change in (dict(norm_type="ada_norm_zero"), dict(activation_fn="geglu"), dict(attention_type="gated")):
        with pytest.raises(ap.CheckpointError, match="is not supported"):
            ap.PixArtTransformer2DModel(**tiny.PIXART | change)


def test_older_checkpoints(load: Any, tmp_path: Path) -> None:
    """They name the class of the network as it once was, and hold the text of no caption."""
    import json

    from safetensors.torch import load_file, save_file

    pipe = load(ap, "pixart-sigma", "PixArtSigmaPipeline")
    pipe.save_pretrained(tmp_path / "old")
    index = tmp_path / "old" / "model_index.json"
    entries = json.loads(index.read_text("utf-8"))
    index.write_text(json.dumps(entries | dict(transformer=["diffusers", "Transformer2DModel"])), "utf-8")
    weights = tmp_path / "old" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"caption_projection.y_embedding": torch.zeros(120, 24)}, weights)
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "old")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(pipe), picture(again))


def test_sizes_are_those_of_the_peer() -> None:
    tables = {
        side: getattr(pipeline_pixart_sigma, f"ASPECT_RATIO_{side}_BIN", None)
        or getattr(pipeline_pixart_alpha, f"ASPECT_RATIO_{side}_BIN")
        for side in (256, 512, 1024, 2048)
    }
    nearest = diffusers.image_processor.PixArtImageProcessor.classify_height_width_bin
    for side, table in tables.items():
        assert [tuple(part * side / 16 for part in size) for size in bins.SIZES[side]] == [*map(tuple, table.values())]
        for height in range(100, 3000, 97):
            assert bins.nearest(side, height, 1000) == nearest(height, 1000, table)


def test_a_network_without_a_list_of_sizes(load: Any) -> None:
    with pytest.raises(ValueError, match="pass use_resolution_binning=False"):
        picture(load(ap, "pixart-sigma", "PixArtSigmaPipeline"), use_resolution_binning=True)


CAPTIONS = [
    "A <b>Red&nbsp;cat</b> on https://example.com/a/b by @someone &amp; friends",
    "this-is-my-cute-cat_photo, jc6640 jc6640vc 6640vc231  \u00abquoted\u00bb \u2014 dash",
    '"""SALE""" *** (free shipping) page 12 10x20 cat.png 1920\u00d71080 12345678 #12 #123456',
    "sun :  sea,red. cat..cat worldwide free shipping click for more www.example.org/x 10.0.0.1 4:30 ",
    "\u4e00\u4e8c\u3231 sun\\nsea <person> 100%25 %20 j2d1a2a 'quoted'",
    ".hidden",
    "",
]


def test_captions_are_cleaned_as_the_peer_cleans_them(load: Any) -> None:
    pytest.importorskip("bs4")
    pytest.importorskip("ftfy")
    peer = load(diffusers, "pixart-sigma", "PixArtSigmaPipeline")
    assert captions.prepared(CAPTIONS, True) == peer._text_preprocessing(CAPTIONS, clean_caption=True)


def test_without_the_packages_captions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match="clean_caption needs beautifulsoup4 and ftfy .*, so the prompts are not cleaned"
    ):
        assert captions.prepared([" A <b>Cat "], True) == ["a <b>cat"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captions.prepared([" A <b>Cat "], False) == ["a <b>cat"]


@pytest.mark.parametrize("name", ["PixArtAlpha", "PixArtSigma", "PixArtSigmaPAG"])
def test_signatures_are_those_of_the_peer(name: str) -> None:
    def shown(lib: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(getattr(lib, f"{name}Pipeline").__call__).parameters.items()
        return [(key, p.default) for key, p in found if p.kind is p.POSITIONAL_OR_KEYWORD]

    added = ["callback_on_step_end", "callback_on_step_end_tensor_inputs"]
    assert [(key, default) for key, default in shown(ap) if key not in added] == shown(diffusers)


@pytest.mark.parametrize("scheduler", [None, "HeunDiscreteScheduler"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_older_callback(load: Any, every: int, scheduler: str | None) -> None:
    seen: list[list[Any]] = []
    for lib in (diffusers, ap):
        pipe, trace = load(lib, "pixart-sigma", "PixArtSigmaPipeline"), []
        before = pipe.scheduler
        if scheduler is not None:
            pipe.scheduler = getattr(lib, scheduler).from_config(before.config)

        def look(step: int, t: Any, latents: torch.Tensor, trace: list[Any] = trace) -> None:
            trace.append((step, int(t), round(float(latents.std()), 3)))

        picture(pipe, callback=look, callback_steps=every, num_inference_steps=4)
        seen.append(trace)
        pipe.scheduler = before
    assert seen[0] == seen[1]


def test_one_step_of_alpha_is_the_picture_itself(load: Any) -> None:
    made = []
    for lib in (diffusers, ap):
        pipe = load(lib, "pixart-alpha-1024", "PixArtAlphaPipeline")
        before, pipe.scheduler = pipe.scheduler, lib.DDPMScheduler.from_config(pipe.scheduler.config)
        made.append(picture(pipe, num_inference_steps=1, timesteps=[400], guidance_scale=1.0, output_type="latent"))
        pipe.scheduler = before
    assert torch.allclose(made[0], made[1], atol=2e-3)


@pytest.mark.parametrize("layers", ["blocks.1", ["blocks.0", "blocks.2"]])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_perturbed_attention(load: Any, checkpoint: Checkpoint, layers: Any, scale: float) -> None:
    pipes = [
        lib.PixArtSigmaPAGPipeline.from_pretrained(checkpoint("pixart-sigma"), pag_applied_layers=layers)
        for lib in (diffusers, ap)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    changes = dict(guidance_scale=scale, pag_scale=2.5, num_images_per_prompt=2)
    expected, actual = (picture(pipe, **changes) for pipe in pipes)
    assert np.abs(expected - actual).max() < 2e-3
    assert np.abs(actual - picture(pipes[1], **changes | dict(pag_scale=0.0))).max() > 0.01
    there = ap.AutoPipelineForInpainting.from_pipe(pipes[1])
    assert type(there).__name__ == "PixArtSigmaPAGInpaintPipeline"
    assert ap.AutoPipelineForImage2Image.from_pipe(pipes[1], enable_pag=False).tasks()[1] == "image2image"


@pytest.mark.parametrize("name", ["PixArtAlpha", "PixArtSigma"])
def test_pictures_to_begin_with_are_kept_where_they_have_to_be(load: Any, name: str) -> None:
    """A black mask keeps the picture, and little strength changes little."""
    folder = {"PixArtAlpha": "pixart-alpha", "PixArtSigma": "pixart-sigma"}[name]
    base = load(ap, folder, f"{name}Pipeline")
    common = dict(prompt="cat", num_inference_steps=10, output_type="latent", max_sequence_length=16, seed=1)
    common |= dict(clean_caption=False, image=tiny.photo(72, 56))
    weak, strong = (base(**common, strength=strength).images for strength in (0.1, 0.9))
    assert weak.shape == (1, 4, 14, 18)
    black = tiny.mask(72, 56).point(lambda _: 0)
    kept = base(**common, mask_image=black, height=56, width=72).images
    assert (weak - kept).norm() < (strong - kept).norm()
    painted = base(**common, mask_image=tiny.mask(72, 56), height=56, width=72).images
    same = (painted == kept).all(1)[0]
    assert same[:3].all()
    assert not same[6:8, 8:10].any()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(height=60), "height=60 is not a positive multiple of 8"),
        (dict(prompt=None, prompt_embeds=torch.zeros(1, 4, 24)), "need each other"),
        (
            dict(negative_prompt_embeds=torch.ones(1, 4, 24), negative_prompt_attention_mask=torch.ones(1, 4)),
            "4 tokens",
        ),
        (dict(callback_steps=0), "at least 1"),
        (dict(callback_steps=2), "no effect without callback"),
        (dict(callback=3), "has to be a function"),
        (dict(callback=print, callback_on_step_end=print), "not both"),
        (dict(strength=0.5), "strength has no effect on text-to-image"),
        (dict(image=tiny.photo(), height=None, width=None), "use_resolution_binning has no effect on image-to-image"),
    ],
)
def test_what_is_refused(load: Any, changes: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        picture(load(ap, "pixart-sigma", "PixArtSigmaPipeline"), **changes)
