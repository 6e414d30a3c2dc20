"""ControlNet union: its network, lists of unions, batches, and what its calls refuse."""

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

EDGES, DEPTH = tiny.photo(seed=4), tiny.photo(seed=7)
CALL: dict[str, Any] = dict(prompt="a red cat, sun", num_inference_steps=4, output_type="np")
ONE, TWO = dict(control_image=EDGES, control_mode=3), dict(control_image=[EDGES, DEPTH], control_mode=[3, 0])
STRENGTHS = dict(controlnet_conditioning_scale=[0.4, 0.9], control_guidance_start=[0.0, 0.3])
AUTO = {
    "text2image": "AutoPipelineForText2Image",
    "image2image": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}


@pytest.fixture(scope="module")
def load(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unions")
    for k in range(2):
        tiny.controlnet_union(20 + k).save_pretrained(folder / str(k))

    @cache
    def get(lib: Any, task: str, count: int = 1) -> Any:
        nets = [lib.ControlNetUnionModel.from_pretrained(folder / str(k)) for k in range(count)]
        if count == 1:
            pipe = getattr(lib, AUTO[task]).from_pretrained(checkpoint("xl"), controlnet=nets[0])
        else:  # the peer takes a list for ControlNets of the usual kind
            cls = {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpaint"}[task]
            cls = getattr(lib, f"StableDiffusionXLControlNetUnion{cls}Pipeline")
            pipe = cls.from_pretrained(checkpoint("xl"), controlnet=nets)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def picture(pipe: Any, task: str, **changes: Any) -> np.ndarray:
    call = CALL | tiny.inputs(task) | changes
    return pipe(**call, **{} if "generator" in call or "seed" in call else dict(generator=drawn(3))).images


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("task", "count", "changes"),
    [
        ("text2image", 1, ONE | dict(width=96, height=56, num_images_per_prompt=2)),
        ("text2image", 1, TWO | STRENGTHS | dict(guidance_scale=1.0)),
        ("text2image", 1, TWO | dict(controlnet_conditioning_scale=0.0)),
        ("text2image", 1, ONE | dict(prompt=["cat", "sun"])),
        ("text2image", 2, TWO | STRENGTHS),
        ("image2image", 1, TWO | STRENGTHS),
        ("image2image", 2, TWO | dict(guess_mode=True, guidance_scale=1.0)),
        ("inpaint", 1, TWO | dict(strength=0.7, control_guidance_end=0.6)),
    ],
)
def test_same_picture_as_the_peer(load: Any, task: str, count: int, changes: dict[str, Any]) -> None:
    changes = {name: list(value) if isinstance(value, list) else value for name, value in changes.items()}
    peer, ours = (load(lib, task, count) for lib in (diffusers, ap))
    assert type(ours).__name__ == type(peer).__name__
    expected, actual = (picture(pipe, task, **changes) for pipe in (peer, ours))
    assert np.abs(actual - expected).max() <= 1e-3
    other = dict(control_mode=5) if changes["control_mode"] == 3 else dict(control_mode=[2, 1])
    assert np.abs(picture(ours, task, **changes | other) - actual).max() > 1e-3


def test_a_seed_gives_its_picture_in_any_company(load: Any) -> None:
    """Rows see each other in this network; with seeds, only those of the same picture do."""
    each = dict(control_image=[[EDGES, DEPTH]], control_mode=[3], prompt=["red cat", "sun"])
    peer, ours = (load(lib, "text2image") for lib in (diffusers, ap))
    mixed = [picture(pipe, "text2image", **each, generator=[drawn(7), drawn(9)]) for pipe in (peer, ours)]
    assert np.abs(mixed[0] - mixed[1]).max() < 1e-3
    both = picture(ours, "text2image", **each, seed=[7, 9])
    calls = [(EDGES, "red cat", 7), (DEPTH, "sun", 9)]
    alone = [
        picture(ours, "text2image", control_image=image, control_mode=3, prompt=text, seed=k)
        for image, text, k in calls
    ]
    assert np.abs(both - np.concatenate(alone)).max() < 1e-5
    assert np.abs(both - mixed[1]).max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, dict(num_trans_layer=3, num_control_type=8), dict(global_pool_conditions=True)]
)
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.controlnet_union(**changes)
    ours = ap.ControlNetUnionModel.from_config(peer.config)
    ours.load_state_dict(peer.state_dict())
    x, t, text = torch.randn(3, 4, 8, 12, generator=drawn(1)), torch.tensor(400), torch.randn(3, 5, 48)
    pictures = [torch.rand(3, 3, 32, 48, generator=drawn(k)) for k in range(2)]
    sizes = dict(text_embeds=torch.randn(3, 24), time_ids=torch.rand(3, 6))
    kinds = torch.zeros(3, len(ours.task_embedding)).scatter(1, torch.tensor([[4, 1]] * 3), 1.0)
    told = dict(control_type=kinds, control_type_idx=[4, 1], conditioning_scale=[0.3, 0.8], added_cond_kwargs=sizes)
    down, middle = peer(x, t, text, pictures, **told, return_dict=False)
    told = dict(modes=torch.tensor([[4, 1]] * 3), weights=torch.tensor([[0.3, 0.8]] * 3))
    made = ours(x, t.expand(3), text, pictures, **told, apart=torch.zeros(3, 3, dtype=torch.bool), **sizes)
    assert len(made) == ours.residuals == len(down) + 1
    for expected, actual in zip([*down, middle], made, strict=True):
        assert torch.allclose(expected, actual, atol=1e-5)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    depths = dict(
        transformer_layers_per_block=(1, 2, 10), block_out_channels=(320, 640, 1280), addition_time_embed_dim=256
    )
    blocks = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    with torch.device("meta"):
        pair = [lib.ControlNetUnionModel(**depths, **blocks) for lib in (diffusers, ap)]
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]


