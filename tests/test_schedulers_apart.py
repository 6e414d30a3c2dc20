"""Schedulers whose loops are their own, and what only some of them can do, against the peer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import test_schedulers as common
from autopipeline import schedulers
from test_schedulers import SHAPE, STEPS, assert_same, network, noise_of, start

diffusers = pytest.importorskip("diffusers")


COGVIDEO = "CogVideoXDPMScheduler"  # remembers what was said
SHIFTED = [
    *[dict(prediction_type=kind, timestep_spacing=spacing) for kind in common.KINDS for spacing in common.SPACINGS],
    common.ZERO_SNR | dict(snr_shift_scale=4.0),
    dict(set_alpha_to_one=False, snr_shift_scale=1.0, beta_schedule="squaredcos_cap_v2"),
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def having(solver: Any, attributes: dict[str, Any]) -> Any:
    for name, value in attributes.items():
        setattr(solver, name, value)
    return solver


def ours(scheduler: Any, first: Tensor | None = None, begin: int = 0, end: int = -1, **options: Any) -> list[Tensor]:
    """Every (t, x) of our loop, and the last clean sample."""
    own = {name: options.pop(name) for name in ("original_image", "mask") if name in options}
    steps = None if "timesteps" in options else options.pop("steps", STEPS)
    grid = scheduler.grid(steps, **options).window(begin, end)
    solver, noise = having(scheduler.solver(grid), own), noise_of(generator())
    x = start() * grid.init_noise_sigma if first is None else first
    trail: list[Tensor] = []
    for i in grid.indices:
        x, x0 = solver.step(x, network(solver.scale(x, i), grid.timesteps[i]), i, noise)
        trail += [grid.timesteps[i].float(), x]
    return [*trail, x0]


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("changes", SHIFTED, ids=str)
def test_cogvideo(steps: int, changes: dict[str, Any]) -> None:
    """What the step before gave is told to the peer's steps, and to ours in scripts; a run remembers it."""
    trails: list[list[Tensor]] = []
    for library in (diffusers, schedulers):
        scheduler = getattr(library, COGVIDEO)(**changes)
        scheduler.set_timesteps(steps)
        x, trail, drawn, clean, before = start(), [], generator(), None, None
        for t in scheduler.timesteps:
            x, clean = scheduler.step(network(x, t), clean, t, before, x, generator=drawn)
            trail += [t.float(), x]
            before = t
        trails.append([*trail, clean])
    assert_same(*trails)
    assert_same(trails[0], ours(getattr(schedulers, COGVIDEO)(**changes), steps=steps))


def test_what_cogvideo_does_not_know() -> None:
    scheduler = getattr(schedulers, COGVIDEO)()
    with pytest.raises(ValueError, match="have no effect"):
        scheduler.step(start(), None, 999, None, start(), eta=0.5)
    made = scheduler.step(start(), None, 999, None, start(), generator=generator(), return_dict=True)
    assert list(made) == ["prev_sample", "pred_original_sample"]
    plain = schedulers.CogVideoXDDIMScheduler()
    with pytest.raises(ValueError, match="CogVideoXDDIMScheduler"):
        plain.step(start(), 999, start(), eta=0.5)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("changes", [{}, dict(scaler=0.5), dict(scaler=2.0), dict(s=0.1)], ids=str)
def test_wuerstchen(steps: int, changes: dict[str, Any]) -> None:
    name = "DDPMWuerstchenScheduler"
    for own in (dict(num_inference_steps=steps), dict(timesteps=[1.0, 0.8, 0.45, 0.0]), dict(timesteps=[0.9, 0.2])):
        peer = getattr(diffusers, name)(**changes)
        peer.set_timesteps(**own)
        x, trail, drawn = start(), [], generator()
        for t in peer.timesteps[:-1]:
            x = peer.step(network(x, t), t.expand(len(x)), x, generator=drawn).prev_sample
            trail += [t, x]
        given = dict(timesteps=own["timesteps"]) if "timesteps" in own else dict(steps=steps)
        assert_same(trail, ours(getattr(schedulers, name)(**changes), **given)[:-1])
    scheduler = getattr(schedulers, name)(**changes)
    grid = scheduler.grid(STEPS)
    peer.set_timesteps(STEPS)
    for i, t in enumerate(grid.timesteps):
        expected = peer.add_noise(start(1), start(2), t.expand(2))
        assert torch.allclose(scheduler.solver(grid).noised(start(1), start(2), i), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 25, 60])
