"""What makes inputs of texts with pictures: an image processor and a tokenizer of transformers, together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from autopipeline import prompts
from autopipeline.loading import foreign


class Qwen2VLProcessor:
    """Texts with pictures for Qwen 2-VL and 2.5-VL; transformers' class of that name wants torchvision, for films."""

    mark = "<|image_pad|>"  # stands for a picture in a text

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """Read both from a folder; CheckpointError where one is missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        found = (foreign.find("processor", name) for name in ("Qwen2VLImageProcessor", "Qwen2Tokenizer"))
        return cls(*(foreign.read(each, path) for each in found))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __call__(self, texts: Sequence[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Inputs of the model for texts in which a mark stands for each of the PIL pictures, in their order."""
        seen = self.image_processor(images=list(pictures), return_tensors="pt")
        grids: Tensor = seen["image_grid_thw"]
        counts = iter((grids.prod(-1) // self.image_processor.merge_size**2).tolist())
        whole: list[str] = []
        for text in texts:
            first, *rest = text.split(self.mark)
            whole.append(first + "".join(self.mark * next(counts) + part for part in rest))
        ids, mask = prompts.foreign_tokens(self.tokenizer, whole, sys.maxsize, "longest")
        looks: Tensor = torch.as_tensor(seen["pixel_values"])
        return dict(input_ids=ids, attention_mask=mask, pixel_values=looks, image_grid_thw=grids)


class Qwen3VLProcessor(Qwen2VLProcessor):
    """The same for Qwen 3-VL, whose chats have a template."""

    def apply_chat_template(self, chat: Sequence[dict[str, Any]], **options: Any) -> Any:
        """The text of a chat, or its tokens."""
        return self.tokenizer.apply_chat_template(chat, **options)


class GlmImageProcessor:
    """Texts, with pictures or without, for GLM-Image's language model; transformers' class wants torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> Self:
        """Read both from a folder; CheckpointError where one is missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        looks = foreign.module("processor", "transformers.models.glm_image.image_processing_pil_glm_image")
        image_processor = foreign.read(looks.GlmImageImageProcessorPil, path)
        return cls(image_processor, foreign.read(foreign.find("processor", "PreTrainedTokenizerFast"), path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def __call__(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Any]], grids: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Inputs of the model for texts with as many PIL pictures each, which ask for pictures of these grids."""
        whole = [self._asked(text, pictures[k] if pictures else (), grids) for k, text in enumerate(texts)]
        targets, mark = torch.tensor([[1, *grid] for grid in grids]), self.tokenizer.image_token
        made: dict[str, Tensor] = {}
        shapes = [targets] * len(texts)
        if pictures:
            looks = self.image_processor(images=[one for each in pictures for one in each], return_tensors="pt")
            seen: Tensor = looks["image_grid_thw"]
            counts = iter((seen.prod(-1) // self.image_processor.merge_size**2).tolist())
            parts = [text.split(mark) for text in whole]
            whole = [first + "".join(mark * next(counts) + part for part in rest) for first, *rest in parts]
            shapes = [torch.cat([each, targets]) for each in seen.chunk(len(texts))]
            made = dict(pixel_values=torch.as_tensor(looks["pixel_values"]))
        begun = whole[0].startswith(self.tokenizer.bos_token)
        ids, mask = prompts.foreign_tokens(self.tokenizer, whole, sys.maxsize, "longest", add_special_tokens=not begun)
        per = torch.tensor([len(each) for each in shapes])
        return made | dict(input_ids=ids, attention_mask=mask, image_grid_thw=torch.cat(shapes), images_per_sample=per)

    def _asked(self, text: str, pictures: Sequence[Any], grids: Sequence[tuple[int, int]]) -> str:
        """A chat about the pictures, and how large the picture is to be that it ends with."""
        tokenizer = self.tokenizer
        content = [*(dict(type="image") for _ in pictures), dict(type="text", text=text)]
        said: str = tokenizer.apply_chat_template([dict(role="user", content=content)], tokenize=False)
        opens, closes = tokenizer.grid_bos_token, tokenizer.grid_eos_token
        return said + "".join(f"{opens}{h} {w}{closes}" for h, w in grids) + tokenizer.bos_token
