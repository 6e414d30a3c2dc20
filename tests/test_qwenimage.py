"""Qwen-Image's networks, its ControlNets and its editing, beside what the common tests try."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import autopipeline as ap
import language
import qwenimage
import tiny

CALL = dict(prompt="red cat", negative_prompt="a sun", true_cfg_scale=3.0, num_inference_steps=2, output_type="np")
SMALL = CALL | dict(height=32, width=32)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, dict(zero_cond_t=True), dict(num_layers=1, out_channels=None, patch_size=1)])
@torch.no_grad()
def test_transformer(changes: dict[str, Any]) -> None:
    config = qwenimage.TRANSFORMER | changes
    peer = tiny.redraw(diffusers.QwenImageTransformer2DModel(**config), 1)
    ours = ap.QwenImageTransformer2DModel(**config)
    ours.load_state_dict(peer.state_dict())
    x, reference, text, t = drawn(2, 15, 16), drawn(2, 8, 16, seed=1), drawn(2, 7, 24, seed=2), torch.tensor([0.3, 0.9])
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [1] * 7])
    for grids in ([(3, 5)], [(3, 5), (2, 4)]):
        whole = torch.cat([x, reference], 1) if len(grids) > 1 else x
        shapes = [[(1, *grid) for grid in grids]] * 2
        said = dict(encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=t)
        expected = peer(whole, img_shapes=shapes, **said).sample[:, :15]
        table = ours.rotary(7, *grids).expand(2, -1, -1, -1)
        looked = dict(reference=reference) if len(grids) > 1 else {}
        assert torch.allclose(ours(x, t, text, table, encoder_hidden_states_mask=mask, **looked), expected, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(dim_mult=[1, 2], temperal_downsample=[True], num_res_blocks=2), dict(base_dim=12, input_channels=4)],
)
@torch.no_grad()
def test_autoencoder(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.AutoencoderKLQwenImage(**qwenimage.VAE | changes), 1)
    ours = ap.AutoencoderKLQwenImage(**qwenimage.VAE | changes)
    ours.load_state_dict(peer.state_dict())
    pixels, latents = drawn(2, changes.get("input_channels", 3), 16, 24), drawn(2, 4, 3, 4, seed=1)
    expected = peer.encode(pixels[:, :, None]).latent_dist
    assert torch.allclose(ours.encode(pixels).mean, expected.mean[:, :, 0], atol=1e-5)
    assert torch.allclose(ours.encode(pixels).std, expected.std[:, :, 0], atol=1e-5)
    assert torch.allclose(ours.decode(latents), peer.decode(latents[:, :, None]).sample[:, :, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "AutoencoderKLQwenImage", "QwenImageControlNetModel"])
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        peer, ours = (getattr(lib, name)() for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]
    assert {key: ours.config[key] for key in ours.config} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in peer.config.items() if key[0] != "_"
    }


def controlnets(lib: Any, folder: Any, count: int) -> list[Any]:
    for k in range(count):
        qwenimage.controlnet(1 + k, 5 + k).save_pretrained(folder / str(k))
    return [lib.QwenImageControlNetModel.from_pretrained(folder / str(k)) for k in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        dict(control_guidance_start=0.3, num_inference_steps=4, num_images_per_prompt=2),
        dict(prompt=["red cat", "sun on the sea"], controlnet_conditioning_scale=0.5),
        dict(control_image=drawn(1, 3, 48, 32).clamp(-1, 1), height=48),
        dict(several=True, control_image=[tiny.photo(), tiny.photo(seed=3)], controlnet_conditioning_scale=[0.4, 0.9]),
    ],
    ids=["window", "texts", "tensor", "several"],
)
def test_controlnet(checkpoint: Any, tmp_path: Any, changes: dict[str, Any]) -> None:
    made = []
    call = SMALL | dict(control_image=tiny.photo()) | changes
    several = call.pop("several", False)
    for lib in (diffusers, ap):
        net = controlnets(lib, tmp_path, 1)[0]
        component = lib.QwenImageMultiControlNetModel([net]) if several else net
        pipe = lib.QwenImageControlNetPipeline.from_pretrained(checkpoint("qwenimage"), controlnet=component)
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe(**call, generator=torch.Generator().manual_seed(1)).images)
    assert made[0].shape == made[1].shape
    assert np.abs(made[0] - made[1]).max() < 1e-3


def test_two_controlnets_add_up(checkpoint: Any, tmp_path: Any) -> None:
    nets = controlnets(ap, tmp_path, 2)
    pipe = ap.QwenImageControlNetPipeline.from_pretrained(checkpoint("qwenimage"), controlnet=nets)
    latents = [drawn(1, 4, 8, 8), drawn(1, 4, 8, 8, seed=1)]  # of pictures, so that nothing is drawn for them
    call = SMALL | dict(control_image=latents, seed=1)
    both, first = (pipe(**call, controlnet_conditioning_scale=scale).images for scale in ([1.0, 1.0], [1.0, 0.0]))
    alone = ap.QwenImageControlNetPipeline.from_pretrained(checkpoint("qwenimage"), controlnet=nets[0])
    assert np.abs(both - first).max() > 1e-3
    assert np.allclose(alone(**call | dict(control_image=latents[0])).images, first, atol=1e-4)


def peers_processor() -> Any:
    """Transformers' own, put together without the part for films, which wants torchvision."""
    from transformers import Qwen2VLProcessor

    made, tokenizer = object.__new__(Qwen2VLProcessor), language.qwen_tokenizer()
    made.image_processor, made.tokenizer, made.video_processor = qwenimage.image_processor(), tokenizer, None
    made.image_token, made.video_token, made.chat_template = "<|image_pad|>", "<|video_pad|>", None
    made.image_token_id = tokenizer.convert_tokens_to_ids(made.image_token)
    made.video_token_id = tokenizer.convert_tokens_to_ids(made.video_token)
    return made


