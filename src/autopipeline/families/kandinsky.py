"""Kandinsky 2.1: as 2.2, with a U-Net that reads the text too, in many languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopipeline import prompts
from autopipeline.families import callbacks, unclip
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.unclip import PRIOR_CALLBACK, PRIOR_STEPS, SIZE, STEPS, Components
from autopipeline.stage import Cond, Family, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import Image2Image, source_latents
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver

LENGTH = 77
"""Tokens of a text."""

SLOTS = {
    "text_encoder": Slot(("MultilingualCLIP",)),
    "tokenizer": Slot(("XLMRobertaTokenizer",)),
} | unclip.DECODER_SLOTS


class Begun(Image2Image):
    """The picture at the level of noise that the first Kandinsky had for a strength, whatever the scheduler's are."""

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """The picture and noise; draws: the noise."""
        x = source_latents(self.stage, self.run, self.apart) * grid.init_noise_sigma
        noise = self.stage.space.noise(self.run.random, tuple(x.shape), dtype=x.dtype, device=x.device)
        signal = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)
        trained = int(self.stage.scheduler.config["num_train_timesteps"])
        share = signal[min(max(int(trained * self.run["strength"]) - 2, 0), 999)].to(x)
        return share.sqrt() * x + (1 - share).sqrt() * noise


class Seen(unclip.Repaint):
    """The network sees what is known of the picture, and that is all: nothing is put back."""

    blends = False


_TENSORS = ("latents", "image_embeds", "negative_image_embeds")
_MASKED = (*_TENSORS, "masked_image", "mask_image")
_ONE = dict(num_images_per_prompt=1)
_AGAINST = dict(negative_prompt=None)
_DRAWS = dict(generator=None, latents=None)
_LAST = dict(output_type="pil") | callbacks.PARAMS | dict(return_dict=True)
_END = PRIOR_STEPS | _DRAWS | _LAST | PRIOR_CALLBACK | sd.CALLBACK
_PICTURE, _MASK = dict(image=None), dict(image=None, mask_image=None)
_STRENGTH = dict(strength=0.3)
_START = dict(prompt=None)

TASKS = {
    "text2image": TaskRow(task=Text2Image, params=_START | _AGAINST | STEPS | _ONE | SIZE | _END, tensors=_TENSORS),
    "image2image": TaskRow(
        task=Begun, params=_START | _PICTURE | _AGAINST | STEPS | _ONE | _STRENGTH | SIZE | _END, tensors=_TENSORS
    ),
    "inpaint": TaskRow(task=Seen, params=_START | _MASK | _AGAINST | STEPS | _ONE | SIZE | _END, tensors=_MASKED),
}

_EMBEDS = dict(image_embeds=None, negative_image_embeds=None) | _AGAINST
_NOISE = _EMBEDS | SIZE | STEPS | _ONE | _DRAWS | _LAST | sd.CALLBACK
_BEGUN = (
    *(_START, _PICTURE, _EMBEDS, SIZE, dict(num_inference_steps=100), _STRENGTH, dict(guidance_scale=7.0), _ONE),
    *(dict(generator=None), _LAST, sd.CALLBACK),
)

DECODER_TASKS = {
    "text2image": TaskRow(task=Text2Image, params=_START | _NOISE, tensors=_TENSORS),
    "image2image": TaskRow(
        task=Begun, params={name: value for part in _BEGUN for name, value in part.items()}, tensors=_TENSORS
    ),
    "inpaint": TaskRow(task=Seen, params=_START | _MASK | _NOISE, tensors=_MASKED),
}


def text_rows(components: Components, run: Run) -> Cond:
    """Vectors and hidden states of the texts of all branches; a negative prompt is the prior's, where there is one."""
    alone = run.get("prior_num_inference_steps") is None
    texts = [prompts.rows(run["prompt"], run.prompts, "prompt")]
    if "negative" in unclip.guide(run).branches:
        against = (run["negative_prompt"] if alone else None) or ""
        texts.insert(0, prompts.rows(against, run.prompts, "negative_prompt"))
    encoder, tokenizer, times = components["text_encoder"], components["tokenizer"], run.batch // run.prompts
    columns: list[tuple[Tensor, Tensor]] = []
    for branch in texts:
        ids = prompts.long_tokens(tokenizer, branch, LENGTH)
        out = encoder(ids.to(encoder.device), tokenizer.mask(ids).to(encoder.device))
        columns.append((out.pooled, prompts.finite(out.last, "text_encoder")))
    pairs = zip(*columns, strict=True)
    joined = [torch.cat([prompts.each(rows, times) for rows in each]) for each in pairs]
    return dict(zip(("text_embeds", "encoder_hidden_states"), joined, strict=True))


def decoder_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the U-Net in the latents of MoVQ."""

    def condition(run: Run, x: Tensor) -> Cond:
        return text_rows(components, run) | {"image_embeds": unclip.image_rows(run)}

    return (unclip.decoder_stage(components, run, condition, {"image_embeds": "image_embeds"}),)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """Prior and decoder."""
    return unclip.chained(components, run, *decoder_stages(components, run))


def decoder_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    unclip.decoder_check(components, args)


_NONE: dict[str, Any] = {}

PRIOR = Family(
    key="kandinsky-prior",
    stem="KandinskyPrior",
    slots=unclip.PRIOR_SLOTS,
    settings=_NONE,
    tasks={"text2image": unclip.PRIOR_ROW},
    stages=unclip.prior_stages,
    finish=unclip.prior_finish,
    check=unclip.prior_check,
    size=unclip.size,
)
DECODER = Family(
    key="kandinsky-decoder",
    stem="Kandinsky",
    slots=SLOTS,
    settings=_NONE,
    tasks=DECODER_TASKS,
    stages=decoder_stages,
    finish=unclip.decoder_finish,
    check=decoder_check,
    read=unclip.decoder_read,
    size=unclip.size,
)
FAMILY = Family(
    key="kandinsky",
    stem="Kandinsky",
    slots=SLOTS | unclip.LINKED_SLOTS,
    settings=_NONE,
    tasks=TASKS,
    stages=stages,
    finish=unclip.decoder_finish,
    check=unclip.check,
    read=callbacks.read,
    size=unclip.size,
    linked="prior",
)
