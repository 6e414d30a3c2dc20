"""From what callers write to rows of conditioning; what they get wrong is said in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TEXTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
"""Arguments that are texts, or one for each prompt."""


def count(args: Mapping[str, Any]) -> int:
    """How many prompts, or embeddings of pictures in their place, a call has."""
    for name in ("image_embeds", "image_embeddings"):
        if name in args and (name == "image_embeddings" or "prompt" not in args):
            if not isinstance(args[name], Tensor):
                raise TypeError(f"{name} are needed, as a torch.Tensor or a list of them; a prior makes them.")
            return len(args[name])
    prompt, embeds = args.get("prompt"), args.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("A prompt is needed: pass prompt= (or prompt_embeds=).")
    if prompt is not None and embeds is not None:
        raise ValueError("Pass either prompt or prompt_embeds, not both.")
    if embeds is not None:
        if not isinstance(embeds, Tensor):
            raise TypeError(f"prompt_embeds has to be a torch.Tensor, not {type(embeds).__name__}.")
        return len(embeds)
    if not isinstance(prompt, str | list | tuple):
        raise TypeError(f"prompt has to be a string or a list of strings, not {type(prompt).__name__}.")
    if not prompt and not isinstance(prompt, str):
        raise ValueError("The list of prompts is empty.")
    return 1 if isinstance(prompt, str) else len(prompt)


def check(args: Mapping[str, Any], alike: bool = True) -> None:
    """Refuse prompts and embeddings that contradict each other; `alike` embeddings have as many tokens."""
    prompts = count(args)
    for name in TEXTS:
        value = args.get(name)
        if value is None:
            continue
        if args.get("negative_prompt_embeds" if name.startswith("neg") else "prompt_embeds") is not None:
            raise ValueError(f"Pass either {name} or its embeddings, not both.")
        rows(value, prompts, name)
    if args.get("clip_skip") is not None and args.get("prompt_embeds") is not None:
        raise ValueError("clip_skip has no effect on prompt_embeds, which are encoded already.")
    positive, negative = args.get("prompt_embeds"), args.get("negative_prompt_embeds")
    if alike and positive is not None and negative is not None and positive.shape != negative.shape:
        raise ValueError(
            f"prompt_embeds {tuple(positive.shape)} and negative_prompt_embeds {tuple(negative.shape)} differ in shape."
        )


def check_masks(args: Mapping[str, Any]) -> None:
    """Embeddings of encoders that pad come with the mask of the tokens that count."""
    for name in ("prompt", "negative_prompt"):
        embeds, mask = args[f"{name}_embeds"], args[f"{name}_attention_mask"]
        if (embeds is None) != (mask is None):
            raise ValueError(f"{name}_embeds and {name}_attention_mask need each other.")
        if embeds is not None and (not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_attention_mask has to be a torch.Tensor of the shape {tuple(embeds.shape[:2])}.")


def check_pooled(args: Mapping[str, Any]) -> None:
    """Embeddings of two-encoder families come with their pooled form."""
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = name.replace("prompt", "pooled_prompt")
        if args.get(name) is not None and args.get(pooled) is None:
            raise ValueError(f"{name} needs {pooled} beside it.")
    said = [args.get(name) for name in (*TEXTS[3:], "negative_prompt_embeds")]
    if args.get("negative_pooled_prompt_embeds") is not None and all(value is None for value in said):
        raise ValueError("negative_pooled_prompt_embeds needs negative_prompt_embeds or negative_prompt beside it.")


def rows(value: Any, prompts: int, name: str) -> list[str]:
    """One string for each prompt."""
    texts = [value] * prompts if isinstance(value, str) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} has to be a string or a list of strings.")
    if len(texts) != prompts:
        raise ValueError(f"{name} has {len(texts)} entries for {prompts} prompts; give one, or one for each prompt.")
    return texts


def tokens(tokenizer: Any, texts: list[str], length: int | None = None) -> Tensor:
    """Token ids (B, L); a text that does not fit is cut, with a warning that shows what is lost.

    `length` is that of embeddings which these have to go with.
    """
    most = tokenizer.model_max_length
    if length is not None and length > most:
        raise ValueError(
            f"prompt_embeds has {length} tokens, but the text encoder reads {most}; pass negative_prompt_embeds too."
        )
    for text in texts:
        warn_of_cut(tokenizer.cut(text), most)
    return tokenizer(texts, length)


def long_tokens(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids (B, `length`) for an encoder that takes any length (T5's); what does not fit is cut, with a warning."""
    for text in texts:
        warn_of_cut(tokenizer.cut(text, length), length)
    return tokenizer(texts, length)


def foreign_tokens(
    tokenizer: Any, texts: list[str], length: int, padding: str = "max_length", multiple: int = 1, **options: Any
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, `length`) by a tokenizer of transformers; what does not fit is cut, with a warning.

    With the padding "longest", they are as long as the longest text, or up to the next `multiple` of tokens. Cut and
    padded here: asked to do so, such a tokenizer changes itself, which other threads would notice.
    """
    rows: list[list[int]] = tokenizer(texts, **options).input_ids
    for row in rows:
        warn_of_cut(tokenizer.decode(row[length:]).strip() if len(row) > length else "", length)
    width = length if padding == "max_length" else -(-min(length, max(map(len, rows))) // multiple) * multiple
    ids, mask = torch.full((len(rows), width), tokenizer.pad_token_id), torch.zeros(len(rows), width).long()
    for k, row in enumerate(rows):
        count = min(len(row), width)
        place = slice(width - count, None) if tokenizer.padding_side == "left" else slice(count)
        ids[k, place], mask[k, place] = torch.tensor(row[:count]), 1
    return ids, mask


def warn_of_cut(lost: str, most: int) -> None:
    """Say what of a text is lost, if anything."""
    if lost:
        warnings.warn(
            f"The prompt is longer than the {most} tokens that the text encoder reads; this part is cut: {lost!r}",
            stacklevel=3,
        )


def each(x: Tensor, times: int) -> Tensor:
    """Repeat every row: a a b b."""
    return x.repeat_interleave(times, dim=0) if times > 1 else x


def finite(x: Tensor, component: str) -> Tensor:
    """X itself; raises NotFiniteError, naming the component, where it isn't finite."""
    from autopipeline.errors import NotFiniteError

    if not torch.isfinite(x).all():
        raise NotFiniteError(f"The {component} gave NaN or infinity for the prompt.")
    return x