def test_processor(tmp_path: Any) -> None:
    ap.Qwen2VLProcessor(qwenimage.image_processor(), language.qwen_tokenizer()).save_pretrained(tmp_path)
    ours = ap.Qwen2VLProcessor.from_pretrained(tmp_path)
    texts = ["a<|image_pad|>red cat<|image_pad|>", "<|image_pad|>sun"]
    pictures = [tiny.photo(96, 64), tiny.photo(60, 90), tiny.photo(64, 64)]
    made, expected = ours(texts, pictures), peers_processor()(text=texts, images=pictures, padding=True)
    assert len({len(row) for row in made["input_ids"]}) == 1
    for name, rows in made.items():
        assert np.array_equal(rows.numpy(), np.asarray(expected[name])), name


@pytest.fixture
def few_pixels(monkeypatch: pytest.MonkeyPatch, small_edits: None) -> None:
    """The peer scales pictures to few pixels, too."""
    from diffusers.pipelines.qwenimage import (
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_inpaint,
        pipeline_qwenimage_edit_plus,
    )

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, real=real: real(64 * 64, ratio))


EDIT, PLUS, INPAINT = "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"
MASK = dict(mask_image=tiny.mask(96, 64), num_inference_steps=4)


@pytest.mark.usefixtures("few_pixels")
@pytest.mark.filterwarnings("ignore:max_sequence_length has no effect")
@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (EDIT, dict(num_images_per_prompt=2)),
        (EDIT, dict(height=48, width=40, max_sequence_length=8, negative_prompt=None, true_cfg_scale=4.0)),
        (PLUS, dict(image=[tiny.photo(96, 64), tiny.photo(50, 90)], num_images_per_prompt=2)),
        (PLUS, dict(width=48)),
        (INPAINT, MASK | dict(num_images_per_prompt=2)),
        (INPAINT, MASK | dict(strength=1.0)),
    ],
)
def test_editing(checkpoint: Any, cls: str, changes: dict[str, Any]) -> None:
    folder = checkpoint("qwenimage-edit-plus" if cls == PLUS else "qwenimage-edit")
    made = []
    for lib in (diffusers, ap):
        pipe = getattr(lib, cls).from_pretrained(folder, **dict(processor=None) if lib is diffusers else {})
        if lib is diffusers:
            pipe.processor = peers_processor()
        pipe.set_progress_bar_config(disable=True)
        call = CALL | dict(image=tiny.photo(96, 64)) | changes
        made.append(pipe(**call, generator=torch.Generator().manual_seed(1)).images)
    assert made[0].shape == made[1].shape
    assert np.abs(made[0] - made[1]).max() < 1e-3


LAYERED: dict[str, Any] = dict(layers=2, negative_prompt="sun", true_cfg_scale=3.0, num_inference_steps=3)


@pytest.fixture(scope="module")
def layered(checkpoint: Any, small_edits: None) -> Any:
    """The peer's pipeline and ours, both for few pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as home

    sides = {640 * 640: 64 * 64, 1024 * 1024: 96 * 96}
    whole = home.calculate_dimensions
    folder = checkpoint("qwenimage-layered")
    peer = diffusers.QwenImageLayeredPipeline.from_pretrained(folder, processor=None)
    peer.processor = peer.vl_processor = peers_processor()
    ours = ap.AutoPipelineForImage2Image.from_pretrained(folder)
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "calculate_dimensions", lambda area, ratio: whole(sides[area], ratio))
        yield peer, ours


def clear(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with transparency."""
    picture = tiny.photo(width, height, seed)
    picture.putalpha(tiny.photo(width, height, seed + 1).convert("L"))
    return picture


@pytest.mark.filterwarnings("ignore:true_cfg_scale:UserWarning", "ignore:The prompt is longer:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(negative_prompt=None, layers=4, resolution=1024),
        dict(cfg_normalize=True, max_sequence_length=4),
        dict(latents=(1, 3 * 64, 20)),
        dict(prompt=None, prompt_embeds=(1, 6, 24), negative_prompt=None),
        dict(sigmas=[1.0, 0.5, 0.1]),
    ],
)
def test_layers(layered: Any, changes: dict[str, Any]) -> None:
    made: list[Any] = []
    for pipe in layered:
        call = dict(prompt="a red cat") | LAYERED | dict(output_type="np", image=clear(96, 64)) | changes
        call |= {name: drawn(*value) for name, value in call.items() if isinstance(value, tuple)}
        if pipe is layered[0] and call["prompt"] is None:
            call |= dict(prompt="not this")  # the peer wants one beside embeddings, or writes one in vain
        out = pipe(**call, generator=torch.Generator().manual_seed(1)).images
        made.append(np.asarray(out if isinstance(out, torch.Tensor) else out[0]))
    assert made[0].shape == made[1].shape
    assert np.abs(made[0] - made[1]).max() < 1e-3


