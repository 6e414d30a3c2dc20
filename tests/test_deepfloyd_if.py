"""DeepFloyd IF: the stages that enlarge, the whole cascade, what checks and marks the pictures, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import autopipeline as ap
import tiny

TOLERANCE = 2e-3
NAMES = {
    "text2image": "IFSuperResolutionPipeline",
    "image2image": "IFImg2ImgSuperResolutionPipeline",
    "inpaint": "IFInpaintingSuperResolutionPipeline",
}
CALL: dict[str, Any] = dict(prompt="a red cat", num_inference_steps=3, clean_caption=False, output_type="np")
SMALL = tiny.photo(24, 24, seed=2)
INPUTS: dict[str, dict[str, Any]] = {
    "text2image": dict(image=SMALL),
    "image2image": dict(image=SMALL, original_image=tiny.photo(64, 80)),
    "inpaint": dict(image=SMALL, original_image=tiny.photo(100, 70), mask_image=tiny.mask(100, 70)),
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seed(number: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def upscalers(checkpoint: Any) -> Callable[[str], tuple[Any, Any]]:
    @cache
    def get(task: str) -> tuple[Any, Any]:
        folder, unmarked = checkpoint("if-upscaler"), dict(watermarker=None)  # one of the peer's asks for it
        pipes = [getattr(lib, NAMES[task]).from_pretrained(folder, **unmarked) for lib in (diffusers, ap)]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        return pipes[0], pipes[1]

    return get


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(only_cross_attention=(False, True), mid_block_only_cross_attention=False, layers_per_block=(1, 2)),
        dict(
            cross_attention_norm=None,
            encoder_hid_dim=None,
            cross_attention_dim=24,
            resnet_skip_time_act=False,
            time_embedding_act_fn=None,
        ),
        dict(addition_embed_type="text", resnet_out_scale_factor=1.4),
    ],
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.UNet2DConditionModel(**tiny.IF_UPSCALER | changes), 1)
    ours = ap.UNet2DConditionModel(**tiny.IF_UPSCALER | changes)
    ours.load_state_dict(peer.state_dict())
    x, text, level = drawn(2, 6, 20, 16), drawn(2, 9, 24, seed=1), torch.tensor([250, 999])
    expected = peer(x, torch.tensor(310), text, class_labels=level).sample
    assert torch.allclose(ours(x, torch.full((2,), 310), text, class_labels=level), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("text2image", dict(negative_prompt="sea", num_images_per_prompt=2, noise_level=100)),
        ("text2image", dict(image=drawn(1, 3, 20, 30).clamp(-1, 1), height=48, width=72, guidance_scale=1.0)),
        ("text2image", dict(image=np.asarray(SMALL, np.float32)[None] / 255, output_type="pt")),
        ("text2image", dict(prompt=["a", "sun"], image=[SMALL, tiny.photo(24, 24)], generator=[seed(1), seed(2)])),
        ("image2image", dict(negative_prompt="sea", num_images_per_prompt=2)),
        ("image2image", dict(strength=0.4, num_inference_steps=6, noise_level=0, output_type="pt")),
        ("inpaint", dict(negative_prompt="sea", num_images_per_prompt=2)),
        ("inpaint", dict(strength=1.0, noise_level=30, guidance_scale=1.0, timesteps=[900, 400, 30])),
    ],
)
def test_enlarged_as_the_peer_does(upscalers: Any, task: str, changes: dict[str, Any]) -> None:
    call = CALL | INPUTS[task] | changes
    several = isinstance(changes.get("generator"), list)
    made = [pipe(**call | dict(generator=[seed(1), seed(2)] if several else seed())).images for pipe in upscalers(task)]
    expected, actual = (np.asarray(each) for each in made)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE
    assert expected.std() > 0.01


def test_one_object_does_all_three(upscalers: Any) -> None:
    general = upscalers("text2image")[1]
    for task, inputs in INPUTS.items():
        call = CALL | inputs | dict(strength=0.5, num_inference_steps=6)
        call = call if task != "text2image" else {k: v for k, v in call.items() if k != "strength"}
        expected = upscalers(task)[1](**call, generator=seed()).images
        assert np.array_equal(general(**call, generator=seed()).images, expected)


def test_the_whole_cascade(checkpoint: Any) -> None:
    """As DeepFloyd's users call it: the small pictures as tensors, embeddings made once, no second text encoder."""
    made: list[list[np.ndarray[Any, Any]]] = []
    for lib in (diffusers, ap):
        checker = dict(safety_checker=tiny.if_safety_checker()) if lib is diffusers else {}
        first = lib.DiffusionPipeline.from_pretrained(checkpoint("if-looks"), **checker)
        second = lib.DiffusionPipeline.from_pretrained(checkpoint("if-upscaler-looks"), text_encoder=None, **checker)
        assert (type(first).__name__, type(second).__name__) == ("IFPipeline", "IFSuperResolutionPipeline")
        embeds = dict(prompt_embeds=drawn(1, 7, 24), negative_prompt_embeds=drawn(1, 7, 24, seed=1))
        for pipe in (first, second):
            pipe.set_progress_bar_config(disable=True)
        steps: dict[str, Any] = dict(num_inference_steps=3)
        small = first(**embeds, **steps, generator=seed(), output_type="pt").images
        out = second(image=small, **embeds, **steps, generator=seed())
        made.append([small.numpy(), np.asarray(out.images[0], np.float32) / 255])
        made[-1].append(np.array([out.nsfw_detected, out.watermark_detected]))
    (small, large, looks), (our_small, our_large, our_looks) = made
    assert np.abs(small - our_small).max() <= TOLERANCE
    assert large.shape == (64, 64, 3)
    assert np.abs(large - our_large).max() <= 1.01 / 255
    assert np.array_equal(looks, our_looks)


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("bias", [(-9.0, -9.0), (9.0, -9.0), (-9.0, 9.0)])
def test_what_is_flagged_turns_black_and_pil_pictures_are_marked(
    checkpoint: Any, bias: tuple[float, float], output_type: str
) -> None:
    made: list[Any] = []
    for lib in (diffusers, ap):
        checker = dict(safety_checker=tiny.if_safety_checker()) if lib is diffusers else {}
        pipe = lib.IFPipeline.from_pretrained(checkpoint("if-looks"), **checker)
        pipe.set_progress_bar_config(disable=True)
        for head, value in zip(("p_head", "w_head"), bias, strict=True):
            torch.nn.init.constant_(getattr(pipe.safety_checker, head).bias, value)
        made.append(pipe(**CALL | dict(output_type=output_type), generator=seed(), return_dict=False))
    assert made[0][1:] == made[1][1:] == ([bias[0] > 0], [bias[1] > 0])
    scale = 255 if output_type == "pil" else 1
    peer, ours = (np.asarray(images[0], np.float32) / scale for images, *_ in made)
    assert np.abs(peer - ours).max() <= (1.01 / 255 if output_type == "pil" else TOLERANCE)
    hidden = max(bias) > 0
    assert (ours[:16, :16].max() == 0) == hidden
    assert (ours[-8:, -8:].max() > 0) == (output_type == "pil" or not hidden)