@pytest.mark.parametrize("changes", [{}, dict(sigma_min=0.1, sigma_max=50.0, snr=0.3), dict(correct_steps=3)], ids=str)
def test_predictor_and_corrector(steps: int, changes: dict[str, Any]) -> None:
    name = "ScoreSdeVeScheduler"
    peer = getattr(diffusers, name)(**changes)
    peer.set_timesteps(steps)
    peer.set_sigmas(steps)
    x, trail, drawn = start() * peer.init_noise_sigma, [], generator()
    mean = x
    for i, t in enumerate(peer.timesteps):
        sigma = peer.sigmas[i]
        for _ in range(peer.config.correct_steps):
            x = peer.step_correct(network(x, sigma), x, generator=drawn).prev_sample
            trail += [sigma, x]
        x, mean = peer.step_pred(network(x, sigma), t, x, generator=drawn, return_dict=False)
        trail += [sigma, x]
    assert_same([*trail, mean], ours(getattr(schedulers, name)(**changes), steps=steps))


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, dict(steps=20, jump_length=5, jump_n_sample=3)),
        (dict(eta=0.6), dict(steps=25)),
        (dict(eta=1.0, clip_sample=False), dict(steps=50, jump_length=10, jump_n_sample=2)),
        (dict(beta_schedule="squaredcos_cap_v2"), dict(steps=7)),
    ],
    ids=str,
)
def test_repaint(changes: dict[str, Any], times: dict[str, int]) -> None:
    """The peer's pipeline asks the network only on the ways down."""
    name = "RePaintScheduler"
    peer = getattr(diffusers, name)(**changes)
    mask = (start(8) > 0).float()
    peer.set_timesteps(times["steps"], **{key: value for key, value in times.items() if key != "steps"})
    x, trail, drawn, x0 = start(), [], generator(), start()
    last = int(peer.timesteps[0]) + 1
    for t in peer.timesteps:
        if t < last:
            x, x0 = peer.step(network(x, t), t, x, start(9), mask, generator=drawn, return_dict=False)
            trail += [t.float(), x]
        else:
            x = trail[-1] = peer.undo_step(x, last, drawn)
        last = t
    actual = ours(getattr(schedulers, name)(**changes), original_image=start(9), mask=mask, **times)
    assert_same([*trail, x0], actual)


def test_repaint_needs_a_picture() -> None:
    with pytest.raises(ValueError, match="original_image"):
        ours(schedulers.RePaintScheduler())


UNCLIP = [
    {},
    dict(prediction_type="sample"),
    dict(clip_sample=False),
    dict(clip_sample_range=2.0, num_train_timesteps=500),
]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("steps", [2, 7, 25, 500])
@pytest.mark.parametrize("changes", UNCLIP, ids=str)
def test_unclip(changes: dict[str, Any], steps: int, learned: bool) -> None:
    changes = changes | (dict(variance_type="learned_range") if learned else {})
    peer, scheduler = (lib.UnCLIPScheduler(**changes) for lib in (diffusers, schedulers))
    peer.set_timesteps(steps)
    grid = scheduler.grid(steps)
    solver, noise, drawn = scheduler.solver(grid), noise_of(generator()), generator()
    x = y = start()
    assert torch.equal(grid.timesteps, peer.timesteps)
    times = [int(t) for t in peer.timesteps]
    for i, t in enumerate(times):
        after = times[i + 1] if t else None
        variance = torch.tanh(start(i)) if learned else None
        said = torch.cat([network(x, t), variance], 1) if variance is not None else network(x, t)
        x = peer.step(said, t, x, prev_timestep=after, generator=drawn).prev_sample
        y = solver.step(y, network(y, t), i, noise, variance).x
        assert_same([x], [y])
        expected = peer.add_noise(start(1), start(2), torch.tensor([t]))
        assert torch.allclose(solver.noised(start(1), start(2), i), expected, atol=1e-5)


def test_unclip_goes_elsewhere() -> None:
    """A step to another time than the grid's next."""
    scheduler = schedulers.UnCLIPScheduler()
    peer = diffusers.UnCLIPScheduler()
    grid = scheduler.grid(5)
    solver = scheduler.solver(grid)
    for after in (0, 300, 748):
        solver.prev_timestep = after
        step = solver.step(start(), start(1), 1, noise_of(generator()))
        expected = peer.step(start(1), int(grid.timesteps[1]), start(), prev_timestep=after, generator=generator())
        assert_same([expected.prev_sample, expected.pred_original_sample], [step.x, step.x0])
    learned = schedulers.UnCLIPScheduler(variance_type="learned_range").solver(grid)
    with pytest.raises(ValueError, match="needs a network"):
        learned.step(start(), start(1), 0, noise_of(generator()))


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler"])
def test_rows_at_times_of_their_own(name: str) -> None:
    for kind in common.KINDS:
        peer, scheduler = common.pair(name, prediction_type=kind, clip_sample=True)
        if name == "DDIMParallelScheduler":
            peer, scheduler = common.pair(name, prediction_type=kind, set_alpha_to_one=True)
        peer.set_timesteps(10)
        times = torch.tensor([901, 55])
        expected = peer.batch_step_no_noise(start(1), times, start())
        assert_same([expected], [scheduler.batch_step_no_noise(start(1), times, start(), steps=10)])


