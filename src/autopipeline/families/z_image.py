"""Z-Image (Tongyi 2025): a transformer on a flow, led by the last states but one of Qwen 3 in a chat.

Its time runs from 0 for noise to 1 for pictures, and it points from the one to the other. Distilled ("turbo") networks
are called with a guidance scale of 0; guidance here is the distance to go beyond the prompt, so that 0 means none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from autopipeline import images, prompts
from autopipeline.addons import controlnet_hints
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import Guidance, Unguided
from autopipeline.models.z_image import filled
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Random, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopipeline.schedulers import Grid, Solver

Components = Mapping[str, Any]

SLOTS = {
    "vae": Slot(("AutoencoderKL",)),
    "text_encoder": Slot(("Qwen3Model", "Qwen3ForCausalLM"), optional=True),
    "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast"), optional=True),
    "scheduler": Slot(("Scheduler",)),
    "transformer": Slot(("ZImageTransformer2DModel",)),
}
TENSORS = ("latents", "prompt_embeds")
_MASKED = dict(image=None, mask_image=None)


class BlendWithNoise(Blend):
    """With `latents`, the noise that the known part is mixed with is drawn nevertheless, first of all."""

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """Noise, or the picture and noise, at the first level of the grid."""
        if self.run.get("latents") is None:
            return super().begin(solver, grid)
        space, run = self.stage.space, self.run
        shape = space.shape(run, run["height"], run["width"])
        noise = space.noise(run.random, shape, dtype=self.stage.dtype, device=self.stage.device)
        x = super().begin(solver, grid)
        self.noise = noise
        return x


def params(begin: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of a task, from those of its inputs and those that stand after the guidance scale."""
    return (
        dict(prompt=None)
        | dict(begin)
        | dict(height=None, width=None, num_inference_steps=50, sigmas=None, guidance_scale=5.0)
        | dict(beside or {})
        | dict(cfg_normalization=False, cfg_truncation=1.0, negative_prompt=None, num_images_per_prompt=1)
        | dict(generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None)
        | dict(output_type="pil", return_dict=True, joint_attention_kwargs=None, callback_on_step_end=None)
        | dict(callback_on_step_end_tensor_inputs=("latents",), max_sequence_length=512)
    )


TEXT2IMAGE = TaskRow(task=Text2Image, params=params({}), tensors=TENSORS)
IMAGE2IMAGE = TaskRow(task=SharedImage2Image, params=params(dict(image=None, strength=0.6)), tensors=TENSORS)
INPAINT = TaskRow(
    task=BlendWithNoise,
    params=params(_MASKED | dict(masked_image_latents=None, strength=1.0)),
    tensors=(*TENSORS, "mask", "masked_image_latents"),
)
CONTROL = TaskRow(
    task=Text2Image, params=params({}, controlnet_hints.PARAMS), tensors=TENSORS, needs=(controlnet_hints.NAME,)
)
CONTROL_INPAINT = TaskRow(
    task=Text2Image,
    params=params({}, _MASKED | controlnet_hints.PARAMS),
    tensors=TENSORS,
    needs=(*_MASKED, controlnet_hints.NAME),
)


