"""Safety checkers: Stable Diffusion's flags a picture close to one of its concepts; DeepFloyd's is a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.clip import VISION_DEFAULTS, CLIPVisionModelWithProjection, VisionTransformer
from autopipeline.models.network import Network


class Vision(nn.Module):
    """The vision encoder under the name that the checkpoints have."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)


class IFSafetyChecker(Network):
    """DeepFloyd's: two lines through CLIP's embeddings, one for what must not be seen, one for marks of others."""

    library = "transformers"

    def __init__(self, vision_config: dict[str, Any] | None = None) -> None:
        config: dict[str, Any] = vision_config or {}
        self.vision_model = CLIPVisionModelWithProjection(**config)
        width = int(self.vision_model.config.projection_dim)
        self.p_head, self.w_head = nn.Linear(width, 1), nn.Linear(width, 1)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), prepared for CLIP, to (B, 2) of bool: is it flagged, is it marked."""
        embeds = self.vision_model(pixels)
        return torch.cat([self.p_head(embeds), self.w_head(embeds)], 1) > 0.5

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """A table of positions in older files is of no use."""
        return None if key.endswith("position_ids") else key


class StableDiffusionSafetyChecker(Network):
    """Compares CLIP embeddings with 17 concepts; 3 others make it stricter by 0.01."""

    library = "transformers"

    def __init__(self, projection_dim: int = 512, vision_config: dict[str, Any] | None = None) -> None:
        config: dict[str, Any] = VISION_DEFAULTS | (vision_config or {})
        self.vision_model = Vision(config)
        self.visual_projection = nn.Linear(config["hidden_size"], projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(17, projection_dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(3, projection_dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(17), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(3), requires_grad=False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Which of the pictures (B, 3, H, W), prepared for CLIP, are flagged: (B,) of bool."""
        embeds = functional.normalize(self.visual_projection(self.vision_model.vision_model(pixels)))

        def excess(concepts: Tensor, thresholds: Tensor, extra: Tensor | float) -> Tensor:
            cosine = embeds @ functional.normalize(concepts).T - thresholds
            return (((cosine + extra) * 1000).round() > 0).any(-1, keepdim=True)  # compared at three digits

        special = excess(self.special_care_embeds, self.special_care_embeds_weights, 0.0)
        return excess(self.concept_embeds, self.concept_embeds_weights, special * 0.01).squeeze(-1)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Older files have a table of positions that is of no use; newer ones leave one level of names out."""
        if key.endswith("position_ids"):
            return None
        head, tail = "vision_model.", key.removeprefix("vision_model.")
        return head + head + tail.removeprefix(head) if key.startswith(head) else key
