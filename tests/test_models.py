"""The networks compute what the peer's and transformers' compute with the same weights, and load what those save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from autopipeline import CheckpointError
from autopipeline.models import attention
from autopipeline.models.autoencoder_kl import AutoencoderKL
from autopipeline.models.autoencoder_tiny import AutoencoderTiny
from autopipeline.models.clip import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from autopipeline.models.network import Network
from autopipeline.models.safety_checker import StableDiffusionSafetyChecker
from autopipeline.models.unet import PLAIN, UNet2DConditionModel

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

OURS: dict[str, type[Network]] = {
    cls.__name__: cls
    for cls in (
        UNet2DConditionModel,
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
        StableDiffusionSafetyChecker,
    )
}
FULL: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "configs.json").read_text("utf-8"))
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY_VAE = dict(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
)
TEXT = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=48,
    projection_dim=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
)
VISION = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> bool:
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert expected.std() > 1e-3
    return bool((actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


def twin(peer: Any) -> Network:
    """Ours, of the same configuration and with the same weights."""
    config = peer.config if isinstance(peer.config, dict) else peer.config.to_dict()
    network = OURS[type(peer).__name__].from_config(dict(config))
    state = {network.renamed(key): tensor for key, tensor in peer.state_dict().items()}
    network.load_state_dict({key: tensor for key, tensor in state.items() if key is not None})
    return network.eval()


def unet(**changes: Any) -> Any:
    return tiny.redraw(diffusers.UNet2DConditionModel(**tiny.UNET | changes), 1)


def vae(**changes: Any) -> Any:
    return tiny.redraw(diffusers.AutoencoderKL(**tiny.VAE | changes), 2)


def text_model(projection: bool, **changes: Any) -> Any:
    config = transformers.CLIPTextConfig(**TEXT | dict(bos_token_id=1, eos_token_id=2) | changes)
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tiny.redraw(cls(config), 3)


DEEP = dict(
    block_out_channels=(16, 24, 32),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
UNETS: list[dict[str, Any]] = [
    {},
    DEEP | dict(layers_per_block=2),
    DEEP | dict(attention_head_dim=(2, 3, 4), use_linear_projection=True, upcast_attention=True),
    dict(in_channels=9),
    dict(time_cond_proj_dim=16),
    tiny.XL_UNET,
    tiny.XL_UNET | dict(in_channels=9, time_cond_proj_dim=8),
    tiny.XL_UNET | DEEP | dict(transformer_layers_per_block=(1, 2, 1), reverse_transformer_layers_per_block=(1, 1, 2)),
    dict(only_cross_attention=(True, False)),
    dict(mid_block_only_cross_attention=True),
    DEEP | dict(layers_per_block=(1, 2, 1), cross_attention_dim=(24, 24, 24)),
    dict(flip_sin_to_cos=False, freq_shift=1),
    dict(norm_num_groups=4, norm_eps=1e-3, resnet_out_scale_factor=1.4, mid_block_scale_factor=1.7),
    dict(downsample_padding=0),
    dict(time_embedding_dim=40, out_channels=8, act_fn="swish"),
    dict(block_out_channels=(24, 32)),
]


@pytest.mark.parametrize("changes", UNETS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_unet(changes: dict[str, Any], size: tuple[int, int]) -> None:
    peer = unet(**changes)
    config, ours = peer.config, twin(peer)
    x, t = draw(2, config.in_channels, *size), torch.tensor([999, 3])
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else 24
    text = draw(2, 5, width, seed=1)
    scale = None if config.time_cond_proj_dim is None else draw(2, config.time_cond_proj_dim, seed=2)
    added = dict(text_embeds=draw(2, 24, seed=3), time_ids=torch.tensor([[64.0, 48, 0, 3, 64, 64]] * 2))
    added = added if config.addition_embed_type else {}
    with torch.no_grad():
        expected = peer(x, t, text, timestep_cond=scale, added_cond_kwargs=added or None).sample
        assert close(ours(x, t, text, timestep_cond=scale, **added), expected)


def test_unet_at_sizes_that_do_not_halve_evenly() -> None:
    peer = unet(**DEEP)
    x, t, text = draw(1, 4, 7, 9), torch.tensor([500]), draw(1, 5, 24)
    with torch.no_grad():
        assert close(twin(peer)(x, t, text), peer(x, t, text).sample)


def test_unet_with_the_residuals_of_a_controlnet() -> None:
    peer = unet()
    x, t, text = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 5, 24)
    sizes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    downs = [draw(1, width, side, side, seed=k) for k, (width, side) in enumerate(sizes)]
    options = dict(down_block_additional_residuals=downs, mid_block_additional_residual=draw(1, 32, 4, 4, seed=9))
    with torch.no_grad():
        assert close(twin(peer)(x, t, text, **options), peer(x, t, text, **options).sample)


@pytest.mark.parametrize(
    "changes",
    [*({name: "other"} for name in PLAIN), dict(down_block_types=("AttnDownBlock2D", "DownBlock2D"))],
    ids=str,
)
def test_unets_of_other_kinds_are_refused(changes: dict[str, Any]) -> None:
    """Never built as something else."""
    value = next(iter(changes.values()))
    with pytest.raises(CheckpointError, match=value if isinstance(value, str) else value[0]):
        UNet2DConditionModel(**tiny.UNET | changes)


VAES: list[dict[str, Any]] = [
    {},
    dict(layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    dict(mid_block_add_attention=False),
    dict(norm_num_groups=2, in_channels=1, out_channels=1, act_fn="swish"),
]


@pytest.mark.parametrize("changes", VAES, ids=str)
def test_autoencoder(changes: dict[str, Any]) -> None:
    peer = vae(**changes)
    ours, x = twin(peer), draw(2, peer.config.in_channels, 32, 48)
    z = draw(2, peer.config.latent_channels, 4, 6)
    with torch.no_grad():
        theirs, posterior = peer.encode(x).latent_dist, ours.encode(x)
        assert close(posterior.mode(), theirs.mode())
        assert close(posterior.std, theirs.std)
        expected = theirs.sample(generator=torch.Generator().manual_seed(4))
        assert close(posterior.sample(draw(*theirs.mean.shape, seed=4)), expected)
        assert close(posterior.sample(lambda: draw(*theirs.mean.shape, seed=4)), expected)
        assert close(ours.decode(z), peer.decode(z).sample)


def test_autoencoder_keeps_the_spread_within_bounds() -> None:
    """Extreme variances are cut as the peer cuts them."""
    peer = vae()
    with torch.no_grad():
        peer.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 25.0, -35.0])
        x = draw(1, 3, 16, 16)
        expected, actual = peer.encode(x).latent_dist.std, twin(peer).encode(x).std
    assert torch.allclose(actual, expected, rtol=1e-5)
    assert actual.max() < 23000


@pytest.mark.parametrize("changes", [{}, dict(latent_channels=16), dict(upsampling_scaling_factor=2)], ids=str)
def test_tiny_autoencoder(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.AutoencoderTiny(**TINY_VAE | changes), 2)
    ours, x, z = twin(peer), draw(2, 3, 16, 24).clamp(-1, 1), 5 * draw(2, peer.config.latent_channels, 4, 6)
    with torch.no_grad():
        posterior = ours.encode(x)
        assert posterior.std is None
        assert close(posterior.mode(), peer.encode(x).latents)
        assert close(ours.decode(z), peer.decode(z).sample)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (AutoencoderKL, tiny.VAE | dict(act_fn="gelu")),
        (AutoencoderKL, tiny.VAE | dict(down_block_types=("AttnDownEncoderBlock2D",) * 4)),
        (AutoencoderTiny, TINY_VAE | dict(act_fn="gelu")),
        (CLIPTextModel, TEXT | dict(hidden_act="gelu_fast_and_loose")),
        (CLIPVisionModelWithProjection, VISION | dict(hidden_act="gelu_fast_and_loose")),
    ],
)
def test_other_networks_of_other_kinds_are_refused(cls: type[Network], changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"gelu|AttnDown"):
        cls(**changes)


IDS = torch.tensor([[1, 7, 59, 12, 59, 59], [1, 2, 2, 40, 41, 59], [1, 59, 3, 3, 3, 3]])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("changes", [dict(eos_token_id=2), dict(eos_token_id=59), dict(hidden_act="gelu")], ids=str)
def test_text_encoder(projection: bool, changes: dict[str, Any]) -> None:
    """All hidden states, the normed last one, and the pooled one at the end token, whatever id the config gives it."""
    peer = text_model(projection, **changes)
    ours = twin(peer)
    with torch.no_grad():
        theirs, out = peer(IDS, output_hidden_states=True), ours(IDS)
        assert len(out.hidden_states) == len(theirs.hidden_states)
        assert all(map(close, out.hidden_states, theirs.hidden_states))
        assert close(out.last, theirs.last_hidden_state)
        assert close(out.pooled, theirs.text_embeds if projection else theirs.pooler_output)
        assert close(ours.norm(out.hidden_states[-1]), out.last)


def test_vision_encoder() -> None:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=16, hidden_act="quick_gelu")
    peer = tiny.redraw(transformers.CLIPVisionModelWithProjection(config), 3)
    x = draw(2, 3, 32, 32)
    with torch.no_grad():
        assert close(twin(peer)(x), peer(x).image_embeds)


def safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as Peer

    config = transformers.CLIPConfig(
        projection_dim=16, text_config=TEXT, vision_config=VISION | dict(projection_dim=16)
    )
    checker = tiny.redraw(Peer(config), 5)
    with torch.no_grad():
        for name, high in (("concept_embeds_weights", 0.42), ("special_care_embeds_weights", 0.3)):
            getattr(checker, name).fill_(high)
    return checker


def test_safety_checker() -> None:
    """Flags the pictures that the peer's flags: some, not all, and some only for the stricter threshold."""
    peer = safety_checker()
    ours, x = twin(peer), draw(64, 3, 32, 32)
    flagged = peer(clip_input=x, images=torch.zeros(64, 1))[1]
    assert 5 < sum(flagged) < 59
    assert ours(x).tolist() == flagged
    with torch.no_grad():
        for checker in (peer, ours):
            checker.special_care_embeds_weights.fill_(1.0)
    lenient = peer(clip_input=x, images=torch.zeros(64, 1))[1]
    assert sum(lenient) < sum(flagged)
    assert ours(x).tolist() == lenient


