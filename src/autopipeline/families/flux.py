"""Flux (Black Forest Labs 2024): a transformer on packed latents, led by T5's states and CLIP's pooled text.

"dev" networks take the guidance scale as an input; "schnell" ones know none. With a negative prompt and
`true_cfg_scale` above 1, both are guided in the ordinary way besides.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.addons import control, controlnet_streams
from autopipeline.families.flux_tasks import CONTROL, CONTROLNET, IMAGE2IMAGE, INPAINT, TEXT2IMAGE
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.models.network import Network
from autopipeline.models.rotary import grid_places
from autopipeline.spaces import LatentSpace, Packed, factor
from autopipeline.stage import Cond, Family, Finished, Pred, Predict, Run, Slot, Stage

Components = Mapping[str, Any]
LONGEST = 512
"""Tokens of text that the networks were trained with at most."""

SLOTS = {
    "vae": Slot(("AutoencoderKL", "AutoencoderTiny")),
    "text_encoder": Slot(("CLIPTextModel",), optional=True),
    "tokenizer": Slot(("CLIPTokenizer",), optional=True),
    "text_encoder_2": Slot(("T5EncoderModel",), optional=True),
    "tokenizer_2": Slot(("T5Tokenizer", "T5TokenizerFast"), optional=True),
    "transformer": Slot(("FluxTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "image_encoder": Slot(("CLIPVisionModelWithProjection",), optional=True),
    "feature_extractor": Slot(("CLIPImageProcessor",), optional=True),
}


def guided(run: Run) -> bool:
    """Whether there is a negative branch."""
    said = run.get("negative_prompt") is not None or run.get("negative_prompt_embeds") is not None
    return said and run.get("true_cfg_scale", 1.0) > 1


def guide(run: Run) -> Guidance:
    """Classifier-free guidance where there is a negative prompt; the embedded scale needs no branch."""
    return ClassifierFree(run["true_cfg_scale"]) if guided(run) else Unguided()


def encode(components: Components, texts: tuple[list[str], list[str]], length: int) -> tuple[Tensor, Tensor]:
    """T5's hidden states (B, length, J) of the second texts, CLIP's pooled output (B, P) of the first."""
    for name in ("text_encoder", "text_encoder_2"):
        if components.get(name) is None:
            raise ValueError(f"This checkpoint has no {name}; pass prompt_embeds and pooled_prompt_embeds.")
    clip, t5 = components["text_encoder"], components["text_encoder_2"]
    pooled = clip(prompts.tokens(components["tokenizer"], texts[0]).to(clip.device)).pooled
    hidden = t5(prompts.long_tokens(components["tokenizer_2"], texts[1], length).to(t5.device))
    return prompts.finite(hidden, "text_encoder_2"), prompts.finite(pooled, "text_encoder")


def text_rows(components: Components, run: Run) -> Cond:
    """Embeddings (branches * B, T, J) and pooled embeddings (branches * B, P) of all branches."""
    branches = [_texts(components, run, "")]
    if guided(run):
        branches.insert(0, _texts(components, run, "negative_"))
    hidden, pooled = zip(*branches, strict=True)
    times = run.batch // run.prompts
    return joined(hidden, times) | {"pooled_projections": torch.cat([prompts.each(rows, times) for rows in pooled])}


def joined(branches: Sequence[Tensor], times: int, name: str = "encoder_hidden_states") -> Cond:
    """Texts (P, T, ...) of all branches, each repeated; shorter ones begin with zeros, and `tokens` (R,) says so."""
    longest = max(hidden.shape[1] for hidden in branches)
    rows = [functional.pad(each, (*(0, 0) * (each.ndim - 2), longest - each.shape[1], 0)) for each in branches]
    cond = {name: torch.cat([prompts.each(each.to(rows[-1]), times) for each in rows])}
    if len({each.shape[1] for each in branches}) > 1:
        cond["tokens"] = torch.cat([torch.full((times * len(each),), each.shape[1]) for each in branches])
    return cond


def _texts(components: Components, run: Run, sign: str) -> tuple[Tensor, Tensor]:
    hidden, pooled = run.get(f"{sign}prompt_embeds"), run.get(f"{sign}pooled_prompt_embeds")
    if hidden is not None:
        return hidden, pooled
    first = prompts.rows(run[f"{sign}prompt"], run.prompts, f"{sign}prompt")
    second = run.get(f"{sign}prompt_2")
    other = prompts.rows(second, run.prompts, f"{sign}prompt_2") if second else first
    return encode(components, (first, other), run["max_sequence_length"])


def places(tokens: int, *grids: Tensor) -> Tensor:
    """Places (tokens + L, 3): text stands nowhere, then come the grids of pictures."""
    return torch.cat([torch.zeros(tokens, 3, dtype=torch.long), *grids])


TEXTUAL = ("encoder_hidden_states", "rotary", "attention_mask")
"""Conditioning whose second dimension begins with the tokens of text."""


def by_length(predict: Predict) -> Predict:
    """The prediction, in one pass for each length of text that there is."""

    def grouped(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        if "tokens" not in cond:
            return predict(x, t, cond)
        mean, longest = torch.empty_like(x), cond["encoder_hidden_states"].shape[1]
        for count in cond["tokens"].unique().tolist():
            rows = cond["tokens"] == count
            part = {name: each[rows.to(each.device)] for name, each in cond.items() if name != "tokens"}
            part |= {name: part[name][:, longest - count :] for name in TEXTUAL if name in part}
            mean[rows.to(x.device)] = predict(x[rows.to(x.device)], t[rows.to(t.device)], part).mean
        return Pred(mean)

    return grouped


def transformer_predict(network: Network) -> Predict:
    """The transformer as a prediction; what it is told keeps its own precision where it is a table of angles."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        exact = ("rotary", "residuals")
        typed = {name: rows.to(network.device, network.dtype) for name, rows in cond.items() if name not in exact}
        rest = {name: cond[name] for name in exact if name in cond}
        time = t.to(x.dtype) / 1000
        return Pred(network(x.to(network.dtype), time, **typed, **rest).to(x.dtype))

    return by_length(predict)


