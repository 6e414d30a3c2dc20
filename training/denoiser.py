"""Train the denoiser and the text encoders together on the latents of drawn scenes.

    python training/denoiser.py --out RUN/denoiser.pt --samples 400000
    python training/denoiser.py --out RUN/denoiser.pt --until 14:20  # ends at that time of day

Seeded and resumable: a run that is stopped goes on from its last checkpoint; with --samples it ends in the same
weights.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import codec
import scenes
from muon import Muon
from networks import Painter
from team import Team
from tokenizer import LENGTH, vocabulary

PART = 16  # pictures that a process takes at a time
# Mean squared error of the velocity at steps 50, 150, ... 950, measured after 164,000 samples
ERRORS = torch.tensor([0.105, 0.056, 0.040, 0.034, 0.031, 0.032, 0.043, 0.076, 0.143, 0.198])


class Speller:
    """Captions to token ids without a tokenizer's overhead: every caption word is one token."""

    def __init__(self):
        self.ids = vocabulary()[0]

    def __call__(self, captions: list[str]) -> torch.Tensor:
        end = len(self.ids) - 1
        rows = [[end - 1, *(self.ids[word + "</w>"] for word in caption.split())] for caption in captions]
        return torch.tensor([row + [end] * (LENGTH - len(row)) for row in rows])


def batch_of(seed: int, start: int, count: int, spell: Speller) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 16, 16, 16) and ids (count, 32) of the training scenes from number `start`; none comes twice."""
    ids = spell([scenes.sample(seed, i).caption for i in range(start, start + count)])
    return codec.encode(codec.pictures(seed, start, count)), ids


def signal_levels() -> torch.Tensor:
    """sqrt(alpha_bar) of the 1000 training steps: Stable Diffusion's schedule, brought to zero at the end."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).float()


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Training steps, (count,): one in six from the noisiest quarter, where what and where is decided; else uniform."""
    t = torch.randint(0, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) > 1 / 6, t, 750 + t // 4)


def worth(t: torch.Tensor) -> torch.Tensor:
    """How much the error at each training step of t counts, (count,): one over what it is in a half-trained model.

    So every noise level has the same say, as in EDM2 (Karras et al. 2024, section 2.2, there learned). Unweighed, half
    of the loss comes from the noisiest quarter, where nobody can know yet where things stand, and its noise hides what
    is still to be learned: the outlines, which take form around the middle.
    """
    at = (t.float() / 100 - 0.5).clamp(0, 8.999)
    low, share = at.long(), at.frac()
    return 0.05 / torch.lerp(ERRORS[low], ERRORS[low + 1], share)


def loss_of(model: nn.Module, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity, weighed by noise level.

    One caption in ten is dropped, a third of those as the empty text.
    """
    device, count = x0.device, len(x0)
    t = noise_levels(count, generator)
    fate = torch.rand(count, generator=generator)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    ids = torch.where((fate < 0.03)[:, None] & (torch.arange(ids.shape[1]) > 0), ids.max(), ids).to(device)
    keep = ((fate < 0.03) | (fate >= 0.1)).float().to(device)
    a = signal_levels()[t].view(-1, 1, 1, 1).to(device)
    s = (1 - a * a).sqrt()
    # Heads of 32 over 40 to 64 places: on a CPU the plain product is twice as fast as the fused kernel's backward pass.
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        v = model(a * x0 + s * noise, t.to(device), ids, keep)
    errors = (v.float() - (a * noise - s * x0)).pow(2).mean((1, 2, 3))
    return (errors * worth(t).to(device)).mean()