@pytest.mark.filterwarnings("ignore:true_cfg_scale:UserWarning", "ignore:The prompt is longer:UserWarning")
def test_layers_of_several_prompts_and_a_description(layered: Any) -> None:
    ours = layered[1]
    call = LAYERED | dict(prompt=["a cat", "sun"], negative_prompt=["a", "b"], image=[clear(64, 64), clear(64, 64, 4)])
    both = ours(**call, seed=[1, 2]).images
    assert [len(each) for each in both] == [2, 2]
    assert {picture.mode for each in both for picture in each} == {"RGBA"}
    alone = ours(**LAYERED | dict(prompt="sun", negative_prompt="b", image=clear(64, 64, 4)), seed=2).images[0]
    for one, other in zip(alone, both[1], strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    from autopipeline.families import qwenimage_layered

    for english in (False, True):
        expected = layered[0].get_image_caption(clear(64, 64), use_en_prompt=english, device="cpu")
        assert qwenimage_layered.caption(ours.components, clear(64, 64), english) == expected
    described = ours(**LAYERED, image=clear(64, 64), output_type="np", seed=1).images[0]
    told = ours(
        **LAYERED,
        prompt=layered[0].get_image_caption(clear(64, 64), use_en_prompt=False, device="cpu"),
        image=clear(64, 64),
        output_type="np",
        seed=1,
    ).images[0]
    assert np.array_equal(described, told)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(resolution=512), "resolution=512 has to be 640 or 1024"),
        (dict(layers=0), "layers=0 has to be"),
        (dict(image=[clear(64, 64)] * 3, prompt=["a", "b"]), "3 pictures for 2 prompts"),
        (dict(guidance_scale=2.0), "guidance_scale has no effect"),
        (dict(use_en_prompt=True), "only where a description is written"),
        (dict(cfg_normalize=True, negative_prompt=None, true_cfg_scale=4.0), "no effect without guidance"),
        (dict(image=None), "needs image"),
    ],
)
def test_layers_refuse(layered: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layered[1](**LAYERED | dict(prompt="a", image=clear(64, 64)) | changes)
    opaque = ap.AutoencoderKLQwenImage(**dict(layered[1].vae.config) | dict(input_channels=3))
    other = ap.QwenImageLayeredPipeline.from_pipe(layered[1], vae=opaque)
    with pytest.raises(ValueError, match="no channel for transparency"):
        other(prompt="a", image=clear(64, 64))


@pytest.mark.usefixtures("small_edits")
def test_pictures_of_other_shapes_are_edited_each_by_itself(checkpoint: Any) -> None:
    pipe = ap.QwenImageEditPipeline.from_pretrained(checkpoint("qwenimage-edit"))
    pictures = [tiny.photo(128, 64), tiny.photo(64, 128)]
    both = pipe(**CALL | dict(prompt=["red cat", "sun"], image=pictures), seed=[1, 2]).images
    second = pipe(**CALL | dict(prompt="sun", image=pictures[1]), seed=2).images
    assert both[1].shape == second.shape != both[0].shape
    assert np.allclose(both[1], second, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(guidance_scale=3.0), "guidance_scale has no effect on this network"),
        (dict(prompt_embeds_mask=torch.ones(1, 4)), "prompt_embeds_mask needs prompt_embeds"),
        (dict(prompt=None, prompt_embeds=drawn(1, 4, 24), prompt_embeds_mask=torch.ones(1, 5)), "each of its tokens"),
        (dict(max_sequence_length=1025), "has to be 1024 at most"),
        (dict(height=4), "height=4 has to be 8 pixels at least"),
        (dict(scheduler="DDIM"), "flow"),
        (dict(attention_kwargs={"scale": 0.5}), "none is loaded"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.QwenImagePipeline.from_pretrained(checkpoint("qwenimage"))
    with pytest.raises(ValueError, match=says):
        pipe(**SMALL | changes)
    with pytest.warns(UserWarning, match="has no effect with true_cfg_scale=1"):
        pipe(**SMALL | dict(true_cfg_scale=1.0))
    with pytest.warns(UserWarning, match=r"true_cfg_scale=3\.0 has no effect without negative_prompt"):
        pipe(**SMALL | dict(negative_prompt=None))


def test_editing_without_a_processor_needs_embeddings(checkpoint: Any) -> None:
    pipe = ap.QwenImageEditPipeline.from_pretrained(checkpoint("qwenimage-edit"), processor=None)
    with pytest.raises(ValueError, match="no text_encoder with a processor; pass prompt_embeds"):
        pipe(**SMALL | dict(image=tiny.photo()))