def packed(components: Components, run: Run) -> Packed:
    """The space of a run's latents, whose height and width are even."""
    step = 2 * factor(components["vae"])
    return Packed(LatentSpace(components["vae"], patch=2), 2 * (run["height"] // step), 2 * (run["width"] // step))


def dtype_of(components: Components) -> torch.dtype:
    """The precision of the latents: that of T5, or of the transformer without it."""
    encoder = components.get("text_encoder_2")
    return (components["transformer"] if encoder is None else encoder).dtype


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    return (stage(components, packed(components, run)),)


def stage(components: Components, space: Packed, *further: Tensor) -> Stage:
    """The transformer in packed latents; `further` tokens beside those of x have places (L, 3)."""
    network, scheduler = components["transformer"], components["scheduler"]
    own = grid_places(space.height // 2, space.width // 2)

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text_rows(components, run).items()}
        count, tokens = cond["encoder_hidden_states"].shape[:2]
        table = network.rotary(places(tokens, own, *further)).to(network.device)
        cond["rotary"] = table.expand(count, -1, -1, -1)
        if network.config.guidance_embeds:
            cond["guidance"] = torch.full((count,), float(run.guidance_scale), device=network.device)
        return cond

    return Stage(
        name="transformer",
        network=network,
        space=space,
        scheduler=scheduler,
        dtype=dtype_of(components),
        schedule=lambda run: flow_schedule(scheduler, run, network.device, len(own)),
        condition=condition,
        guide=guide,
        predict=transformer_predict(network),
        public={"encoder_hidden_states": "prompt_embeds"},
        prompt_alone=True,
    )


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    check_call(components, args)
    check_size(components, args)


def check_call(components: Components, args: Mapping[str, Any]) -> None:
    """All but the size."""
    prompts.check(args)
    prompts.check_pooled(args)
    _check_negative(args)
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])
    check_network(components, args)


def check_network(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse texts that are too long for the transformer, and a transformer that takes other latents."""
    if args["max_sequence_length"] > LONGEST:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} has to be {LONGEST} at most.")
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.latent_channels
    beside = "control_image" in args and components.get("controlnet") is None
    made = 4 * latent * (2 if beside else 1)
    if channels != made:
        what = "another picture" if beside else "nothing"
        raise ValueError(f"The transformer takes {channels} channels, but latents with {what} beside them have {made}.")


def _check_negative(args: Mapping[str, Any]) -> None:
    names = [f"negative_{name}" for name in ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")]
    given = [name for name in names if args.get(name) is not None]
    scale = args.get("true_cfg_scale", 1.0)
    if given and scale <= 1:
        raise ValueError(f"{given[0]} has no effect with true_cfg_scale={scale}; use a scale above 1.")
    if scale > 1 and not {"negative_prompt", "negative_prompt_embeds"} & set(given):
        raise ValueError(f"true_cfg_scale={scale} has no effect without negative_prompt.")


def check_size(components: Components, args: Mapping[str, Any]) -> None:
    """Sizes that are no multiples of a patch are rounded down, and somebody should know."""
    step = 2 * factor(components["vae"])
    for side in ("height", "width"):
        if args[side] < step:
            raise ValueError(f"{side}={args[side]} has to be {step} pixels at least.")
        if args[side] % step:
            near = args[side] // step * step
            warnings.warn(f"{side}={args[side]} is no multiple of {step} pixels; {near} are made.", stacklevel=2)


def size(components: Components) -> tuple[int, int]:
    """128 latents a side, whatever the autoencoder."""
    side = 128 * factor(components["vae"])
    return side, side


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(packed(components, run).decode(x))


def with_control(family: Family) -> Family:
    """The family with a control picture; its classes have no place for an image encoder."""
    slots = {name: slot for name, slot in family.slots.items() if name not in ("image_encoder", "feature_extractor")}
    return control.attach(replace(family, slots=slots))


FAMILY = Family(
    key="flux",
    stem="Flux",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=finish,
    check=check,
    size=size,
    variants={frozenset({"Control"}): CONTROL, frozenset({"ControlNet"}): CONTROLNET},
    addons={"Control": with_control, "ControlNet": controlnet_streams.attach},
)
