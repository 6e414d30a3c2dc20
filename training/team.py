"""Processes that train one model together: one thread each, so that none waits for a core that others are using."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Team:
    """`size` processes with the same weights; the default is one alone."""

    rank: int = 0
    size: int = 1
    store: dist.TCPStore | None = None

    @classmethod
    def join(cls, rank: int, size: int, port: int) -> Team:
        """Wait for the others; the process with rank 0 has to be there."""
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        return cls(rank, size, store)

    def parts(self, name: str, count: int) -> Iterator[int]:
        """This member's share of `count` parts of a job: whoever is free takes the next one."""
        if self.store is None:
            yield from range(count)
            return
        while (part := self.store.add(name, 1) - 1) < count:
            yield part

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all members' x, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def told(self, value: float) -> float:
        """What the first member says."""
        x = torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64)
        return self.sum(x).item()
