"""What makes networks faster leaves what they compute as it is, and goes away where weights are wanted plain."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import autopipeline as ap
import tiny
from autopipeline.loading.uncollected import uncollected
from autopipeline.models import attention as plain
from autopipeline.models import awaited, casting
from autopipeline.models.unet import UNet2DConditionModel
from autopipeline.speed import (
    attention,
    chunks,
    compiling,
    fusing,
    heap,
    machine,
    openvino,
    packing,
    precision,
    prepare,
    swapped,
    winograd,
)

pytestmark = pytest.mark.skipif(not packing.able(torch.float32), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A memory of its own, and attention as it was afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_known", None)
    monkeypatch.setattr(attention, "_chosen", {})
    yield
    attention.remove()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is packed, tiled and prepared, whether it pays or not."""
    monkeypatch.setattr(machine, "fastest", lambda key, ways: list(ways)[-1])
    monkeypatch.setattr(attention, "LEAST", 0)
    monkeypatch.setattr(prepare, "LARGE", 0)
    monkeypatch.setattr(winograd, "LEAST", 0)
    monkeypatch.setattr(winograd, "CHANNELS", 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Some(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 48, 3, padding=1)
        self.down = nn.Conv2d(48, 32, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.gate = plain.GatedLinear(32, 32)
        self.linear = nn.Linear(32, 24)
        self.bare = nn.Linear(24, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.down(self.first(x)).relu()).relu()
        return self.bare(self.linear(self.gate(x.movedim(1, -1))).relu())


@pytest.fixture
def some(eager: None) -> tuple[Some, Some]:
    torch.manual_seed(0)
    one = Some().requires_grad_(False)
    other = copy.deepcopy(one)
    assert packing.pack(other) == 6
    return one, other


@torch.no_grad()
def test_packed_layers_compute_the_same(some: tuple[Some, Some]) -> None:
    for size in [(8, 8), (16, 24), (8, 8), (7, 5)]:
        x = drawn(2, 16, *size, seed=size[1])
        assert torch.allclose(some[1](x), some[0](x), atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        xs = [drawn(1, 16, 4 + k, 9, seed=k) for k in range(16)]
        for x, made in zip(xs, pool.map(torch.no_grad()(some[1]), xs), strict=True):
            assert torch.allclose(made, some[0](x), atol=1e-5)


def _moved(one: Some) -> Some:
    return one.to(torch.float64).to(torch.float32)


def _reloaded(one: Some) -> Some:
    other = Some().requires_grad_(False)
    packing.pack(other)
    with torch.no_grad():
        other(drawn(1, 16, 8, 8))
    other.load_state_dict(one.state_dict())
    return other


def _unpacked(one: Some) -> Some:
    swapped.restore(one)
    return one


@pytest.mark.parametrize("way", [_moved, _reloaded, _unpacked, copy.deepcopy])
def test_weights_come_back_as_they_were(some: tuple[Some, Some], way: Callable[[Some], Some]) -> None:
    one, other = some
    with torch.no_grad():
        expected = one(drawn(1, 16, 8, 8))
        other(drawn(1, 16, 8, 8))
    state = one.state_dict()
    assert all(torch.equal(state[name], each) for name, each in other.state_dict().items())
    assert type(other.first) is packing.PackedConv2d  # asking for the weights leaves the layers packed
    assert type(other.gate) is packing.PackedGate
    assert other.first.spread is not None
    back = way(other)
    assert [type(part) for part in back.modules()] == [type(part) for part in one.modules()]
    assert all(torch.equal(state[name], each) for name, each in dict(back.named_parameters()).items())
    with torch.no_grad():
        assert torch.equal(back(drawn(1, 16, 8, 8)), expected)


@torch.no_grad()
@pytest.mark.parametrize("strip", [1, 1 << 30])
@pytest.mark.parametrize(
    ("shape", "bias"),
    [((2, 24, 16, 20), True), ((1, 40, 13, 7), False), ((3, 16, 1, 2), True), ((1, 256, 34, 64), True)],
)
def test_tiles_make_the_same_convolution(
    shape: tuple[int, ...], bias: bool, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "STRIP", strip)
    x, weight = drawn(*shape), drawn(33, shape[1], 3, 3, seed=1)
    offset = drawn(33, seed=2) if bias else None
    exact = functional.conv2d(x.double(), weight.double(), None if offset is None else offset.double(), padding=1)
    made = winograd.convolve(x.permute(0, 2, 3, 1), winograd.spread(weight), offset).permute(0, 3, 1, 2)
    assert made.shape == exact.shape
    assert float((made - exact).abs().max() / exact.abs().max()) < 5e-6


@pytest.mark.parametrize(
    ("form", "size", "tiled"),
    [
        ({"padding": 1}, (32, 32), True),
        ({"padding": 1}, (31, 32), False),
        ({"padding": 1, "stride": 2}, (64, 64), False),
        ({"padding": 0}, (64, 64), False),
        ({"padding": 1, "groups": 2}, (64, 64), False),
        ({"padding": 1, "dtype": torch.bfloat16}, (64, 64), False),
        ({"padding": 1, "in_channels": 32}, (64, 64), False),
        ({"padding": 1, "in_channels": 2560}, (64, 64), False),  # its kernels would take 94 of 8192 MB
    ],
)
def test_tiles_are_for_large_layers(
    form: dict[str, Any], size: tuple[int, int], tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: 8 << 30)
    layer = nn.Conv2d(**{"in_channels": 256, "out_channels": 256, "kernel_size": 3, **form})
    assert winograd.fits(layer, *size) is tiled


def test_the_machine_has_memory() -> None:
    assert 1 << 28 < machine.memory() < 1 << 50


def test_what_is_trained_is_plain(some: tuple[Some, Some]) -> None:
    one, other = some
    for part in some:
        part.requires_grad_(True)
    with torch.no_grad():
        other(drawn(1, 16, 8, 8))
    for part in some:
        part(drawn(1, 16, 8, 8)).square().sum().backward()
    assert type(other.first) is nn.Conv2d
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, its.grad, rtol=1e-4, atol=1e-5)


def test_a_packed_network_is_saved_as_ever(tmp_path: Path, eager: None) -> None:
    one = UNet2DConditionModel(**tiny.XL_UNET).requires_grad_(False)
    one.save_pretrained(tmp_path / "plain")
    packing.pack(one)
    one.save_pretrained(tmp_path / "packed")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


@pytest.mark.parametrize("way", list(attention.WAYS))
@pytest.mark.parametrize("shape", [(1, 2, 700, 1100, 40, 40), (2, 3, 5, 9, 8, 16)])
@torch.no_grad()
def test_tiles_make_the_same_attention(way: str, shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width, out = shape
    q, k, v = drawn(batch, heads, queries, width), drawn(batch, heads, keys, width), drawn(batch, heads, keys, out)
    for scale in (None, 0.3):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        made = attention.tiled(q, k, v, None, scale, attention.WAYS[way])
        assert torch.allclose(made, expected, atol=1e-5)


@torch.no_grad()
def test_attention_goes_the_fastest_way(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn(1, 2, 64, 8, seed=seed) for seed in range(3))
    mask = drawn(1, 1, 1, 64) > 0
    expected = [plain.attend(q, k, v), plain.attend(q, k, v, mask), plain.attend(q, k, v, causal=True)]
    tiles = []
    monkeypatch.setattr(attention, "tiled", lambda *given, real=attention.tiled: tiles.append(1) or real(*given))
    attention.install()
    actual = [plain.attend(q, k, v), plain.attend(q, k, v, mask), plain.attend(q, k, v, causal=True)]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(expected, actual, strict=True))
    assert len(tiles) == 2
    attention.remove()
    plain.attend(q, k, v)
    assert len(tiles) == 2


def test_the_fastest_is_found_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def way(name: str, duration: float) -> Callable[[], None]:
        return lambda: calls.append(name) or time.sleep(duration)

    ways = {"usual": way("usual", 0.02), "better": way("better", 0.001), "worse": way("worse", 0.04)}
    assert machine.fastest("here", ways) == "better"
    count = len(calls)
    assert machine.fastest("here", ways) == "better"
    monkeypatch.setattr(machine, "_known", None)  # another process
    assert machine.fastest("here", ways) == "better"
    assert len(calls) == count
    assert machine.fastest("here", {name: ways[name] for name in ("usual", "worse")}) == "usual"  # another version's
    for content in ("{", "[]", '{"here": 3}'):
        machine.file().write_text(content)
        monkeypatch.setattr(machine, "_known", None)
        assert machine.fastest("here", ways) == "better"


def test_without_a_place_to_remember_it_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.fastest("here", {"usual": lambda: None}) == "usual"


@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
def test_prepared_pipelines_make_the_same_pictures(
    checkpoint: Any, name: str, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt="red cat", num_inference_steps=2, output_type="np", seed=1)
    monkeypatch.setenv(prepare.OFF, "1")
    expected = pipe(**call).images
    assert not any(isinstance(part, swapped.Swapped) for part in pipe.vae.modules())
    monkeypatch.setenv(prepare.OFF, "0")
    assert np.allclose(pipe(**call).images, expected, atol=1e-4)
    assert any(isinstance(part, swapped.Swapped) for part in pipe.vae.modules())
    assert np.allclose(pipe(**call | dict(height=64, width=96)).images.shape[1:3], (64, 96))
    prepare.restore(pipe.components.values())
    assert not any(isinstance(part, swapped.Swapped) for part in pipe.vae.modules())
    assert np.allclose(pipe.to(torch.float64).to(torch.float32)(**call).images, expected, atol=1e-4)


@pytest.mark.parametrize("pays", [False, True])
def test_the_precision_is_what_the_machine_computes_well(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "halves_pay", lambda: pays)
    cpu, large = torch.device("cpu"), precision.SMALL + 1
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        assert precision.chosen(Counter({kind: large}), cpu) == (torch.bfloat16 if pays else torch.float32)
        assert precision.chosen(Counter({kind: 9}), cpu) == torch.float32
        assert precision.chosen(Counter({kind: large, torch.float64: 3}), torch.device("mps")) == kind
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: pays)
    there = torch.device("cuda", 1)
    assert precision.chosen(Counter({torch.float16: large}), there) == torch.float16
    expected = torch.bfloat16 if pays else torch.float32
    assert precision.chosen(Counter({torch.float32: large}), there) == expected


def test_halves_pay_where_they_are_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.halves_pay() in (False, True)
    monkeypatch.setattr(packing, "able", lambda dtype: True)
    for ratio, pays in ((1.2, False), (1.5, True)):
        monkeypatch.setattr(machine, "_known", {})
        monkeypatch.setattr(machine, "seconds", lambda ways, r=ratio: dict(zip(ways, (r, 1.0), strict=True)))
        assert precision.halves_pay() is pays


def test_auto_is_one_precision_for_all(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SMALL", 0)
    monkeypatch.setattr(precision, "halves_pay", lambda: True)
    folder = checkpoint("sd")
    numbers = precision.stored([folder / "unet", folder / "vae"])
    assert set(numbers) == {torch.float32}
    assert numbers.total() > 1000
    pipe = ap.DiffusionPipeline.from_pretrained(folder, dtype="auto")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    mixed = ap.DiffusionPipeline.from_pretrained(folder, dtype={"default": "auto", "vae": torch.float32})
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_casting_rounds_as_torch_does(source: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "PIECE", 7)
    x = (drawn(5, 9) * 300).to(source)
    assert torch.equal(casting.cast(x, dtype), x.to(dtype))
    assert casting.cast(x[:0], dtype).shape == (0, 9)


def _waiting(network: nn.Module) -> int:
    return sum(isinstance(module._parameters, awaited.Awaited) for module in network.modules())


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    """A network whose weights wait to be cast, as often as is asked for, and its weights as they have to be."""
    monkeypatch.setattr(awaited, "LEAST", 100)
    torch.manual_seed(0)
    UNet2DConditionModel(**tiny.XL_UNET).half().save_pretrained(tmp_path)
    wanted = {
        name: each.bfloat16() for name, each in UNet2DConditionModel.from_pretrained(tmp_path).state_dict().items()
    }

    def loaded() -> tuple[nn.Module, dict[str, Tensor]]:
        network = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert _waiting(network) > 10
        return network, wanted

    return loaded


NAMES = [name for name, _ in UNet2DConditionModel(**tiny.XL_UNET).named_parameters()]
LOOKS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state_dict": lambda network: network.state_dict(),
    "parameters": lambda network: dict(network.named_parameters()),
    "deepcopy": lambda network: copy.deepcopy(network).state_dict(),
    "pickle": lambda network: pickle.loads(pickle.dumps(network.state_dict())),
    "attributes": lambda network: {name: attrgetter(name)(network) for name in NAMES},
    "to": lambda network: network.to(torch.float32).to(torch.bfloat16).state_dict(),
    "load_state_dict": lambda network: _loaded_again(network).state_dict(),
    "get_parameter": lambda network: {name: network.get_parameter(name) for name in NAMES},
    "settle": lambda network: (awaited.settle(network), network.state_dict())[1],
}


def _loaded_again(network: nn.Module) -> nn.Module:
    state = copy.deepcopy(network).state_dict()
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_weights_that_wait_are_never_seen_as_stored(
    look: Callable[[nn.Module], dict[str, Tensor]], stored: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
) -> None:
    network, wanted = stored()
    found = look(network)
    assert list(found) == list(wanted)
    for name, each in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], each)
    assert not _waiting(network)


