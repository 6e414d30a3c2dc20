"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a transformer on a flow, led by two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import prompts
from autopipeline.addons import control_blocks, pag
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import shift_of, strong
from autopipeline.guidance import ClassifierFree, Guidance, Perturbed, Unguided
from autopipeline.models.sd3 import SD3MultiControlNetModel
from autopipeline.spaces import LatentSpace, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Run, Slot, Stage, Task, TaskRow
from autopipeline.tasks.image2image import Image2Image
from autopipeline.tasks.inpaint import Inpaint
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid

Components = Mapping[str, Any]
LONGEST = 512
"""Tokens of text that the network was trained with at most."""

SLOTS = {
    "vae": Slot(("AutoencoderKL",)),
    "text_encoder": Slot(("CLIPTextModelWithProjection",), optional=True),
    "tokenizer": Slot(("CLIPTokenizer",), optional=True),
    "text_encoder_2": Slot(("CLIPTextModelWithProjection",), optional=True),
    "tokenizer_2": Slot(("CLIPTokenizer",), optional=True),
    "text_encoder_3": Slot(("T5EncoderModel",), optional=True),
    "tokenizer_3": Slot(("T5Tokenizer",), optional=True),
    "transformer": Slot(("SD3Transformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "image_encoder": Slot(("SiglipVisionModel",), optional=True),
    "feature_extractor": Slot(("SiglipImageProcessor",), optional=True),
}
_PROMPTS = dict(prompt=None, prompt_2=None, prompt_3=None)
_SIZE = dict(height=None, width=None)
_GUIDANCE = dict(sigmas=None, guidance_scale=7.0)
_REST = (
    dict(negative_prompt=None, negative_prompt_2=None, negative_prompt_3=None)
    | dict(num_images_per_prompt=1, generator=None, latents=None)
    | dict(prompt_embeds=None, negative_prompt_embeds=None)
    | dict(pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    | dict(output_type="pil", return_dict=True, joint_attention_kwargs=None, clip_skip=None)
    | sd.CALLBACK
    | dict(max_sequence_length=256)
)
_SKIP = dict(
    skip_guidance_layers=None,
    skip_layer_guidance_scale=2.8,
    skip_layer_guidance_stop=0.2,
    skip_layer_guidance_start=0.01,
)
_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")

TEXT2IMAGE = TaskRow(
    task=Text2Image,
    params=_PROMPTS | _SIZE | dict(num_inference_steps=28) | _GUIDANCE | _REST | _SKIP | dict(mu=None),
    tensors=("latents", "prompt_embeds", "pooled_prompt_embeds"),
)
IMAGE2IMAGE = TaskRow(
    task=Image2Image,
    params=_PROMPTS
    | _SIZE
    | dict(image=None, strength=0.6, num_inference_steps=50)
    | _GUIDANCE
    | _REST
    | dict(mu=None),
    tensors=_TENSORS,
)
INPAINT = TaskRow(
    task=Inpaint,
    params=_PROMPTS
    | dict(image=None, mask_image=None, masked_image_latents=None)
    | _SIZE
    | dict(padding_mask_crop=None, strength=0.6, num_inference_steps=50)
    | _GUIDANCE
    | _REST
    | dict(mu=None),
    tensors=_TENSORS,
)
PAG = {
    "text2image": replace(pag.row(TEXT2IMAGE, "mu", *_SKIP), tensors=_TENSORS),
    "image2image": pag.row(IMAGE2IMAGE, "mu"),
    "inpaint": pag.row(INPAINT, "mu"),
}


def _controlled(task: Task, begin: dict[str, Any], *inputs: str, trigger: str | None = None) -> TaskRow:
    """The row of a ControlNet task, from what it begins with and what the ControlNets look at."""
    return TaskRow(
        task=task,
        params=_PROMPTS
        | _SIZE
        | begin
        | _GUIDANCE
        | control_blocks.params(*inputs)
        | dict(controlnet_pooled_projections=None)
        | _REST,
        tensors=_TENSORS,
        trigger=trigger,
        needs=(*(["image"] if "image" in begin else []), *inputs),
    )


_FEWER = dict(num_inference_steps=28)
CONTROLNET = {
    "text2image": _controlled(Text2Image, _FEWER, "control_image"),
    "image2image": _controlled(Image2Image, dict(image=None, strength=0.6, num_inference_steps=50), "control_image"),
    "inpaint": _controlled(Text2Image, _FEWER, "control_image", "control_mask", trigger="control_mask"),
}
CONTROLNET_PAG = {name: pag.row(row) for name, row in CONTROLNET.items()}


def guided(run: Run) -> bool:
    """Whether there is a negative branch."""
    return run.guidance_scale > 1


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1; for a part of the steps also away from a network of fewer layers."""
    if not guided(run):
        return Unguided()
    plain = ClassifierFree(run.guidance_scale)
    if run.get("skip_guidance_layers") is None:
        return plain
    step, steps = run.now.position, run["num_inference_steps"] if run["sigmas"] is None else len(run["sigmas"])
    start, stop = run["skip_layer_guidance_start"], run["skip_layer_guidance_stop"]
    if not steps * start < step < steps * stop:
        return plain
    return Perturbed(plain, run["skip_layer_guidance_scale"], "skipping")


def encode(components: Components, texts: list[list[str]], clip_skip: int | None, length: int) -> tuple[Tensor, Tensor]:
    """CLIP's states side by side, before T5's: (B, 77 + length, D); both pooled outputs side by side (B, P)."""
    hidden: list[Tensor] = []
    pooled: list[Tensor] = []
    for name, rows in zip(("text_encoder", "text_encoder_2"), texts[:2], strict=True):
        encoder = components.get(name)
        if encoder is None:
            raise ValueError(f"This checkpoint has no {name}; pass prompt_embeds and pooled_prompt_embeds.")
        ids = prompts.tokens(components[name.replace("text_encoder", "tokenizer")], rows)
        out = encoder(ids.to(encoder.device))
        hidden.append(prompts.finite(out.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)], name))
        pooled.append(out.pooled)
    words = torch.cat([rows.to(hidden[0]) for rows in hidden], -1)
    more = _t5(components, texts[2], length).to(words.device)
    words = functional.pad(words, (0, more.shape[-1] - words.shape[-1]))
    return torch.cat([words, more], 1), torch.cat([rows.to(pooled[0]) for rows in pooled], -1)


def _t5(components: Components, texts: list[str], length: int) -> Tensor:
    """T5's states (B, length, D); zeros without T5, which much of the memory goes to."""
    encoder = components.get("text_encoder_3")
    if encoder is None:
        width = components["transformer"].config.joint_attention_dim
        return torch.zeros(len(texts), length, width, dtype=components["text_encoder"].dtype)
    ids = prompts.long_tokens(components["tokenizer_3"], texts, length)
    return prompts.finite(encoder(ids.to(encoder.device)), "text_encoder_3")


def text_rows(components: Components, run: Run) -> tuple[Tensor, Tensor]:
    """Embeddings (branches * B, T, D) and pooled embeddings (branches * B, P) of all branches."""
    branches = [_branch(components, run, "prompt", run.get("clip_skip"))]
    if guided(run):
        branches.insert(0, _branch(components, run, "negative_prompt", None))
    lengths = [rows.shape[1] for rows, _ in branches]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The negative prompt has {lengths[0]} tokens and the prompt {lengths[1]}; pass embeddings of both, or "
            "the max_sequence_length that fits."
        )
    times = run.batch // run.prompts
    columns = zip(*branches, strict=True)
    embeds, pooled = (torch.cat([prompts.each(rows.to(branches[-1][0]), times) for rows in each]) for each in columns)
    return embeds, pooled


def _branch(components: Components, run: Run, name: str, clip_skip: int | None) -> tuple[Tensor, Tensor]:
    """What the caller gives for a branch, or the encoded texts; the second and third are the first unless given."""
    embeds, pooled = run.get(f"{name}_embeds"), run.get(f"{name.replace('prompt', 'pooled_prompt')}_embeds")
    if embeds is not None:
        return embeds, pooled
    first = run.get(name) or ""
    texts = [prompts.rows(run.get(f"{name}{end}") or first, run.prompts, f"{name}{end}") for end in ("", "_2", "_3")]
    embeds, own = encode(components, texts, clip_skip, run["max_sequence_length"])
    return embeds, own if pooled is None else pooled


def _schedule(components: Components, run: Run) -> Grid:
    """The scheduler's own grid, shifted by `mu`, or as the size of the picture asks for."""
    network, scheduler = components["transformer"], components["scheduler"]
    own, mu = run.get("sigmas"), run.get("mu")
    steps = run["num_inference_steps"] if own is None else len(own)
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    if mu is not None and not dynamic:
        raise ValueError(f"mu={mu} has no effect with this scheduler, whose use_dynamic_shifting is off.")
    square = factor(components["vae"]) * network.config.patch_size
    tokens = run["height"] // square * (run["width"] // square)
    shift = {"mu": shift_of(scheduler, tokens) if mu is None else mu} if dynamic else {}
    grid = scheduler.grid(steps if own is None else None, sigmas=own, device=network.device, **shift)
    return strong(grid, scheduler, run.get("strength"), steps)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in the latents of the autoencoder."""
    network, encoder = components["transformer"], components.get("text_encoder")
    embeds = run.get("prompt_embeds")
    dtype = embeds.dtype if embeds is not None else network.dtype if encoder is None else encoder.dtype

    def condition(run: Run, x: Tensor) -> Cond:
        embeds, pooled = text_rows(components, run)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        if "skipping" not in branches:
            return {}
        marks = torch.zeros(len(branches), network.config.num_layers, dtype=torch.bool)
        marks[branches.index("skipping"), list(run["skip_guidance_layers"])] = True
        return {"skipped": marks.repeat_interleave(run.batch, 0).to(network.device)}

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        typed = {name: _typed(network, rows) for name, rows in cond.items() if name != "concat"}
        inputs = [x, cond["concat"]] if "concat" in cond else [x]
        return Pred(network(torch.cat(inputs, 1).to(network.dtype), t, **typed).to(x.dtype))

    return (
        Stage(
            name="transformer",
            network=network,
            space=_space(components, run),
            scheduler=components["scheduler"],
            dtype=dtype,
            schedule=lambda run: _schedule(components, run),
            condition=condition,
            guide=guide,
            predict=predict,
            public={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
            vary=vary,
        ),
    )


def _typed(network: Any, rows: Any) -> Any:
    """Where and as precise as the network; marks stay marks, residuals come as lists."""
    if not isinstance(rows, Tensor):
        return [_typed(network, each) for each in rows]
    return rows.to(network.device, network.dtype if rows.is_floating_point() else None)


def _space(components: Components, run: Run) -> LatentSpace:
    return LatentSpace(components["vae"], patch=components["transformer"].config.patch_size)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode; as in the reference implementation, inpainting leaves out the autoencoder's shift."""
    return Finished(_space(components, run)._replace(shifted=run.get("mask_image") is None).decode(x))


def default_size(components: Components) -> tuple[int, int]:
    """Height and width in pixels that the network was made for."""
    side = components["transformer"].config.sample_size * factor(components["vae"])
    return side, side


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """`masked_image_latents` are given as the autoencoder makes them, neither shifted nor scaled."""
    given, config = args.get("masked_image_latents"), components["vae"].config
    if not isinstance(given, Tensor) or given.shape[-3] != config.latent_channels:
        return args
    return args | {"masked_image_latents": (given - (config.shift_factor or 0.0)) * config.scaling_factor}


def check(components: Components, args: Mapping[str, Any]) -> None:
    """What Stable Diffusion refuses, sizes that are no whole patches, and layers to skip that nothing would skip."""
    sd.check(components, args)
    prompts.check_pooled(args)
    square = factor(components["vae"]) * components["transformer"].config.patch_size
    for side in ("height", "width"):
        if args[side] % square:
            raise ValueError(f"{side}={args[side]} is not a positive multiple of {square} pixels.")
    if args["max_sequence_length"] > LONGEST:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} is more than {LONGEST}.")
    _check_skipped(args, components["transformer"].config.num_layers)


def _check_skipped(args: Mapping[str, Any], count: int) -> None:
    layers = args.get("skip_guidance_layers")
    if layers is None:
        ignored = [name for name, default in _SKIP.items() if args.get(name, default) != default]
        if ignored:
            raise ValueError(f"{ignored[0]} has no effect without skip_guidance_layers.")
        return
    if args["guidance_scale"] <= 1:
        raise ValueError("skip_guidance_layers has no effect without guidance (guidance_scale above 1).")
    if not all(isinstance(layer, int) and 0 <= layer < count for layer in layers):
        raise ValueError(f"skip_guidance_layers={list(layers)} has to be numbers of layers, from 0 to {count - 1}.")


FAMILY = Family(
    key="stable-diffusion-3",
    stem="StableDiffusion3",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    size=default_size,
    read=read,
    variants={
        frozenset({"ControlNet"}): CONTROLNET,
        frozenset({"PAG"}): PAG,
        frozenset({"ControlNet", "PAG"}): CONTROLNET_PAG,
    },
    addons={
        "ControlNet": partial(control_blocks.attach, several=SD3MultiControlNetModel),
        "PAG": partial(pag.attach, layers="blocks.1"),
    },
)