class Beyond(NamedTuple):
    """Past the prompt, away from the negative prompt; the norm stays within `most` times the prompt's, unless 0."""

    scale: float
    most: float
    branches: tuple[str, ...] = ("negative", "positive")

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The guided prediction."""
        negative, positive = preds[0].mean, preds[1].mean
        guided = positive + self.scale * (positive - negative)
        guided = guided if push is None else guided + push
        if self.most > 0:
            norm, own = (_norm(x) for x in (guided, positive))
            guided = torch.where(norm > self.most * own, guided * (self.most * own / norm), guided)
        return Pred(guided)


def _norm(x: Tensor) -> Tensor:
    """Of each picture, (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def guide(run: Run) -> Guidance:
    """Guidance for scales above 0, up to the time `cfg_truncation`."""
    if run.guidance_scale <= 0 or _truncated(run):
        return Unguided()
    return Beyond(run.guidance_scale, float(run["cfg_normalization"] or 0))


def _truncated(run: Run) -> bool:
    """Whether the guidance has ended; before the first step, which has no time yet, it has not."""
    end, t = run["cfg_truncation"], run.now.t
    return end is not None and end < 1 and bool(t > 0) and float((1000 - t) / 1000) > end


def encode(components: Components, texts: list[str], length: int) -> list[Tensor]:
    """States (tokens, E) of each text in a chat, which is cut at `length` tokens."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for text in texts
    ]
    return states(encoder, tokenizer, chats, length)


def states(encoder: Any, tokenizer: Any, chats: list[str], length: int) -> list[Tensor]:
    """States (tokens, E) of each text as it is, which is cut at `length` tokens."""
    ids, mask = prompts.foreign_tokens(tokenizer, chats, length)
    some = mask.any(0)  # the others are padding for all
    ids, mask = ids[:, some].to(encoder.device), mask[:, some].to(encoder.device)
    body = getattr(encoder, "model", encoder)  # without the head that predicts words
    hidden = body(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    return [prompts.finite(rows[real], "text_encoder") for rows, real in zip(hidden, mask.bool(), strict=True)]


def _texts(components: Components, run: Run, name: str) -> list[Tensor]:
    """What the caller gives for a branch, or the encoded texts."""
    given, mask = run[f"{name}_embeds"], run[f"{name}_attention_mask"]
    if given is None:
        return encode(components, prompts.rows(run[name] or "", run.prompts, name), run["max_sequence_length"])
    return list(given) if mask is None else [rows[real] for rows, real in zip(given, mask, strict=True)]


def text_rows(components: Components, run: Run) -> Cond:
    """Texts (branches * B, T, E) of all branches, zeros after the `tokens` of each."""
    texts = _texts(components, run, "prompt")
    if run.guidance_scale > 0:
        texts = _texts(components, run, "negative_prompt") + texts
    kind, times = texts[-1], run.batch // run.prompts
    rows = pad_sequence([each.to(kind) for each in texts], batch_first=True)
    rows = functional.pad(rows, (0, 0, 0, filled(rows.shape[1]) - rows.shape[1]))
    counts = torch.tensor([len(each) for each in texts])  # stay here: lengths decide what is computed
    return {"encoder_hidden_states": prompts.each(rows, times), "tokens": prompts.each(counts, times)}


class Rounded(LatentSpace):
    """Tasks that begin with a picture draw their noise in the precision of its latents."""

    def noise(self, random: Random, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Drawn as the autoencoder computes."""
        return random.normal(shape, dtype=self.vae.dtype, device=device).to(dtype)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, scheduler = components["transformer"], components["scheduler"]
    space = (LatentSpace if run.get("strength") is None else Rounded)(components["vae"], patch=2)
    count = run["height"] // space.multiple * (run["width"] // space.multiple)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = text_rows(components, run)
        length = cond["encoder_hidden_states"].shape[1]
        return cond | {"rotary": network.rotary(cond["tokens"], length, *x.shape[-2:]).to(network.device)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=torch.float32,
            schedule=lambda run: flow_schedule(scheduler, run, network.device, count),
            condition=condition,
            guide=guide,
            predict=_predict(network),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def _predict(network: Any) -> Predict:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        text = cond["encoder_hidden_states"].to(network.device, network.dtype)
        rest = {name: rows for name, rows in cond.items() if name != "encoder_hidden_states"}
        made = network(x.to(network.dtype), (1000 - t) / 1000, encoder_hidden_states=text, **rest)
        return Pred(-made.to(x.dtype))

    return predict


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(LatentSpace(components["vae"]).decode(x))


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Lists of embeddings as one tensor with a mask; without a size, the one of the picture to begin with."""
    read = dict(args)
    for name in ("prompt", "negative_prompt"):
        read |= _joined(args[f"{name}_embeds"], name)
    if "strength" not in args:
        return read
    vae = components["vae"]
    step, latent = 2 * factor(vae), vae.config.latent_channels
    given: list[Any] = list(args["image"]) if isinstance(args["image"], list | tuple) else [args["image"]]
    times = [factor(vae) if isinstance(x, Tensor) and x.ndim > 2 and x.shape[-3] == latent else 1 for x in given]
    sizes = [size or (step, step) for size in images.sizes(given)]  # what is no picture is refused later on
    for k, side in enumerate(("width", "height")):
        made = [max(size[k] * time // step, 1) * step for size, time in zip(sizes, times, strict=True)]
        if args[side] is None:
            read[side] = made if len(set(sizes)) > 1 else made[0]
    return read


def _joined(embeds: Any, name: str) -> dict[str, Any]:
    """Embeddings of any lengths as rows (P, T, E) and a mask (P, T); a tensor has neither fillings nor a mask."""
    if not isinstance(embeds, list | tuple):
        return {f"{name}_embeds": embeds, f"{name}_attention_mask": None}
    fit = [isinstance(each, Tensor) and each.ndim == 2 and len(each) > 0 for each in embeds]
    if not fit or not all(fit) or len({each.shape[1] for each in embeds}) > 1:
        raise ValueError(f"{name}_embeds has to be a tensor for each prompt, (tokens, width), or all as one.")
    mask = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in embeds], batch_first=True)
    return {f"{name}_embeds": pad_sequence(list(embeds), batch_first=True), f"{name}_attention_mask": mask}


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    prompts.check(args, alike=False)
    network, latent = components["transformer"].config, components["vae"].config.latent_channels
    if network.in_channels != latent:
        raise ValueError(f"The transformer takes {network.in_channels} channels, but the latents have {latent}.")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if args[name] is not None and args[name].shape[-1] != network.cap_feat_dim:
            raise ValueError(f"{name} has {args[name].shape[-1]} channels, not {network.cap_feat_dim}.")
    step = 2 * factor(components["vae"])
    for side in ("height", "width"):
        if args[side] % step:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {step} pixels.")
    for name in ("cfg_normalization", "cfg_truncation"):
        if not isinstance(args[name], int | float | None):
            raise TypeError(f"{name}={args[name]!r} has to be a number.")
    if args["cfg_normalization"] and args["guidance_scale"] <= 0:
        raise ValueError("cfg_normalization has no effect without guidance (guidance_scale above 0).")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="z-image",
    stem="ZImage",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    read=read,
    size=lambda components: (1024, 1024),
    variants={
        frozenset({"ControlNet"}): {"text2image": CONTROL},
        # one that was taught to inpaint, and so looks at a picture and its mask as well
        frozenset({"ControlNet", "Inpaint"}): {"text2image": CONTROL_INPAINT},
    },
    addons={"ControlNet": controlnet_hints.attach},
)
