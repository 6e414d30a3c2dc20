"""NucleusMoE-Image: its network, its chats, and what its calls refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import language
import qwenimage
import tiny
from autopipeline.families import nucleus_moe

CALL = dict(prompt="cat", height=32, width=32, num_inference_steps=2, return_index=-2, output_type="np")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_key_value_heads=None, use_sigmoid=True, route_scale=1.3, capacity_factors=[1.0, 0.1, 2.7, 3.0]),
        dict(dense_moe_strategy="all_moe", num_experts=2, moe_intermediate_dim=12, axes_dims_rope=(4, 2, 2)),
        dict(dense_moe_strategy="leave_first_three_blocks_dense"),
        dict(moe_enabled=False, out_channels=4),
    ],
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    config = language.NUCLEUS | changes
    peer = tiny.redraw(diffusers.NucleusMoEImageTransformer2DModel(**config), 1)
    ours = ap.NucleusMoEImageTransformer2DModel(**config)
    ours.load_state_dict(peer.state_dict())
    x, states, t = drawn(2, 15, 16), drawn(2, 5, 24, seed=1), torch.tensor([0.3, 0.71])
    table = ours.rotary(5, 3, 5)
    for mask in (None, torch.arange(5)[None] < torch.tensor([[2], [5]])):
        told = dict(encoder_hidden_states=states, encoder_hidden_states_mask=mask, timestep=t)
        expected = peer(x, img_shapes=[(1, 3, 5)] * 2, **told).sample
        assert torch.allclose(ours(x, t, ours.hear(states, table), table, mask), expected, atol=1e-4)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        pair = [lib.NucleusMoEImageTransformer2DModel(num_key_value_heads=4) for lib in (diffusers, ap)]
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ap.CheckpointError, match="all_dense"):
        ap.NucleusMoEImageTransformer2DModel(**language.NUCLEUS | dict(dense_moe_strategy="some"))


class Processor:
    """What the peer calls, without torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, chat: Any, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(chat, **options)

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(negative_prompt="sun"),
        dict(prompt=["cat", "a red sun on the sea"], return_index=1),
        dict(num_images_per_prompt=2, guidance_scale=1.0),
        dict(sigmas=[1.0, 0.6, 0.2], width=48, output_type="latent", guidance_scale=2.0),
    ],
)
def test_same_picture_as_the_peer(checkpoint: Any, changes: dict[str, Any], side: str) -> None:
    folder = checkpoint("nucleus")
    ours = ap.NucleusMoEImagePipeline.from_pretrained(folder)
    ours.processor.padding_side = side
    parts = diffusers.NucleusMoEImagePipeline.from_pretrained(folder, processor=None).components
    peer = diffusers.NucleusMoEImagePipeline(**parts | dict(processor=None))
    peer.processor = Processor(language.qwen_tokenizer())
    peer.processor.tokenizer.padding_side = side
    made = []
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(**CALL | changes, generator=torch.Generator().manual_seed(3)).images
        made.append(np.asarray(images))
    assert made[0].std() > 0.01
    assert np.abs(made[0] - made[1]).max() < 1e-3


def test_texts_are_padded_to_multiples_of_eight(checkpoint: Any) -> None:
    pipe = ap.NucleusMoEImagePipeline.from_pretrained(checkpoint("nucleus"))
    states, mask = nucleus_moe.encode(pipe.components, ["cat", "a red sun on the sea"], 1024, -2)
    lengths = mask.sum(1).tolist()
    assert lengths[0] < lengths[1] <= states.shape[1] == mask.shape[1] < lengths[1] + 8
    assert states.shape[1] % 8 == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(return_index=3), "return_index=3"),
        (dict(return_index=-3), "return_index=-3"),
        (dict(return_index=True), "return_index=True"),
        (dict(prompt_embeds_mask=drawn(1, 9)), "needs prompt_embeds"),
        (dict(negative_prompt_embeds=drawn(1, 9, 24), negative_prompt_embeds_mask=drawn(1, 8)), "each of its tokens"),
        (dict(scheduler="DDIM"), "flow"),
        (dict(height=4), "8 pixels at least"),
        (dict(max_sequence_length=0), "max_sequence_length"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.NucleusMoEImagePipeline.from_pretrained(checkpoint("nucleus"))
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)


def test_embeddings_need_no_text_encoder(checkpoint: Any, tmp_path: Path) -> None:
    whole = ap.NucleusMoEImagePipeline.from_pretrained(checkpoint("nucleus"))
    whole.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text("utf-8"))["processor"][1] == "Qwen2Tokenizer"
    pipe = ap.NucleusMoEImagePipeline.from_pretrained(tmp_path / "saved", text_encoder=None, processor=None)
    pipe.set_progress_bar_config(disable=True)
    embeds = dict(prompt=None, prompt_embeds=drawn(1, 9, 24), negative_prompt_embeds=drawn(1, 7, 24, seed=1))
    assert pipe(**CALL | embeds).images.shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="pass prompt_embeds"):
        pipe(**CALL)


def test_a_whole_processor_says_the_same(checkpoint: Any, tmp_path: Path) -> None:
    pipe = ap.NucleusMoEImagePipeline.from_pretrained(checkpoint("nucleus"))
    processor = ap.Qwen3VLProcessor(qwenimage.image_processor(), pipe.processor)
    ap.NucleusMoEImagePipeline(**pipe.components | dict(processor=processor)).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text("utf-8"))
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.processor, ap.Qwen3VLProcessor)
    made = [nucleus_moe.encode(one.components, ["red cat"], 1024, -2)[0] for one in (pipe, again)]
    assert torch.equal(*made)
