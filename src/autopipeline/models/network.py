"""What all networks share: a configuration, a place, a precision, a folder to come from and go to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from autopipeline.config import Config, read_object
from autopipeline.models import checkpoint


class Network(nn.Module):
    """A plain module whose parameter names are the checkpoint's keys; it has no state of its own between calls."""

    library = "diffusers"  # whose file names the weights have

    config: Config
    attentions: ClassVar[tuple[str, ...]] = ()
    """Of a transformer, the lists of blocks in which places look at each other, each with the name of that part."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        build = cls.__dict__.get("__init__")
        if build is None:
            return

        def init(self: Network, **config: Any) -> None:
            nn.Module.__init__(self)
            known = {name: p.default for name, p in inspect.signature(build).parameters.items() if name != "self"}
            given = {name: value for name, value in config.items() if name != "_class_name"}
            self.config = Config(known | given)
            build(self, **{name: self.config[name] for name in known})

        init.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
        init.__doc__ = build.__doc__
        cls.__init__ = init  # type: ignore[method-assign]

    def self_attentions(self) -> Iterable[str]:
        """Names of the attentions that `perturbed` has columns for, in their order."""
        split = [name.partition(".") for name in self.attentions]
        return [f"{blocks}.{k}.{part}" for blocks, _, part in split for k in range(len(self.get_submodule(blocks)))]  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A network with fresh weights; keys that the class does not know are kept in its `config`."""
        return cls(**dict(config))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        subfolder: str | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        use_safetensors: bool = True,
    ) -> Self:
        """Read config.json and weights from a folder; without a dtype they stay as stored.

        Raises CheckpointError where files are missing, damaged or don't fit.
        """
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = read_object(path / "config.json")
        network = checkpoint.built(cls, config, path)
        return checkpoint.fill(
            network, path, dtype=torch_dtype or dtype, device=device, variant=variant, use_safetensors=use_safetensors
        ).eval()

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """Write config.json and safetensors; in shards where they are larger than `max_shard_size` bytes."""
        checkpoint.write(self, Path(folder), variant, max_shard_size)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """The parameter that a key of the checkpoint stands for; None for one that is of no use."""
        return key