def test_the_last_x_before_the_noise_of_tcd() -> None:
    peer, scheduler = common.pair("TCDScheduler")
    peer.set_timesteps(4)
    solver = scheduler.solver(scheduler.grid(4), eta=0.4)
    expected = peer.step(start(1), peer.timesteps[0], start(), eta=0.4, generator=generator())
    assert_same([expected.prev_sample], [solver.step(start(), start(1), 0, noise_of(generator())).x])
    assert_same([expected.pred_noised_sample], [solver.pred_noised_sample])
    with pytest.raises(ValueError, match="eta=2"):
        scheduler.solver(scheduler.grid(4), eta=2).step(start(), start(1), 0, noise_of(generator()))


def test_the_way_to_noise_and_back() -> None:
    """DDIM undoes what its inverse has done, with a network that always says the same."""
    config = common.config_of("DDIMScheduler")
    there, back = schedulers.DDIMInverseScheduler.from_config(config), schedulers.DDIMScheduler.from_config(config)
    x = start()
    for scheduler in (there, back):
        grid = scheduler.grid(STEPS)
        solver = scheduler.solver(grid)
        for i in grid.indices:
            x = solver.step(x, start(1), i, noise_of(generator())).x
    assert_same([start()], [x])


def test_inverse_of_predicted_samples() -> None:
    """The peer divides by no noise."""
    with pytest.raises(ValueError, match="set_alpha_to_one"):
        schedulers.DDIMInverseScheduler(prediction_type="sample").grid(STEPS)


@pytest.mark.parametrize("stochastic", [False, True])
def test_tokens_at_times_of_their_own(stochastic: bool) -> None:
    shape = (2, 5, 3)
    x, said = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    tokens = torch.tensor([[1000.0, 700.0, 300.0, 20.0, 0.0], [500.0] * 5])
    config = dict(shift=2.0, stochastic_sampling=stochastic)
    peer, scheduler = (lib.FlowMatchEulerDiscreteScheduler(**config) for lib in (diffusers, schedulers))
    peer.set_timesteps(STEPS)
    expected = peer.step(said, peer.timesteps[0], x, generator=generator(), per_token_timesteps=tokens).prev_sample
    solver, drawn = scheduler.solver(scheduler.grid(STEPS)), generator()
    solver.tokens = tokens
    assert_same([expected], [solver.step(x, said, 0, lambda: torch.randn(shape, generator=drawn)).x])


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_growing_on_the_way(mode: str) -> None:
    """The size after each step, with noise for it."""
    config = dict(scale_factors=[1.5, 1.5, 2.0], upscale_mode=mode)
    peer, scheduler = (lib.FlowMatchLCMScheduler(**config) for lib in (diffusers, schedulers))
    peer.set_timesteps(4)
    grid = scheduler.grid(4)
    solver, drawn, drawn_too = scheduler.solver(grid), generator(), generator()
    x = y = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(peer.timesteps):
        x = peer.step(network(x, t), t, x, generator=drawn).prev_sample
        shape = solver.room(y, i).shape
        y = solver.step(y, network(y, t), i, lambda shape=shape: torch.randn(shape, generator=drawn_too)).x
        assert_same([x], [y])
    assert y.shape == (1, 4, 8, 8)


def test_another_shift_for_one_run() -> None:
    peer, scheduler = (lib.FlowMatchEulerDiscreteScheduler(shift=2.0) for lib in (diffusers, schedulers))
    peer.set_shift(5.0)
    peer.set_timesteps(STEPS)
    grid = scheduler.grid(STEPS, shift=5.0)
    assert_same([peer.sigmas, peer.timesteps], [grid.sigmas, grid.timesteps])


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_shift_that_leaves_no_noise(name: str) -> None:
    """The peer's sigmas are NaN then."""
    for shift in (0.0, -1.0):
        with pytest.raises(ValueError, match="shift="):
            getattr(schedulers, name)(shift=shift)


def test_jumps_of_no_length() -> None:
    for jumps in (dict(jump_length=0), dict(jump_n_sample=0)):
        with pytest.raises(ValueError, match="jump_length"):
            schedulers.RePaintScheduler().grid(STEPS, **jumps)


@pytest.mark.parametrize("name", [name for name in common.APART if name != COGVIDEO])
def test_in_turns(name: str) -> None:
    """Two runs share one scheduler; a run in two windows is the run in one."""
    scheduler = getattr(schedulers, name)()
    own = dict(original_image=start(9), mask=torch.ones(SHAPE)) if name == "RePaintScheduler" else {}
    whole = ours(scheduler, **own)
    grid = scheduler.grid(STEPS)
    solver, other = (having(scheduler.solver(grid), own) for _ in range(2))
    noise = noise_of(generator())
    x = start() * grid.init_noise_sigma
    for i in grid.indices:
        before = x
        x = (solver if i % 2 else other).step(x, network(solver.scale(x, i), grid.timesteps[i]), i, noise).x
        if i:
            solver.step(before, before, 0, noise_of(torch.Generator().manual_seed(1)))
    assert_same(whole[-2:-1], [x], 0.0)
