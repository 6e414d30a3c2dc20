"""Flux 2 klein (Black Forest Labs 2026): smaller, led by several layers of Qwen 3, with classifier-free guidance.

Networks that were distilled to few steps know no guidance.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from autopipeline import prompts
from autopipeline.families import flux, flux2
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.stage import Cond, Finished, Run, Slot, Stage

Components = Mapping[str, Any]
LAYERS = (9, 18, 27)
ROW = replace(flux2.ROW, params=flux2.params(dict(prompt_embeds=None, negative_prompt_embeds=None), LAYERS))


def guide(run: Run) -> Guidance:
    """Away from the empty prompt, for scales above 1."""
    guided = run.guidance_scale > 1 and not run.settings["is_distilled"]
    return ClassifierFree(run.guidance_scale) if guided else Unguided()


def encode(components: Components, texts: list[str], length: int, layers: tuple[int, ...]) -> Tensor:
    """Qwen's states (B, length, J) for a chat that begins with the prompt."""
    tokenizer, told = components["tokenizer"], dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], **told) for text in texts]
    ids, mask = prompts.foreign_tokens(tokenizer, chats, length)
    return flux2.states(components["text_encoder"], ids, mask, layers)


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, J) of all branches, and how many tokens each has, if they differ."""
    branches = guide(run).branches
    _warn_of_scale(run)
    if "negative" not in branches and run["negative_prompt_embeds"] is not None:
        raise ValueError("negative_prompt_embeds has no effect without guidance: it needs a guidance_scale above 1.")
    told = dict(negative=("", run["negative_prompt_embeds"]), positive=(run["prompt"], run["prompt_embeds"]))

    def rows(branch: str) -> Tensor:
        said, hidden = told[branch]
        if hidden is not None:
            return hidden
        if components["text_encoder"] is None or components["tokenizer"] is None:
            raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass negative_prompt_embeds.")
        texts = prompts.rows(said, run.prompts, "prompt")
        return encode(components, texts, run["max_sequence_length"], run["text_encoder_out_layers"])

    return flux.joined([rows(branch) for branch in branches], run.batch // run.prompts)


def _warn_of_scale(run: Run) -> None:
    scale = run["guidance_scale"]
    if run.settings["is_distilled"] and scale > 1 and scale != ROW.params["guidance_scale"]:
        warnings.warn(f"guidance_scale={scale} has no effect: this network was distilled to go without.", stacklevel=2)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage; what leaves it are latents as the autoencoder has them, (B, C, h, w)."""
    stage = flux2.stage(components, run, lambda: text_rows(components, run), guide)
    space = flux2.space_of(components, run)

    def emit(x: Tensor, x0: Tensor) -> Tensor:
        return space.unpack(x)

    return (replace(stage, emit=emit),)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    flux2.check_text(components, args, LAYERS)
    flux2.check_pictures(components, args)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(flux2.space_of(components, run).packed.latents.decode(x))


FAMILY = replace(
    flux2.FAMILY,
    key="flux2-klein",
    stem="Flux2Klein",
    slots=flux2.SLOTS
    | {
        "text_encoder": Slot(("Qwen3ForCausalLM",), optional=True),
        "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast"), optional=True),
    },
    settings={"is_distilled": False},
    tasks={"text2image": ROW, "image2image": ROW},
    stages=stages,
    check=check,
    finish=finish,
)