def test_weights_wait_until_they_are_needed(stored: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    network, _ = stored()
    before = _waiting(network)
    assert sum(each.numel() for each in awaited.parameters(network)) == sum(
        each.numel() for each in stored()[1].values()
    )
    assert _waiting(network) == before
    layer = network.conv_out
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is layer.weight  # one and the same from the first look on
    assert isinstance(layer.weight, nn.Parameter)
    assert _waiting(network) == before - 1
    layer.weight = nn.Parameter(layer.weight + 1)
    network.conv_in.weight = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
    assert network.conv_in.weight.shape == (1,)  # type: ignore[union-attr]
    del network.conv_norm_out.weight  # type: ignore[union-attr]
    assert "weight" not in dict(network.conv_norm_out.named_parameters())  # type: ignore[union-attr]


def test_threads_see_one_weight(stored: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    network, _ = stored()
    layers = [each for each in network.modules() if isinstance(each, nn.Linear)]
    with ThreadPoolExecutor(8) as pool:
        for layer in layers:
            assert len({id(each) for each in pool.map(lambda _, own=layer: own.weight, range(8))}) == 1


def test_networks_that_wait_are_freed_at_once(stored: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    network, _ = stored()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(network.conv_in)
        del network
        assert gone() is None
    finally:
        gc.enable()


def test_a_mapped_file_is_whole_after_its_pages_were_let_go(tmp_path: Path) -> None:
    x = drawn(300, 1000)
    save_file({"x": x}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        mapped = opened.get_tensor("x")
        made = casting.cast(mapped, torch.bfloat16, mapped=True)
        assert torch.equal(made, x.to(torch.bfloat16))
        assert torch.equal(mapped, x)


@pytest.mark.parametrize("raises", [False, True])
def test_garbage_is_collected_again_after_loading(raises: bool) -> None:
    with pytest.raises(ValueError) if raises else nullcontext(), uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        if raises:
            raise ValueError
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_compiled_pipelines_make_the_same_pictures(checkpoint: Any, name: str, eager: None) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt="red cat", num_inference_steps=2, output_type="np", seed=1)
    expected = [pipe(**call).images, pipe(**call, height=64, width=96).images]
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    assert pipe.compile(backend=backend) is pipe
    assert not any(isinstance(part, swapped.Swapped) for part in pipe.vae.modules())
    actual = [pipe(**call).images, pipe(**call, height=64, width=96).images]
    assert all(np.allclose(*pair, atol=1e-4) for pair in zip(expected, actual, strict=True))
    count = len(seen)
    assert count > 0
    pipe(**call, height=96, width=64)  # sizes in general are compiled by now
    pipe(**call)
    assert len(seen) <= count + 2
    pipe.compile(disable=True)
    assert not any(compiling.compiled(part) for part in (pipe.vae, pipe.text_encoder))
    with pytest.raises(ValueError, match="There is no 'unnet'; the networks are .*vae"):
        pipe.compile("unnet")


def test_blocks_are_compiled_one_by_one() -> None:
    network = ap.SD3Transformer2DModel(**tiny.SD3)
    assert list(compiling.regions(network)) == list(network.transformer_blocks)
    assert list(compiling.regions(nn.Linear(2, 2))) != []


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = plain.FeedForward(24), plain.FeedForward(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[..., :16])


@torch.no_grad()
def test_feed_forwards_in_parts_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LEAST", 3)
    monkeypatch.setattr(chunks, "MIDDLE", 3 * 4 * 8 * 24)  # three rows of the first, four of the second
    one = Wide()
    other = copy.deepcopy(one)
    assert chunks.chunk(other) == 2
    assert chunks.chunk(other) == 0
    assert (other.first.rows, other.second.rows) == (3, 4)
    seen: list[int] = []
    other.first.net[0].proj.register_forward_hook(lambda _, given, made: seen.append(len(given[0])))
    for shape in ((2, 5, 24), (7, 24), (2, 24), (1, 1, 3, 24)):
        x = drawn(*shape)
        assert torch.allclose(other(x), one(x), atol=1e-6)
    assert seen == [3, 3, 3, 1, 3, 3, 1, 2, 1]
    packing.pack(other)
    assert torch.allclose(other(drawn(9, 24)), one(drawn(9, 24)), atol=1e-5)
    with torch.enable_grad():
        count = len(seen)
        other(drawn(9, 24)).sum().backward()
    assert len(seen) == count + 1
    assert list(other.state_dict()) == list(one.state_dict())
    assert [type(each) for each in other.to(torch.float64).modules()] == [type(each) for each in one.modules()]


@torch.no_grad()
@pytest.mark.parametrize("way", list(attention.WAYS))
def test_keys_that_are_not_seen_are_left_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(2, 3, 40, 8), drawn(2, 3, 33, 8, seed=1), drawn(2, 3, 33, 8, seed=2)
    monkeypatch.setattr(attention, "LEAST", 0)
    monkeypatch.setattr(machine, "fastest", lambda key, ways: way)
    tiles = []
    monkeypatch.setattr(attention, "tiled", lambda *given, real=attention.tiled: tiles.append(1) or real(*given))
    attention.install()
    some = torch.arange(33) < torch.tensor([20, 31])[:, None]
    for mask in (some[:, None, None], some[:1, None, None]):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(plain.attend(q, k, v, mask), expected, atol=1e-6)
    assert len(tiles) == 2
    for mask in (some[:, None, None].float(), torch.ones(2, 3, 40, 33) > 0, torch.zeros(2, 1, 1, 33) > 0):
        plain.attend(q, k, v, mask)
    assert len(tiles) == 2


def test_memory_is_kept_inside_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(heap, "_set", said.append)
    monkeypatch.setattr(heap, "_given_back", lambda: said.append("back"))
    with heap.kept():
        with pytest.raises(KeyError), heap.kept():
            raise KeyError
        assert said == [heap.KEEPING] * 2
    assert said == [heap.KEEPING, heap.KEEPING, heap.USUAL, "back"]


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is another")
def test_large_blocks_are_used_again() -> None:
    """The system clears fresh pages, which shows in the count of page faults."""
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fresh = faults()
    with heap.kept():
        faults()
        kept = faults()
    assert kept < fresh / 4


def test_a_stream_is_prepared_as_well(checkpoint: Any, eager: None) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    steps = pipe.stream("red cat", num_inference_steps=2, seed=1)
    next(steps)
    assert any(isinstance(part, swapped.Swapped) for part in pipe.unet.modules())
    assert heap._inside == 1
    steps.close()
    assert heap._inside == 0


@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
def test_openvino_makes_the_same_pictures(checkpoint: Any, name: str, eager: None) -> None:
    pytest.importorskip("openvino")
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt="red cat", num_inference_steps=2, output_type="np", seed=1)
    expected = [pipe(**call).images, pipe(**call, height=64, width=96).images]
    assert pipe.compile(engine="openvino") is pipe
    network = pipe.unet if name != "sd3" else pipe.transformer
    assert isinstance(network, openvino.Translated)
    assert np.allclose(pipe(**call).images, expected[0], atol=1e-3)
    count = len(network.translations)
    assert count > 0
    assert np.allclose(pipe(**call, height=64, width=96).images, expected[1], atol=1e-3)
    assert len(network.translations) == 2 * count
    assert np.allclose(pipe(**call).images, expected[0], atol=1e-3)
    assert len(network.translations) == 2 * count
    assert not any(isinstance(part, packing.Packed) for part in network.modules())  # nor is it prepared besides
    state = network.state_dict()
    pipe.compile(disable=True)
    assert not any(isinstance(part, swapped.Swapped) for part in (*network.modules(), *pipe.vae.modules()))
    assert all(torch.equal(state[key], each) for key, each in network.state_dict().items())
    assert np.allclose(pipe(**call).images, expected[0], atol=1e-4)


def test_what_has_no_effect_on_compiling_is_refused(checkpoint: Any) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    for options, error, said in (
        (dict(engine="onnx"), ValueError, "has to be one of torch, openvino"),
        (dict(engine="openvino", mode="default"), TypeError, "mode is an option of torch.compile"),
        (dict(disable=True, mode="default"), TypeError, "mode has no effect"),
        (dict(disable=True, engine="openvino"), TypeError, "engine has no effect"),
    ):
        with pytest.raises(error, match=said):
            pipe.compile(**options)


def test_without_openvino_it_is_asked_for(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'autopipeline\[openvino\]'"):
        pipe.compile(engine="openvino")
    assert not any(isinstance(part, swapped.Swapped) for part in (*pipe.unet.modules(), *pipe.vae.modules()))


@torch.no_grad()
def test_openvino_keeps_the_latest_translations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(openvino, "MOST", 2)
    one = plain.FeedForward(8).to(torch.bfloat16)
    other = copy.deepcopy(one)
    openvino.translate(other)
    for count in (3, 4, 5, 3):
        x = drawn(count, 8).to(torch.bfloat16)
        assert torch.allclose(other(x).float(), one(x).float(), atol=0.05)
        assert other(x).dtype == torch.bfloat16
    assert len(other.translations) == 2
    with torch.enable_grad():
        other(drawn(3, 8).to(torch.bfloat16)).sum().backward()
    assert type(other) is plain.FeedForward


def test_names_and_files_of_swapped_networks_are_the_plain_ones(tmp_path: Path, eager: None) -> None:
    pytest.importorskip("openvino")
    one = UNet2DConditionModel(**tiny.XL_UNET).requires_grad_(False)
    one.save_pretrained(tmp_path / "plain")
    for network in (one, copy.deepcopy(one)):
        openvino.translate(network)
        network.save_pretrained(tmp_path / "other")
        for file in (tmp_path / "plain").iterdir():
            assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


@torch.no_grad()
def test_one_product_gives_queries_keys_and_values() -> None:
    torch.manual_seed(0)
    one = nn.ModuleList([plain.Attention(32, 4), plain.Attention(32, 4, context=24), plain.Attention(32, 4, bias=True)])
    assert fusing.fuse(one) == 0  # which is for halves
    one.to(torch.bfloat16).requires_grad_(False)
    replaced = copy.deepcopy(one)
    weight = torch.ones(32, 32, dtype=torch.bfloat16).as_subclass(type("Whole", (Tensor,), {}))  # as torchao does
    replaced[0].to_q.weight = nn.Parameter(weight)  # type: ignore[union-attr]
    assert fusing.fuse(replaced) == 0
    x, text = drawn(2, 9, 32).bfloat16(), drawn(2, 5, 24, seed=1).bfloat16()
    own, cross = one[0], one[1]
    assert isinstance(own, plain.Attention)
    expected, other = own(x), cross(x, text)
    state = {name: each.clone() for name, each in one.state_dict().items()}
    assert fusing.fuse(one) == 1
    assert isinstance(own, fusing.Fused)
    assert torch.allclose(own(x).float(), expected.float(), atol=1e-2)
    assert torch.equal(cross(x, text), other)
    assert all(torch.equal(state[name], each) for name, each in one.state_dict().items())
    own.to_v.weight *= 2  # in place: it holds for the product as well
    assert torch.allclose(own(x).float(), 2 * expected.float() - own.to_out[0].bias.float(), atol=3e-2)
    own.to_v.weight = nn.Parameter(state["0.to_v.weight"])  # in place of it: the layers go by themselves
    assert torch.equal(own(x), expected)
    swapped.restore(one, compiling.PREPARED)
    assert type(own) is plain.Attention
    assert own.to_q.weight.untyped_storage().nbytes() == own.to_q.weight.nbytes


@torch.no_grad()
def test_channels_last_is_for_halves(tmp_path: Path) -> None:
    one = UNet2DConditionModel(**tiny.XL_UNET).requires_grad_(False)
    assert prepare.channels_last(one) == 0
    one.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    x, text = drawn(1, 4, 16, 16).to(torch.bfloat16), drawn(1, 7, one.config.cross_attention_dim).to(torch.bfloat16)
    rest = dict(text_embeds=drawn(1, 24).to(torch.bfloat16), time_ids=torch.ones(1, 6))
    given = inspect.signature(UNet2DConditionModel.forward).parameters
    rest = {name: each for name, each in rest.items() if name in given}
    expected = one(x, torch.tensor(3), text, **rest)
    assert prepare.channels_last(one) == sum(type(each) is nn.Conv2d for each in one.modules())
    made = one(x, torch.tensor(3), text, **rest)
    assert one.conv_in(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(made.float(), expected.float(), atol=0.1)
    one.save_pretrained(tmp_path / "last")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "last" / name).read_bytes()
