"""Checkpoints of real size with random weights, made from a folder that has the configs and tokenizers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from autopipeline.config import read_object
from autopipeline.errors import CheckpointError
from autopipeline.loading.components import find_class
from autopipeline.loading.index import component_path, read_index
from autopipeline.models import checkpoint
from autopipeline.models.network import Network

DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers")
"""By which configs say how many blocks a transformer has."""


def fill(layout: Path, folder: Path, dtype: torch.dtype, depth: int | None = None) -> int:
    """Copy a layout and draw weights for its networks; gives their bytes.

    Weights are drawn so that numbers keep their size on the way through a network: norms and biases stay neutral.
    With a `depth`, transformers have so many blocks of each kind at most.
    """
    index = read_index(layout)
    shutil.copytree(layout, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.index*.json"))
    total = 0
    for name, entry in index.components.items():
        if entry is None or not (layout / name / "config.json").is_file():
            continue
        cls = find_class(name, entry[1])
        if not issubclass(cls, Network):
            raise CheckpointError(f"The {name} is a {entry[1]}, which can't be filled with random weights.")
        path = component_path(folder, name)
        config = read_object(path / "config.json")
        if depth is not None:
            config |= {key: min(config[key], depth) for key in DEPTHS if isinstance(config.get(key), int)}
            (path / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        network = checkpoint.built(cls, config, path)
        drawn = {key: _drawn(key, like, dtype) for key, like in network.state_dict().items()}
        total += sum(each.nbytes for each in drawn.values())
        save_file(drawn, path / f"{checkpoint.STEMS[cls.library]}.safetensors", metadata={"format": "pt"})
    return total


def _drawn(key: str, like: Any, dtype: torch.dtype) -> torch.Tensor:
    if not like.is_floating_point():
        return torch.arange(like.numel(), dtype=like.dtype).view(like.shape)  # places of tokens
    if like.ndim == 1:
        return torch.full(like.shape, float(key.endswith("weight")), dtype=dtype)
    inner = like[0].numel() if like.ndim > 1 else 1
    return torch.empty(like.shape, dtype=torch.float32).normal_(0, inner**-0.5).to(dtype)
