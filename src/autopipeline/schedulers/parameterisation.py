"""What the network predicts, as the clean sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def clean(config: Mapping[str, Any], x: Tensor, pred: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample, from x = alpha * clean + sigma * noise and the prediction."""
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return (x - sigma * pred) / alpha
    if kind in ("sample", "original_sample"):
        return pred
    if kind == "v_prediction":
        size = (alpha**2 + sigma**2) ** 0.5  # 1 unless x is kept unscaled
        return (alpha * x - sigma * size * pred) / size**2
    if kind == "flow_prediction":
        return x - sigma * pred
    raise ValueError(f"prediction_type={kind!r} has to be 'epsilon', 'sample' or 'v_prediction'.")


def limited(config: Mapping[str, Any], x0: Tensor) -> Tensor:
    """The clean sample within the limits that the configuration sets: dynamic thresholding, or clipping."""
    if config.get("thresholding"):  # Saharia et al. 2022, section 2.3
        share, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        bound = torch.quantile(x0.flatten(1).abs(), share, dim=1).clamp(1, most)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-bound, bound) / bound
    if config.get("clip_sample"):
        return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
    return x0
