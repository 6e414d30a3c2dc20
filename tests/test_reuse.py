"""Steps without a forward pass: when the network is asked, and what is said in its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autopipeline as ap
from autopipeline import denoise
from autopipeline.reuse import Reuse
from autopipeline.stage import Pred


def said(time: float, x: Tensor) -> tuple[Pred, ...]:
    """What changes in a straight line over time."""
    return Pred(x.new_full(x.shape, 2.0 + 0.01 * time)), Pred(x.new_full(x.shape, 1.0 - 0.02 * time))


def walk(limit: float | None, steps: int, pace: float = 0.1) -> tuple[list[int], float]:
    """The steps at which the network is asked, and the largest error of what is said at the others."""
    reuse, asked, error = Reuse(limit), [], 0.0
    for k in range(steps):
        x, t = torch.full((1, 4, 2, 2), pace * k), torch.tensor(100.0 - k)
        answer = reuse.answer(x, t, {}, k == steps - 1)
        if answer is None:
            asked.append(k)
            reuse.note(x, t, {}, said(float(t), x))
        else:
            pairs = zip(answer, said(float(t), x), strict=True)
            error = max(error, *(float((a.mean - b.mean).abs().max()) for a, b in pairs))
    return asked, error


def test_straight_lines_are_told_exactly_and_asked_for_less_the_higher_the_limit() -> None:
    assert walk(None, 12) == ([*range(12)], 0.0)
    assert walk(0.0, 12)[0] == [*range(12)]
    few, error = walk(0.02, 40)
    fewer, _ = walk(0.05, 40)
    assert few[:2] == fewer[:2] == [0, 1]
    assert few[-1] == fewer[-1] == 39
    assert 2 < len(fewer) < len(few) < 40
    assert error < 1e-5


def test_what_fits_no_more_is_asked_for() -> None:
    reuse, x, words = Reuse(1.0), torch.ones(1, 4, 2, 2), torch.ones(2, 3)
    for k in range(2):
        reuse.note(x + k, torch.tensor(9.0 - k), {"text": words}, said(9 - k, x))
    t = torch.tensor(7.0)
    assert reuse.answer(x, t, {"text": words.clone()}, last=False) is not None
    assert reuse.answer(x, t, {"text": words}, last=True) is None
    for other in ({"text": words[:1]}, {"text": words * 2}, {}, {"text": words, "mask": words}):
        assert reuse.answer(x, t, other, last=False) is None  # guidance has ended, a callback has changed the text ...
    reuse.note(x, torch.tensor(8.0), {"text": words}, said(8, x))  # a second question at the same time
    assert reuse.answer(x, t, {"text": words}, last=False) is None
    reuse.note(x, t, {"text": words[:1]}, said(7, x)[:1])
    assert reuse.answer(x, torch.tensor(6.0), {"text": words[:1]}, last=False) is None  # two passes alike are needed


def test_a_callback_that_changes_the_prompt_is_heard(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd"))
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []
    step = 0

    def changed(_: Any, index: int, __: Any, tensors: Any) -> Any:
        nonlocal step
        step = index + 1
        return {"prompt_embeds": tensors["prompt_embeds"] * (2 if index == 4 else 1)}

    monkeypatch.setattr(denoise, "answer", lambda asks, real=denoise.answer: asked.append(step) or real(asks))
    call = dict(num_inference_steps=12, scheduler="DDIM", seed=1, reuse=1.0, output_type="latent")
    pipe("red cat", callback_on_step_end=changed, callback_on_step_end_tensor_inputs=["prompt_embeds"], **call)
    assert {0, 1, 5, 6, 11} <= set(asked)
    assert len(asked) < 12


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_pictures_with_reuse(checkpoint: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []
    monkeypatch.setattr(denoise, "answer", lambda asks, real=denoise.answer: asked.append(len(asks)) or real(asks))

    def made(reuse: Any, prompt: Any = "red cat") -> tuple[Any, int]:
        asked.clear()
        return pipe(prompt, num_inference_steps=12, output_type="np", seed=1, reuse=reuse).images, sum(asked)

    plain, count = made(None)
    assert count >= 12
    some, fewer = made(0.3)
    assert 3 <= fewer < count
    assert 0 < np.abs(some - plain).max() < 0.2
    assert np.array_equal(made(0.3)[0], some)  # nothing stays from one call to the next
    both, total = made([0.3, None], ["red cat", "red cat"])
    assert total == fewer + count
    assert np.allclose(both[0], some[0], atol=1e-5)
    for wrong, error in (("much", TypeError), (-1, ValueError), (2, ValueError)):
        with pytest.raises(error, match="reuse"):
            pipe("red cat", reuse=wrong)


def test_the_shipped_model_keeps_its_picture_with_half_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ap.AutoPipelineForText2Image.from_pretrained("scenes-128")
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []
    monkeypatch.setattr(denoise, "answer", lambda asks, real=denoise.answer: asked.append(len(asks)) or real(asks))
    call = dict(prompt="a large red circle on a white background", num_inference_steps=20, guidance_scale=3, seed=5)
    plain = pipe(**call, output_type="np").images
    asked.clear()
    made = pipe(**call, output_type="np", reuse=0.2).images
    assert sum(asked) <= 13
    assert 10 * np.log10(1 / np.square(made - plain).mean()) > 45  # decibels of PSNR; it is about 60
