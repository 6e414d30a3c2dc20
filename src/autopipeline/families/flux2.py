"""Flux 2 (Black Forest Labs 2025): a transformer on normalised patches, led by several layers of Mistral Small 3.

Pictures that are given stand beside the new one as tokens of their own, each at its own time: 10, 20, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.families import flux
from autopipeline.families.flux_kontext import beside
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import Guidance, Unguided
from autopipeline.models.rotary import grid_places
from autopipeline.spaces import Patches, factor
from autopipeline.stage import Cond, Family, Finished, Run, Slot, Stage, TaskRow
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""What the language model is told before the prompt; the network was trained with these very words."""
LARGEST = 1024**2
"""Pixels of a picture that is given, at most."""
SMALLEST, LONGEST = 64, 8
"""Pixels of its shorter side, at least, and how often that goes into the longer one, at most."""

SLOTS = {
    "vae": Slot(("AutoencoderKLFlux2",)),
    "text_encoder": Slot(("Mistral3ForConditionalGeneration",), optional=True),
    "tokenizer": Slot(("PixtralProcessor", "PreTrainedTokenizerFast", "TokenizersBackend"), optional=True),
    "transformer": Slot(("Flux2Transformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
LAYERS = (10, 20, 30)


def params(embeds: Mapping[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """Parameters of all tasks, with these embeddings, and states of the text encoder after so many layers."""
    return (
        dict(image=None, prompt=None, height=None, width=None, num_inference_steps=50, sigmas=None, guidance_scale=4.0)
        | dict(num_images_per_prompt=1, generator=None, latents=None)
        | dict(embeds)
        | dict(output_type="pil", return_dict=True, attention_kwargs=None, callback_on_step_end=None)
        | dict(callback_on_step_end_tensor_inputs=("latents",), max_sequence_length=512)
        | dict(text_encoder_out_layers=layers)
    )


ROW = TaskRow(
    task=Text2Image,
    params=params(dict(prompt_embeds=None), LAYERS) | dict(caption_upsample_temperature=None),
    tensors=("latents", "prompt_embeds"),
    whole=("image",),
)

# --- texts -------------------------------------------------------------------------------------------------


def states(encoder: Any, ids: Tensor, mask: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Hidden states after so many layers each, side by side: (B, T, layers * width), whatever pads them included."""
    told = dict(input_ids=ids.to(encoder.device), attention_mask=mask.to(encoder.device), use_cache=False)
    hidden = encoder.base_model(**told, output_hidden_states=True).hidden_states
    return prompts.finite(torch.cat([hidden[k] for k in layers], -1), "text_encoder")


def encode(components: Components, texts: list[str], length: int, layers: tuple[int, ...]) -> Tensor:
    """Mistral's states (B, length, J) for a chat of the system's message and the prompt."""
    chats = [
        [
            {"role": role, "content": [{"type": "text", "text": said}]}
            for role, said in (("system", SYSTEM), ("user", text.replace("[IMG]", "")))
        ]
        for text in texts
    ]
    tokenizer, told = components["tokenizer"], dict(add_generation_prompt=False, tokenize=True, return_dict=True)
    for ids in tokenizer.apply_chat_template(chats, **told)["input_ids"]:
        prompts.warn_of_cut(tokenizer.decode(ids[length:]).strip() if len(ids) > length else "", length)
    fixed = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    made = tokenizer.apply_chat_template(chats, **told, **fixed)
    return states(components["text_encoder"], made["input_ids"], made["attention_mask"], layers)


def check_text(components: Components, args: Mapping[str, Any], default: tuple[int, ...]) -> None:
    """Refuse texts without an encoder, layers that it does not have, and embeddings that do not fit the transformer."""
    prompts.check(args, alike=False)
    layers, width = args["text_encoder_out_layers"], components["transformer"].config.joint_attention_dim
    if not isinstance(layers, list | tuple):
        raise TypeError(f"text_encoder_out_layers={layers!r} has to be a list of whole numbers.")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if args.get(name) is not None and args[name].shape[-1] != width:
            raise ValueError(f"{name} is {args[name].shape[-1]} wide, but the transformer takes {width}.")
    if args["prompt_embeds"] is not None:
        if tuple(layers) != default:
            raise ValueError("text_encoder_out_layers has no effect on prompt_embeds, which are encoded already.")
        return
    encoder = components["text_encoder"]
    if encoder is None or components["tokenizer"] is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    config = encoder.config.get_text_config()
    most = config.num_hidden_layers
    if not all(isinstance(layer, int) and -most <= layer + 1 <= most + 1 for layer in layers):
        raise ValueError(f"text_encoder_out_layers={layers} has to name layers from 0 to {most}.")
    if len(layers) * config.hidden_size != width:
        made = f"{len(layers)} layers of the text encoder are {len(layers) * config.hidden_size} wide"
        raise ValueError(f"text_encoder_out_layers={layers}: {made}, but the transformer takes {width}.")


# --- pictures ----------------------------------------------------------------------------------------------


def given(image: Any) -> list[Any]:
    """The pictures that a call gives, as a list."""
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4 else [image]


def scaled(picture: Any) -> tuple[int, int]:
    """Height and width of a picture, smaller where it has too many pixels; ValueError for what is too small."""
    size = images.sizes(picture)[0]
    if size is None:
        raise TypeError(
            f"A picture has to be a PIL picture, an array, a tensor or a path, not {type(picture).__name__}."
        )
    width, height = size
    if min(size) < SMALLEST:
        raise ValueError(f"image is {width} x {height} pixels; both sides have to be {SMALLEST} at least.")
    if max(size) > LONGEST * min(size):
        raise ValueError(f"image is {width} x {height} pixels; a side may be {LONGEST} times the other at most.")
    shrink = min((LARGEST / (width * height)) ** 0.5, 1.0)
    return int(height * shrink), int(width * shrink)


def reference(components: Components, picture: Any) -> Tensor:
    """The middle of a picture as (1, 3, H, W), in multiples of a patch."""
    height, width = scaled(picture)
    x = images.pixels(picture, height, width, multiple=1)
    step = 2 * factor(components["vae"])
    tall, wide = height // step * step, width // step * step
    top, left = (height - tall) // 2, (width - wide) // 2
    return x[..., top : top + tall, left : left + wide]


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """A size that is not said is that of the latents, else that of the first picture."""
    step, size = 2 * factor(components["vae"]), None
    latents, image = args["latents"], args.get("image")
    if isinstance(latents, Tensor) and latents.ndim == 4:
        size = latents.shape[-2] * step, latents.shape[-1] * step
    elif image is not None and given(image):
        size = tuple(side // step * step for side in scaled(given(image)[0]))
    if size is None:
        return args
    return args | {name: args[name] or own for name, own in zip(("height", "width"), size, strict=True)}


def check_pictures(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse pictures that are too small or too long, a size that makes none, and a transformer of other latents."""
    if args.get("image") is not None:
        if not given(args["image"]):
            raise ValueError("The list of pictures is empty.")
        for picture in given(args["image"]):
            scaled(picture)
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.latent_channels
    if channels != 4 * latent:
        raise ValueError(f"The transformer takes {channels} channels, but patches of latents have {4 * latent}.")
    flux.check_size(components, args)


# --- the stage ---------------------------------------------------------------------------------------------


def space_of(components: Components, run: Run) -> Patches:
    """The space of a run's latents."""
    return Patches(flux.packed(components, run))


def shift(tokens: int, steps: int) -> float:
    """How far to shift towards noise: a fit by its makers to the number of tokens and of steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (steps - 200)  # `few` at 10 steps, `many` at 200


def places(counts: Tensor, tokens: int, grids: list[Tensor]) -> Tensor:
    """Places (R, tokens + L, 4), time, row, column, word: each text (R,) counts its words after what pads it."""
    words = (torch.arange(tokens) - (tokens - counts[:, None])).clamp(min=0)
    pictures = functional.pad(torch.cat(grids), (0, 1)).expand(len(counts), -1, -1)
    return torch.cat([functional.pad(words[..., None], (3, 0)), pictures], 1)


def stage(
    components: Components,
    run: Run,
    text: Callable[[], Cond],
    guide: Callable[[Run], Guidance] = lambda run: Unguided(),
) -> Stage:
    """The transformer in patches, led by `text`: rows for all branches."""
    network, scheduler, encoder = components["transformer"], components["scheduler"], components["text_encoder"]
    space = space_of(components, run)
    own = grid_places(space.packed.height // 2, space.packed.width // 2)
    dtype = (network if encoder is None else encoder).dtype

    def condition(run: Run, x: Tensor) -> Cond:
        cond = {name: rows.to(network.device) for name, rows in text().items()}
        rows, tokens = cond["encoder_hidden_states"].shape[:2]
        grids, beside_it = [own], list[Tensor]()
        for k, picture in enumerate(given(run["image"]) if run.get("image") is not None else []):
            pixels = reference(components, picture)
            step = 2 * factor(components["vae"])
            grids.append(grid_places(pixels.shape[-2] // step, pixels.shape[-1] // step, first=10 * (k + 1)))
            beside_it.append(space.encode(pixels, None).to(network.device))
        if beside_it:
            cond["reference"] = torch.cat(beside_it, 1).expand(rows, -1, -1)
        counts = cond.get("tokens", torch.full((1,), tokens)).cpu()
        cond["rotary"] = network.rotary(places(counts, tokens, grids)).to(network.device).expand(rows, -1, -1, -1)
        return cond

    return Stage(
        name="transformer",
        network=network,
        space=space,
        scheduler=scheduler,
        dtype=dtype,
        schedule=lambda run: flow_schedule(
            scheduler, run, network.device, len(own), shift(len(own), run["num_inference_steps"])
        ),
        condition=condition,
        guide=guide,
        predict=beside(flux.transformer_predict(network)),
        public={"encoder_hidden_states": "prompt_embeds"},
        prompt_alone=True,
    )


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage, without a negative branch; the network may take the scale as an input."""
    network = components["transformer"]

    def text() -> Cond:
        hidden = run["prompt_embeds"]
        if hidden is None:
            texts = prompts.rows(run["prompt"], run.prompts, "prompt")
            hidden = encode(components, texts, run["max_sequence_length"], run["text_encoder_out_layers"])
        cond = {"encoder_hidden_states": prompts.each(hidden, run.batch // run.prompts)}
        if network.config.guidance_embeds:
            cond["guidance"] = torch.full((run.batch,), float(run.guidance_scale))
        return cond

    return (stage(components, run, text),)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work or would have no effect, before anything is computed."""
    check_text(components, args, LAYERS)
    if args["caption_upsample_temperature"] is not None:
        raise ValueError("caption_upsample_temperature is not supported: no prompt is rewritten here.")
    check_pictures(components, args)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(space_of(components, run).decode(x))


FAMILY = Family(
    key="flux2",
    stem="Flux2",
    slots=SLOTS,
    settings={},
    tasks={"text2image": ROW, "image2image": ROW},
    stages=stages,
    finish=finish,
    check=check,
    size=flux.size,
    read=read,
)