def peers_full_size(config: dict[str, Any]) -> Any:
    """The peer's network on the meta device."""
    name = config["_class_name"]
    own = {key: value for key, value in config.items() if not key.startswith("_") and key != "model_type"}
    with torch.device("meta"):
        if name == "StableDiffusionSafetyChecker":
            from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as Peer

            return Peer(transformers.CLIPConfig(**own))
        if name.startswith("CLIP"):
            return getattr(transformers, name)(transformers.CLIPTextConfig(**own))
        return getattr(diffusers, name).from_config(config)


@pytest.mark.parametrize("name", FULL)
def test_full_size_checkpoints_have_the_peers_keys_and_shapes(name: str) -> None:
    peer = peers_full_size(FULL[name])
    with torch.device("meta"):
        ours = OURS[FULL[name]["_class_name"]].from_config(FULL[name])
    expected = {ours.renamed(key): tensor.shape for key, tensor in peer.state_dict().items()}
    expected.pop(None, None)
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


def picture_of(network: Any) -> Tensor:
    """Something that depends on all weights, of ours or of the peer's network."""
    name, peers = type(network).__name__, not isinstance(network, Network)
    with torch.no_grad():
        if name == "UNet2DConditionModel":
            out = network(draw(1, 4, 8, 8), torch.tensor([7]), draw(1, 5, 24))
            return out.sample if peers else out
        if name.startswith("Autoencoder"):
            code = network.encode(draw(1, 3, 32, 32))
            z = getattr(code, "latent_dist", code).mode() if not hasattr(code, "latents") else code.latents
            return network.decode(z).sample if peers else network.decode(z)
        if "Text" in name:
            out = network(IDS)
            return out.last_hidden_state if peers else out.last
        if "Vision" in name:
            out = network(draw(1, 3, 32, 32))
            return out.image_embeds if peers else out
        return torch.stack([tensor.float().sum() for tensor in network.state_dict().values()])


NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": unet,
    "vae": vae,
    "tiny-vae": lambda: tiny.redraw(diffusers.AutoencoderTiny(**TINY_VAE), 2),
    "text": lambda: text_model(False),
    "text-projection": lambda: text_model(True, eos_token_id=59),
    "vision": lambda: tiny.redraw(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=16)), 3
    ),
    "safety": safety_checker,
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_folders_go_both_ways(name: str, shards: bool, tmp_path: Path) -> None:
    """What the peer saves loads here, and what is saved here loads there, whole or in shards."""
    peer = NETWORKS[name]()
    size = max(tensor.nbytes for tensor in peer.state_dict().values()) * 3 if shards else 10**9
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours = OURS[type(peer).__name__].from_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or not shards
    ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
    assert bool(list((tmp_path / "ours").glob("*.index.json"))) == shards
    back = type(peer).from_pretrained(tmp_path / "ours").eval()
    again = type(ours).from_pretrained(tmp_path / "ours")
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))
    if name == "safety":
        x = draw(16, 3, 32, 32)
        images = torch.zeros(16, 1)
        assert ours(x).tolist() == peer(x, images)[1] == back(x, images)[1]
        return
    assert close(picture_of(ours), picture_of(peer))
    assert close(picture_of(back), picture_of(peer))


