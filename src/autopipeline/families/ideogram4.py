"""Ideogram 4 (Ideogram AI 2026): a transformer on normalised patches, led by many layers of Qwen 3 VL.

What it is guided away from is the prediction of a second transformer, which sees no text at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.families import flux
from autopipeline.families.schedules import require_flow, strong
from autopipeline.guidance import ClassifierFree, Guidance
from autopipeline.models.rotary import grid_places
from autopipeline.spaces import Patches, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
LAYERS = (*range(0, 36, 3), 35)
"""Layers of the text encoder, from 0, after which its states are taken."""
FAR = 65536
"""Where pictures begin on all axes, so that no word stands among them."""

SLOTS = {
    "vae": Slot(("AutoencoderKLFlux2",)),
    "text_encoder": Slot(("Qwen3VLModel",)),
    "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast")),
    "transformer": Slot(("Ideogram4Transformer2DModel",)),
    "unconditional_transformer": Slot(("Ideogram4Transformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "prompt_enhancer_head": Slot(("Ideogram4PromptEnhancerHead",), optional=True),
}


def params(begin: Mapping[str, Any], side: int | None) -> dict[str, Any]:
    """Parameters of a task, from those of its inputs and the default of height and width."""
    return (
        dict(prompt=None)
        | dict(begin)
        | dict(height=side, width=side, num_inference_steps=48)
        | dict(guidance_scale=None, guidance_schedule=(7.0,) * 45 + (3.0,) * 3, mu=0.0, std=1.5)
        | dict(prompt_upsampling=False, prompt_upsampling_temperature=1.0, max_sequence_length=2048)
        | dict(num_images_per_prompt=1, generator=None, latents=None, output_type="pil", return_dict=True)
        | dict(attention_kwargs=None, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))
    )


TEXT2IMAGE = TaskRow(task=Text2Image, params=params({}, 2048))
IMAGE2IMAGE = replace(TEXT2IMAGE, task=SharedImage2Image, params=params(dict(image=None, strength=0.6), None))
INPAINT = replace(
    TEXT2IMAGE,
    task=Blend,
    params=params(dict(image=None, mask_image=None, strength=0.6, padding_mask_crop=None), None),
)

# --- texts -------------------------------------------------------------------------------------------------


def chats(components: Components, args: Mapping[str, Any], count: int) -> list[list[int]]:
    """Token ids of a chat that begins with the prompt, for each of them; ValueError for one that is too long."""
    tokenizer, most = components["tokenizer"], args["max_sequence_length"]
    said = [[{"type": "text", "text": text}] for text in prompts.rows(args["prompt"], count, "prompt")]
    told = dict(add_generation_prompt=True, tokenize=False)
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": each}], **told) for each in said]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    longest = max(len(row) for row in ids)
    if longest > most:
        raise ValueError(f"A prompt has {longest} tokens, but max_sequence_length={most} lets through so many only.")
    return ids


def encode(encoder: Any, ids: list[int]) -> Tensor:
    """States (1, T, layers * width) of a text after LAYERS, those of a channel side by side.

    The layers are called one by one: the model itself gives the last one's states in another form, normalised.
    """
    model = encoder.language_model
    x = model.embed_tokens(torch.tensor([ids], device=encoder.device))
    count = torch.arange(len(ids), device=x.device)
    table = model.rotary_emb(x, count.expand(3, 1, -1))
    mask = torch.full((len(ids), len(ids)), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    taken: list[Tensor] = []
    for k, layer in enumerate(model.layers[: LAYERS[-1] + 1]):
        x = layer(x, attention_mask=mask[None, None], position_ids=count[None], position_embeddings=table)
        taken += [x] if k in LAYERS else []
    return prompts.finite(torch.stack(taken, -1).flatten(2).float(), "text_encoder")


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (2 B, T, J), first those of no text at all, and how many tokens each row has; zeros come before."""
    hidden = [encode(components["text_encoder"], ids) for ids in chats(components, run.args, run.prompts)]
    counts = torch.tensor([each.shape[1] for each in hidden])
    rows = torch.cat([functional.pad(each, (0, 0, int(counts.max()) - each.shape[1], 0)) for each in hidden])
    rows, counts = (prompts.each(each, run.batch // run.prompts) for each in (rows, counts))
    rows = rows.to(components["transformer"].dtype)
    nothing = torch.zeros_like(rows), torch.zeros_like(counts)
    return {"encoder_hidden_states": torch.cat([nothing[0], rows]), "tokens": torch.cat([nothing[1], counts])}


# --- the stage ---------------------------------------------------------------------------------------------


def guide(run: Run) -> Guidance:
    """Both networks at every step, with the scale of the call or that of the step."""
    scales = run["guidance_schedule"]
    scale = run.guidance_scale if scales is None else float(scales[len(scales) - run.now.total + run.now.position])
    return ClassifierFree(scale)


def sigmas(steps: int, mean: float, std: float) -> list[float]:
    """Shares of noise, whose logits fall as a normal distribution has them (Esser et al. 2024, section 3.1)."""
    share = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    noise = torch.special.expit(mean + std * torch.special.ndtri(share))
    least, most = 1 / (1 + math.exp(7.5)), 1 - 1 / (1 + math.exp(9.0))
    return noise.clamp(least, most).flip(0)[:-1].float().tolist()


def places(counts: Tensor, tokens: int, own: Tensor) -> Tensor:
    """Places (R, tokens + L, 3): each text (R,) counts its words on all axes, after what stands before it."""
    words = (torch.arange(tokens) - (tokens - counts[:, None])).clamp(min=0)[..., None].expand(-1, -1, 3)
    return torch.cat([words, (own + FAR).expand(len(counts), -1, -1)], 1)


def predict_of(components: Components) -> Predict:
    """The prediction: rows with a text by one network, those without by the other."""
    trained = components["scheduler"].config.num_train_timesteps

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        text = cond["encoder_hidden_states"]
        network = components["transformer" if text.shape[1] else "unconditional_transformer"]
        time = (1 - t.float() / trained).to(network.dtype)
        said = network(x.to(network.dtype), time, text.to(network.dtype), cond["rotary"], cond.get("perturbed"))
        return Pred(-said.to(x.dtype))

    return flux.by_length(predict)


def space_of(components: Components, run: Run) -> Patches:
    """The space of a run's latents."""
    return Patches(flux.packed(components, run), channels_first=False)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage of two networks, in patches."""
    network, scheduler, space = components["transformer"], components["scheduler"], space_of(components, run)
    own = grid_places(space.packed.height // 2, space.packed.width // 2)

    def schedule(run: Run) -> Any:
        require_flow(scheduler)
        steps, area = run["num_inference_steps"], run["height"] * run["width"]
        made = sigmas(steps, run["mu"] + 0.5 * math.log(area / 512**2), run["std"])
        return strong(scheduler.grid(None, sigmas=made, device=network.device), scheduler, run.get("strength"), steps)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text_rows(components, run).items()}
        tokens = cond["encoder_hidden_states"].shape[1]
        return cond | {"rotary": network.rotary(places(cond["tokens"].cpu(), tokens, own)).to(network.device)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=torch.float32,
            schedule=schedule,
            condition=condition,
            guide=guide,
            predict=predict_of(components),
            beside=(components["unconditional_transformer"],),
        ),
    )


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """A size that is not said is that of the first picture."""
    size = images.sizes(args["image"])[0] if args.get("image") is not None else None
    if size is None or args.get("padding_mask_crop") is not None:
        return args
    step = 2 * factor(components["vae"])
    width, height = (max(side // step, 1) * step for side in size)
    return args | dict(height=args["height"] or height, width=args["width"] or width)


def size(components: Components) -> tuple[int, int]:
    """2048 pixels a side."""
    return 2048, 2048


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    prompts.check(args)
    _check_guidance(args)
    if args["prompt_upsampling"]:
        raise ValueError("prompt_upsampling is not supported: no prompt is rewritten here.")
    if args["prompt_upsampling_temperature"] != 1.0:
        raise ValueError("prompt_upsampling_temperature has no effect without prompt_upsampling.")
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])
    step = 2 * factor(components["vae"])
    for side in ("height", "width"):
        if args[side] % step:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {step} pixels.")
    layers = len(components["text_encoder"].language_model.layers)
    if layers <= LAYERS[-1]:
        raise ValueError(f"The text_encoder has {layers} layers, but {LAYERS[-1] + 1} are needed.")
    chats(components, args, prompts.count(args))


def _check_guidance(args: Mapping[str, Any]) -> None:
    scale, scales, steps = args["guidance_scale"], args["guidance_schedule"], args["num_inference_steps"]
    if (scale is None) == (scales is None):
        raise ValueError("Pass either guidance_scale (with guidance_schedule=None) or guidance_schedule.")
    if scales is not None and len(scales) != steps:
        raise ValueError(f"guidance_schedule has {len(scales)} entries for {steps} steps.")


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(space_of(components, run).decode(x))


FAMILY = Family(
    key="ideogram4",
    stem="Ideogram4",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    size=size,
    read=read,
)