def test_several_unions_are_chosen_saved_and_taken_away(load: Any, checkpoint: Any, tmp_path: Path) -> None:
    nets = load(ap, "text2image", 2).controlnet.members
    pipe = ap.AutoPipelineForText2Image.from_pretrained(checkpoint("xl"), controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is ap.StableDiffusionXLControlNetUnionPipeline
    first = picture(pipe, "text2image", **TWO)
    pipe.save_pretrained(tmp_path)
    again = ap.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(again, "text2image", **TWO), first)
    plain = ap.AutoPipelineForImage2Image.from_pipe(pipe, controlnet=None)
    assert type(plain) is ap.StableDiffusionXLImg2ImgPipeline
    back = ap.AutoPipelineForInpainting.from_pipe(plain, controlnet=nets[0])
    assert type(back) is ap.StableDiffusionXLControlNetUnionInpaintPipeline
    usual = ap.ControlNetModel.from_config(nets[0].config)
    other = ap.AutoPipelineForText2Image.from_pipe(back, controlnet=usual)
    assert type(other) is ap.StableDiffusionXLControlNetPipeline


def test_a_union_may_have_several_pictures_among_several_unions(load: Any) -> None:
    pipe = load(ap, "text2image", 2)
    nested = dict(control_image=[[EDGES, DEPTH], EDGES], control_mode=[[3, 0], 1])
    made = picture(pipe, "text2image", **nested)
    assert np.abs(made - picture(pipe, "text2image", **TWO)).max() > 1e-3


@pytest.mark.parametrize(
    ("count", "changes", "says"),
    [
        (1, dict(control_image=EDGES), "control_mode=None has to be"),
        (1, dict(control_mode=3), "needs control_image"),
        (1, ONE | dict(control_mode=6), "from 0 to 5"),
        (1, ONE | dict(control_mode=[1, 2]), "a number for each of them"),
        (1, TWO | dict(control_mode=[1, 1]), "twice"),
        (1, TWO | dict(controlnet_conditioning_scale=[1.0, 0.5, 0.2]), "3 entries for 2 control pictures"),
        (2, TWO | dict(control_guidance_end=[1.0]), "1 entries for 2 ControlNets"),
        (2, ONE, "a list of 2"),
    ],
)
def test_refusals(load: Any, count: int, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        picture(load(ap, "text2image", count), "text2image", **changes)