class Run:
    """Everything that a training run carries from step to step, and that its checkpoint holds."""

    def __init__(self, seed: int, device: str, muon_lr: float, adam_lr: float, team: Team | None = None):
        torch.manual_seed(seed)
        self.seed, self.device, self.team = seed, device, team or Team()
        self.model = Painter().to(device)
        self.mean = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        named = list(self.model.named_parameters())
        outer = ("embedding", "conv_in", "conv_out")
        matrix = [p for n, p in named if p.ndim > 1 and not any(word in n for word in outer)]
        chosen = {id(p) for p in matrix}
        other = [p for _, p in named if id(p) not in chosen]
        self.optimisers = [
            Muon(matrix, muon_lr, team=self.team),
            torch.optim.AdamW(other, adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = (muon_lr, adam_lr)
        self.spell = Speller()
        self.step = self.seen = 0
        self.used = 0.0

    def advance(self, batch: int, progress: float, part: int = PART) -> float:
        """One optimiser step; `progress` in 0..1 sets the learning rate: short warm-up, flat, then linear to zero."""
        rate = min(1.0, (self.step + 1) / 100) * min(1.0, max(0.0, 1 - progress) / 0.6)
        for optimiser, full in zip(self.optimisers, self.rates, strict=True):
            optimiser.param_groups[0]["lr"] = full * rate
        part = min(part, batch)
        loss = torch.zeros(1)
        for k in self.team.parts(f"step {self.step}", batch // part):
            start = self.seen + k * part
            x0, ids = batch_of(self.seed, start, part, self.spell)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
            share = loss_of(self.model, x0.to(self.device), ids, generator) * (part / batch)
            share.backward()
            loss += share.detach().cpu()
        self._gather(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step, self.seen = self.step + 1, self.seen + batch
        self._average()
        return loss.item()

    def _gather(self, loss: torch.Tensor) -> None:
        """Sum gradients and loss over the team."""
        if self.team.size == 1:
            return
        params = list(self.model.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        total = self.team.sum(torch.cat([loss, *(grad.flatten() for grad in grads)]))
        loss.copy_(total[:1])
        for p, rows in zip(params, total[1:].split([p.numel() for p in params]), strict=True):
            p.grad = rows.view_as(p)

    @torch.no_grad()
    def _average(self) -> None:
        share = 1 - min(0.998, (self.step + 1) / (self.step + 10))
        state = self.model.state_dict()
        floats = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.mean[k] for k in floats], [state[k] for k in floats], share)

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "counts": (self.step, self.seen, self.used),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.mean = state["mean"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seen, self.used = state["counts"]


def train(run: Run, out: Path, batch: int, progress: Callable[[Run], float]) -> None:
    began = saved_at = time.monotonic()
    before, losses = run.used, []
    first = run.team.rank == 0
    while (share := run.team.told(progress(run))) < 1:
        losses.append(run.advance(batch, share))
        run.used = before + time.monotonic() - began
        if first and run.step % 20 == 0:
            print(
                f"{run.used:.0f} s, step {run.step}, seen {run.seen}, loss {np.mean(losses):.4f}, done {share:.3f}",
                flush=True,
            )
            losses.clear()
        if first and time.monotonic() - saved_at > 120:
            run.save(out)
            saved_at = time.monotonic()
    if first:
        run.save(out)


def schedule(args: argparse.Namespace, used: float) -> Callable[[Run], float]:
    """How far the run is, by samples or by the clock."""
    if args.until is None:
        return lambda run: run.seen / args.samples
    clock = datetime.now()
    hour, minute = map(int, args.until.split(":"))
    left = (clock.replace(hour=hour, minute=minute, second=0) - clock).total_seconds()
    end = used + left % 86400  # past midnight, where the time of day has gone by
    return lambda run: run.used / end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--until", help="HH:MM, in place of --samples")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="a quarter faster on a CPU, after two minutes")
    parser.add_argument("--workers", type=int, default=1, help="processes; one for each core does best on a CPU")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        work(0, args, None)
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(work, (args, port), args.workers)


def work(rank: int, args: argparse.Namespace, port: int | None) -> None:
    team = None
    if port is not None:
        torch.set_num_threads(1)
        team = Team.join(rank, args.workers, port)
    run = Run(args.seed, args.device, args.muon_lr, args.adam_lr, team)
    if args.out.exists():
        run.load(args.out)
    if args.compile:
        run.model.compile()
    train(run, args.out, args.batch, schedule(args, run.used))


if __name__ == "__main__":
    main()