def test_fresh_networks_can_be_saved_for_the_peer(tmp_path: Path) -> None:
    """A configuration that was given only in part is written in full."""
    for name, network in (("unet", UNet2DConditionModel(**tiny.UNET)), ("vae", AutoencoderKL(**tiny.VAE))):
        network.eval().save_pretrained(tmp_path / name)
        back = getattr(diffusers, type(network).__name__).from_pretrained(tmp_path / name)
        assert close(picture_of(network), picture_of(back))
    network = CLIPTextModel(**TEXT | dict(eos_token_id=2)).eval()
    network.save_pretrained(tmp_path / "text")
    assert close(picture_of(network), picture_of(transformers.CLIPTextModel.from_pretrained(tmp_path / "text")))


@pytest.mark.parametrize("flat", [True, False])
def test_old_names_of_the_autoencoders_attention(flat: bool, tmp_path: Path) -> None:
    """query, key, value and proj_attn, as linear layers or as convolutions of one pixel."""
    peer = vae()
    peer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in [key for key in tensors if ".attentions." in key]:
        tensor, old = tensors.pop(key), key
        for new, former in names.items():
            old = old.replace(f".{new}.", f".{former}.")
        tensors[old] = tensor if flat or tensor.ndim == 1 or "norm" in key else tensor[:, :, None, None].contiguous()
    assert sum(".query." in key for key in tensors) == 4
    save_file(tensors, tmp_path / WEIGHTS)
    assert close(picture_of(AutoencoderKL.from_pretrained(tmp_path)), picture_of(peer))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_every_age(prefix: str, tmp_path: Path) -> None:
    """With or without the prefix, with the table of positions that old files have."""
    peer = text_model(False)
    peer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {prefix + key.removeprefix("text_model."): tensor for key, tensor in load_file(file).items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(20)[None]
    save_file(tensors, file)
    assert close(picture_of(CLIPTextModel.from_pretrained(tmp_path)), picture_of(peer))


def saved(folder: Path, size: int | str = 10**9) -> Path:
    twin(unet()).save_pretrained(folder, max_shard_size=size)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        UNet2DConditionModel.from_pretrained(folder)
    text = str(raised.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return refusal(folder)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    text = changed(saved(tmp_path), lambda tensors: tensors.pop("mid_block.resnets.0.conv1.weight"))
    assert "lacks mid_block.resnets.0.conv1.weight" in text
    text = changed(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors)[:5]])
    assert "and 3 more tensors" in text


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    text = changed(saved(tmp_path), lambda tensors: tensors.update(surplus=torch.zeros(1)))
    assert "surplus" in text
    assert "UNet2DConditionModel has no use for" in text


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("conv_in.weight", torch.zeros(16, 9, 3, 3)),
        ("conv_in.bias", torch.zeros(17)),
        ("conv_in.bias", torch.tensor(1.0)),
        ("time_embedding.linear_1.weight", torch.zeros(16, 64)),
    ],
)
def test_misshaped_tensors_are_named_with_both_shapes(name: str, tensor: Tensor, tmp_path: Path) -> None:
    """Transposed ones too: as many numbers are not enough."""
    wanted = UNet2DConditionModel(**tiny.UNET).get_parameter(name).shape
    text = changed(saved(tmp_path), lambda tensors: tensors.update({name: tensor}))
    for part in (name, WEIGHTS, str(tuple(tensor.shape)), str(tuple(wanted))):
        assert part in text


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_truncated_files_are_named(keep: float, tmp_path: Path) -> None:
    file = saved(tmp_path) / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    assert f"{file} is truncated or damaged" in refusal(tmp_path)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    index = saved(tmp_path, "40KB") / f"{WEIGHTS}.index.json"
    assert UNet2DConditionModel.from_pretrained(tmp_path).config.in_channels == 4
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[1]
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    assert f"lacks {shard}" in refusal(tmp_path)
    content["weight_map"]["conv_in.bias"] = "../elsewhere"
    index.write_text(json.dumps(content))
    assert "outside its folder" in refusal(tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": null}', '{"weight_map": {}}'):
        index.write_text(damaged)
        assert str(index) in refusal(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", "null", ""])
def test_damaged_configurations_are_named(config: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_text(config)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_configurations_of_nonsense_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "config.json"
    whole = json.loads(file.read_text())
    for changes in (
        dict(block_out_channels=[16, "32"]),
        dict(block_out_channels=[]),
        dict(norm_num_groups=7),
        dict(layers_per_block=None),
        dict(up_block_types=["UpBlock2D"] * 3),
    ):
        file.write_text(json.dumps(whole | changes))
        assert str(tmp_path) in refusal(tmp_path)


def test_variants(tmp_path: Path) -> None:
    """A variant's file is taken where there is one, else the plain one."""
    network = twin(unet())
    network.save_pretrained(tmp_path)
    network.half().save_pretrained(tmp_path, variant="fp16")
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", WEIGHTS, WEIGHTS.replace(".s", ".fp16.s")}
    load = UNet2DConditionModel.from_pretrained
    assert (load(tmp_path).dtype, load(tmp_path, variant="fp16").dtype) == (torch.float32, torch.float16)
    assert load(tmp_path, variant="other").dtype == torch.float32
    assert load(tmp_path, variant="fp16", dtype=torch.float32).dtype == torch.float32
    peer = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(peer.conv_in.weight, network.conv_in.weight)
    network.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    assert torch.equal(load(tmp_path / "shards", variant="fp16").conv_in.weight, network.conv_in.weight)
    peer = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "shards", variant="fp16", torch_dtype=torch.float16
    )
    assert torch.equal(peer.conv_in.weight, network.conv_in.weight)


def test_saving_over_the_folder_that_is_in_use(tmp_path: Path) -> None:
    """The weights are mapped from the very file that is replaced."""
    network = UNet2DConditionModel.from_pretrained(saved(tmp_path))
    before = picture_of(network)
    network.save_pretrained(tmp_path)
    assert torch.equal(picture_of(network), before)
    assert torch.equal(picture_of(UNet2DConditionModel.from_pretrained(tmp_path)), before)


def test_changing_weights_does_not_change_the_file(tmp_path: Path) -> None:
    file = saved(tmp_path) / WEIGHTS
    before = file.read_bytes()
    network = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert file.read_bytes() == before


def mapped(file: Path) -> list[range]:
    """The addresses where a file is mapped into memory."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(f" {file}")]
    return [range(int(low, 16), int(high, 16)) for low, high in spans]


def test_weights_are_not_copied_where_they_fit(tmp_path: Path) -> None:
    file = (saved(tmp_path) / WEIGHTS).resolve()
    network = UNet2DConditionModel.from_pretrained(tmp_path)
    spans = mapped(file)
    assert all(any(weight.data_ptr() in span for span in spans) for weight in network.parameters())
    half = UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float16)
    spans = mapped(file)
    assert not any(weight.data_ptr() in span for weight in half.parameters() for span in spans)


MEASURE = """
import re, sys, torch
from pathlib import Path
from autopipeline.models.clip import CLIPTextModel

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
torch.ones(8).sum()
CLIPTextModel.from_pretrained(sys.argv[2])
before = peak()
network = CLIPTextModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
total = sum(float(weight.sum()) for weight in network.parameters())
print(peak() - before)
"""


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.1), ("bfloat16", 1.6)])
def test_peak_memory_of_loading(dtype: str, share: float, tmp_path: Path) -> None:
    """Weights stand in memory once; with a cast, once as stored (pages of the file) and once as wanted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell the peak")
    for name, vocabulary in (("large", 2**19), ("small", 60)):
        CLIPTextModel(**TEXT | dict(vocab_size=vocabulary, hidden_size=32)).save_pretrained(tmp_path / name)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small"), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) <= share * size


@pytest.mark.parametrize("mask", [None, "words", "bias", "pairs"])
@pytest.mark.parametrize(
    ("queries", "picture"), [(9, slice(4, None)), (9, slice(5)), (9, slice(2, 6)), (5, slice(4, 9))]
)
def test_a_picture_apart(queries: int, picture: slice, mask: str | None) -> None:
    """In the rows marked, its tokens see of it only themselves; everything else is as ever."""
    q, k, v = (torch.randn(3, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (queries, 9, 10))
    v, rows = v[:, :, :9], torch.tensor([True, False, True])
    among = torch.zeros(9, dtype=torch.bool)
    among[picture] = True
    seen = ~(among[:, None] & among) | torch.eye(9, dtype=torch.bool)
    seen = torch.where(rows[:, None, None, None], seen, True)[:, :, 9 - queries :]
    drawn = torch.randn(3, 1, queries, 9, generator=torch.Generator().manual_seed(1))
    words = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    words[..., ~among] = torch.rand(3, 1, 1, int((~among).sum()), generator=torch.Generator().manual_seed(2)) > 0.5
    given = {None: None, "words": words, "bias": drawn, "pairs": (drawn > -1) | among}[mask]
    expected = (
        seen if given is None else seen & given if given.dtype == torch.bool else given.masked_fill(~seen, -torch.inf)
    )
    actual = attention.attend(q, k, v, attention.Apart(rows, picture, given))
    assert torch.allclose(actual, attention.attend(q, k, v, expected), atol=1e-6)