def test_nothing_looks_at_tensors(checkpoint: Any) -> None:
    pipe = ap.IFPipeline.from_pretrained(checkpoint("if-looks"))
    out = pipe(**CALL | dict(output_type="pt"))
    assert out.nsfw_detected is None
    assert out.watermark_detected is None


def test_saved_as_the_peer_reads_it(checkpoint: Any, tmp_path: Any) -> None:
    pipe = ap.IFSuperResolutionPipeline.from_pretrained(checkpoint("if-upscaler-looks"))
    pipe.save_pretrained(tmp_path)
    checker = tiny.if_safety_checker()
    peer = diffusers.IFSuperResolutionPipeline.from_pretrained(tmp_path, safety_checker=checker)
    assert torch.equal(peer.watermarker.watermark_image, pipe.watermarker.watermark_image)
    saved = load_file(tmp_path / "safety_checker" / "model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in checker.state_dict().items())
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    assert index["safety_checker"] == ["deepfloyd_if", "IFSafetyChecker"]


def test_mark_on_pictures_of_other_sizes() -> None:
    from diffusers.pipelines.deepfloyd_if import IFWatermarker

    from autopipeline.models.watermark import IFWatermarker as IFMark

    peer, ours = IFWatermarker(), IFMark()
    colours = (torch.arange(62 * 62 * 4).view(62, 62, 4) * 7 % 256).float()
    peer.watermark_image.copy_(colours)
    ours.watermark_image.data.copy_(colours)
    for width, height, side in [(256, 256, 256), (300, 256, 256), (200, 260, 256), (1100, 1024, 1024)]:
        before = tiny.photo(width, height)
        expected = peer.apply_watermark([before.copy()], side)[0]
        actual = ours([before], side)[0]
        assert np.array_equal(np.asarray(expected), np.asarray(actual))
        if width >= side:  # on narrower ones it lies outside, as the peer has it
            assert not np.array_equal(np.asarray(actual), np.asarray(before))


def test_integers_are_scaled(upscalers: Any) -> None:
    ours = upscalers("text2image")[1]
    made = [
        ours(**CALL, image=image, generator=seed()).images
        for image in (SMALL, np.asarray(SMALL)[None], torch.from_numpy(np.asarray(SMALL) / 127.5 - 1).permute(2, 0, 1))
    ]
    assert np.abs(made[0] - made[1]).max() < 1e-4
    assert np.abs(made[0] - made[2]).max() < 1e-4


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    simple = ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3]
    first = dict(tiny.IF_UNET, sample_size=64, block_out_channels=[704, 1408, 2112, 2816], down_block_types=simple)
    first |= dict(up_block_types=[*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"], layers_per_block=3)
    first |= dict(cross_attention_dim=2816, encoder_hid_dim=4096, attention_head_dim=64, norm_num_groups=32)
    first |= dict(addition_embed_type_num_heads=64)
    with torch.device("meta"):
        pair = diffusers.UNet2DConditionModel(**first), ap.UNet2DConditionModel(**first)
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]
    assert sum(shape.numel() for shape in shapes[0].values()) > 4e9  # 4.3 thousand million, says its card


@pytest.mark.parametrize(
    ("name", "changes", "error", "says"),
    [
        ("if-upscaler", {}, ValueError, "needs image"),
        ("if-upscaler", dict(original_image=SMALL), ValueError, "needs image"),
        ("if-upscaler", dict(image=SMALL, noise_level=1000), ValueError, "from 0 to 999"),
        ("if-upscaler", dict(image=SMALL, noise_level=-1), ValueError, "at least 0"),
        ("if-upscaler", dict(image=[SMALL] * 3, prompt=["a", "b"]), ValueError, "3 pictures"),
        ("if-upscaler", dict(image=SMALL, strength=0.5), TypeError, "strength has no effect"),
        ("if", dict(noise_level=3), TypeError, "no parameter 'noise_level'"),
        ("if", dict(image=tiny.photo(40, 40), mask_image=tiny.mask(40, 48)), ValueError, "of one size"),
        (
            "if",
            dict(image=drawn(1, 3, 40, 40).clamp(-1, 1), mask_image=tiny.mask(40, 40)),
            ValueError,
            r"image is \(40, 40\) and mask_image \(32, 32\)",
        ),
        ("if", dict(safety_checker=None), TypeError, "no parameter 'safety_checker'"),
        (
            "if",
            dict(prompt=None, prompt_embeds=drawn(1, 9, 24), negative_prompt_embeds=drawn(1, 8, 24)),
            ValueError,
            "differ",
        ),
    ],
)
def test_refusals(checkpoint: Any, name: str, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    with pytest.raises(error, match=says):
        pipe(**CALL | changes)


def test_the_wrong_stage_says_so(checkpoint: Any) -> None:
    small = ap.DiffusionPipeline.from_pretrained(checkpoint("if"))
    large = ap.DiffusionPipeline.from_pretrained(checkpoint("if-upscaler"))
    crossed = ap.IFPipeline.from_pretrained(checkpoint("if"), unet=large.unet)
    with pytest.raises(ValueError, match="takes 6 channels, which is a smaller picture beside x"):
        crossed(**CALL)
    crossed = ap.IFSuperResolutionPipeline.from_pretrained(checkpoint("if-upscaler"), unet=small.unet)
    with pytest.raises(ValueError, match="takes 3 channels, which is x alone"):
        crossed(**CALL, image=SMALL)
    with pytest.raises(ValueError, match="components are not those"):
        ap.IFSuperResolutionPipeline.from_pretrained(checkpoint("if"))
    with pytest.raises(ValueError, match="can't find a pipeline linked to IFSuperResolutionPipeline for None"):
        ap.AutoPipelineForText2Image.from_pretrained(checkpoint("if-upscaler"))


def test_a_checker_needs_its_extractor(checkpoint: Any) -> None:
    pipe = ap.IFPipeline.from_pretrained(checkpoint("if-looks"), feature_extractor=None)
    with pytest.raises(ValueError, match="needs feature_extractor"):
        pipe(**CALL)


def test_pictures_keep_their_proportions(checkpoint: Any) -> None:
    pipe = ap.IFImg2ImgPipeline.from_pretrained(checkpoint("if"))
    for size, expected in [((90, 60), (32, 48)), ((60, 90), (48, 32)), ((31, 31), (32, 32)), ((70, 50), (32, 48))]:
        made = pipe(**CALL, image=Image.new("RGB", size)).images
        assert made.shape[1:3] == expected


def test_where_the_peer_fails(checkpoint: Any) -> None:
    pipe = ap.IFPipeline.from_pretrained(checkpoint("if"))
    assert pipe(**CALL, height=37, width=33).images.shape == (1, 37, 33, 3)
    both = pipe(**CALL | dict(prompt=["a", "b"], negative_prompt="sea"), image=tiny.photo(32, 32)).images
    assert both.shape == (2, 32, 32, 3)


def test_outputs_have_as_many_items_as_users_know(checkpoint: Any) -> None:
    pictures, flagged = ap.StableDiffusionPipeline.from_pretrained(checkpoint("sd"))("cat", num_inference_steps=1)
    assert flagged is None
    assert len(pictures) == 1
    out = ap.IFPipeline.from_pretrained(checkpoint("if-looks"))(**CALL)
    assert len(tuple(out)) == len(out[:]) == 3
    assert out[2] == out.watermark_detected
