"""Layers in eight bits: how far off they are, what becomes of them, and what takes them back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autopipeline as ap
from autopipeline import pipeline
from autopipeline.speed import packing, prepare, quantizing, swapped

pytestmark = pytest.mark.skipif(not packing.able(torch.float32), reason="this torch has no oneDNN")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Some(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 64, 3, padding=1)  # too narrow
        self.wide = nn.Conv2d(64, 96, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(96, 96, 3, padding=1, groups=2)
        self.linear = nn.Linear(96, 128)
        self.bare = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.wide(self.first(x)).relu()).relu()
        return self.bare(self.linear(x.movedim(1, -1)).relu())


def some(dtype: torch.dtype = torch.float32) -> tuple[Some, Some]:
    torch.manual_seed(0)
    one = Some().requires_grad_(False).to(dtype)
    other = copy.deepcopy(one)
    assert quantizing.quantize([other], "int8") == 3
    return one, other


def error(made: Tensor, expected: Tensor) -> float:
    """Relative, in the mean square."""
    return float((made - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_eight_bits_are_near(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packing.able(dtype):
        pytest.skip("oneDNN has no such numbers here")
    one, other = some(dtype)
    kinds = [type(each) for each in other.children()]
    conv, linear = quantizing.QuantizedConv2d, quantizing.QuantizedLinear
    assert kinds == [nn.Conv2d, conv, nn.Conv2d, linear, linear]
    for size in ((8, 8), (16, 24), (7, 5)):
        x = drawn(2, 8, *size).to(dtype)
        made = other(x)
        assert made.dtype == dtype
        assert 1e-4 < error(made, one(x)) < 0.03
    monkeypatch.setattr(quantizing, "ROWS", 5 * 96)  # rows are rounded five by five
    x = drawn(3, 7, 96).to(dtype)
    assert error(other.linear(x), one.linear(x)) < 0.02


@torch.no_grad()
def test_whole_numbers_are_rounded_to_the_nearest() -> None:
    x, step, nought = quantizing.rounded(torch.tensor([-2.5, 0.04, 0.06, 23.0]))
    assert step == pytest.approx(0.1)
    assert nought == 25
    assert x.tolist() == [0, 25, 26, 255]
    assert quantizing.rounded(torch.zeros(3))[0].tolist() == [0, 0, 0]
    x, step, nought = quantizing.rounded(torch.tensor([2.0, 5.1]))  # which nought itself is among
    assert (x.tolist(), nought, step) == ([100, 255], 0, pytest.approx(0.02))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: one.to(torch.bfloat16).to(torch.float32)])
def test_they_stay_so_on_the_way(way: Callable[[Some], Some]) -> None:
    one, other = some()
    moved = way(other)
    for network in (moved, other):
        assert quantizing.quantized(network)
        with torch.no_grad():
            assert error(network(drawn(1, 8, 8, 8)), one(drawn(1, 8, 8, 8))) < 0.05
    other.load_state_dict(one.state_dict())
    assert quantizing.quantized(other)


def test_training_and_taking_back_find_the_plain_weights() -> None:
    one, other = some()
    assert all(torch.equal(one.state_dict()[name], each) for name, each in other.state_dict().items())
    quantizing.plain_networks([other])
    assert [type(each) for each in other.modules()] == [type(each) for each in one.modules()]
    assert not hasattr(other.linear, "whole")
    with torch.no_grad():
        assert torch.equal(other(drawn(1, 8, 8, 8)), one(drawn(1, 8, 8, 8)))
    quantizing.quantize([other], "int8")
    other.requires_grad_(True)(drawn(1, 8, 8, 8)).sum().backward()
    assert not quantizing.quantized(other)


def test_pictures_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.AutoPipelineForText2Image.from_pretrained("scenes-128")
    pipe.set_progress_bar_config(disable=True)
    call = dict(prompt="a large red circle on a white background", num_inference_steps=8, guidance_scale=3, seed=5)
    plain = pipe(**call, output_type="np").images
    assert pipe.quantize("int8") is pipe
    assert quantizing.quantized(pipe.unet)
    assert not quantizing.quantized(pipe.vae)
    monkeypatch.setattr(prepare, "LARGE", 0)  # the other layers are prepared beside them
    made = pipe(**call, output_type="np").images
    assert quantizing.quantized(pipe.unet)
    assert any(isinstance(each, packing.Packed) for each in pipe.unet.modules())
    assert np.abs(made - plain).max() > 0
    assert 10 * np.log10(1 / np.square(made - plain).mean()) > 25  # decibels of PSNR
    with pytest.raises(ValueError, match="can't be compiled"):
        pipe.compile()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_destination", lambda args, kwargs: (torch.device("cuda"), None))
        with pytest.raises(ValueError, match="are for the CPU"):
            pipe.to("cuda")
    pipe.quantize(disable=True)
    assert np.abs(pipe(**call, output_type="np").images - plain).max() < 1e-3
    prepare.restore(pipe.components.values())


def test_what_can_not_be_quantized_is_said(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    monkeypatch.setattr(quantizing, "LEAST", 10**6)
    for call, said in (
        (lambda: pipe.quantize("int8"), "large enough for int8"),
        (lambda: pipe.quantize("int4"), "takes int8 or float8, not 'int4'"),
        (lambda: pipe.quantize("float8"), "float8 is for GPUs"),
        (lambda: pipe.quantize("float8", disable=True), "takes back int8 alone, not 'float8'"),
        (lambda: pipe.quantize("int8", "unnet"), "There is no 'unnet'; the networks are .*unet"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not any(isinstance(each, swapped.Swapped) for each in pipe.unet.modules())
    pipe.compile("unet", backend="eager")
    with pytest.raises(ValueError, match="quantized before they are compiled"):
        pipe.quantize("int8")
    pipe.compile(disable=True)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"pip install 'autopipeline\[torchao\]'"):
        quantizing.quantize([nn.Linear(64, 64, device="meta")], "float8")


def test_what_torchao_has_replaced_is_not_taken_back() -> None:
    kind = type("Whole", (torch.Tensor,), {"__module__": "torchao.dtypes"})
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2).as_subclass(kind))
    with pytest.raises(ValueError, match="torchao has replaced the weights"):
        quantizing.plain_networks([layer])
