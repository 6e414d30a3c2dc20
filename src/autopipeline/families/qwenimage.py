"""Qwen-Image (Wu et al. 2025): a transformer on packed latents, led by what Qwen 2.5-VL thinks of a description.

Guidance keeps the length of every token's prediction. Texts of different lengths stand side by side, padded and masked.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.addons import controlnet_streams
from autopipeline.families import flux
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import Guidance, NormPreserving, Unguided
from autopipeline.models.qwenimage import QwenImageMultiControlNetModel
from autopipeline.spaces import Packed
from autopipeline.stage import Cond, Family, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
Texts = tuple[Tensor, Tensor]
"""Hidden states (P, T, J), and which tokens count (P, T)."""
LONGEST = 1024
"""Tokens of text at most."""
LOOKING = threading.Lock()
"""Held while a text encoder works: transformers' keeps on itself how far pictures move the places of words."""

SLOTS = {
    "vae": Slot(("AutoencoderKLQwenImage",)),
    "text_encoder": Slot(("Qwen2_5_VLForConditionalGeneration",), optional=True),
    "tokenizer": Slot(("Qwen2Tokenizer", "Qwen2TokenizerFast"), optional=True),
    "transformer": Slot(("QwenImageTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
}
BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
INSTRUCTION = 34
"""Tokens of `BEFORE`, whose states are dropped."""

PROMPTS: dict[str, Any] = dict(prompt=None, negative_prompt=None, true_cfg_scale=4.0)
SIZE = dict(height=None, width=None)
STEPS = dict(num_inference_steps=50, sigmas=None, guidance_scale=None)
DRAWS = dict(num_images_per_prompt=1, generator=None, latents=None)
EMBEDS = dict(
    prompt_embeds=None, prompt_embeds_mask=None, negative_prompt_embeds=None, negative_prompt_embeds_mask=None
)
LAST = dict(
    output_type="pil",
    return_dict=True,
    attention_kwargs=None,
    callback_on_step_end=None,
    callback_on_step_end_tensor_inputs=("latents",),
    max_sequence_length=512,
)
TENSORS = ("latents", "prompt_embeds")
_IMAGE, _MASK = dict(image=None), dict(mask_image=None, masked_image_latents=None)
_STRENGTH = dict(strength=0.6)
TEXT2IMAGE = TaskRow(task=Text2Image, params=PROMPTS | SIZE | STEPS | DRAWS | EMBEDS | LAST, tensors=TENSORS)
IMAGE2IMAGE = TaskRow(
    task=SharedImage2Image,
    params=PROMPTS | _IMAGE | SIZE | _STRENGTH | STEPS | DRAWS | EMBEDS | LAST,
    tensors=TENSORS,
)
INPAINT = TaskRow(
    task=Blend,
    params=PROMPTS | _IMAGE | _MASK | SIZE | dict(padding_mask_crop=None) | _STRENGTH | STEPS | DRAWS | EMBEDS | LAST,
    tensors=TENSORS,
)
CONTROLNET = {
    "text2image": TaskRow(
        task=Text2Image,
        params=PROMPTS | SIZE | STEPS | controlnet_streams.params(picture=True, kinds=False) | DRAWS | EMBEDS | LAST,
        tensors=TENSORS,
    )
}


def guided(run: Run) -> bool:
    """Whether there is a negative branch."""
    return run["true_cfg_scale"] > 1 and negative(run.args)


def negative(args: Mapping[str, Any]) -> bool:
    """Whether a call says what to lead away from."""
    return args["negative_prompt"] is not None or args["negative_prompt_embeds"] is not None


def guide(run: Run) -> Guidance:
    """Guidance where there is a negative prompt."""
    return NormPreserving(run["true_cfg_scale"]) if guided(run) else Unguided()


def encode(components: Components, texts: list[str], length: int) -> Texts:
    """The text encoder's last hidden states, for at most `length` tokens of each text."""
    encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if encoder is None or tokenizer is None:
        raise ValueError("This checkpoint has no text_encoder with a tokenizer; pass prompt_embeds.")
    whole = [f"{BEFORE}{text}{AFTER}" for text in texts]
    ids, mask = prompts.foreign_tokens(tokenizer, whole, length + INSTRUCTION, "longest")
    return states(encoder, dict(input_ids=ids, attention_mask=mask), INSTRUCTION)


def states(encoder: Any, inputs: Mapping[str, Any], skip: int) -> Texts:
    """The last hidden states of the tokens that count, without the `skip` first ones; padded to the right by zeros."""
    given = {name: value.to(encoder.device) for name, value in inputs.items() if isinstance(value, Tensor)}
    with LOOKING:
        made = encoder(**given, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    rows = [
        hidden[keep][skip:] for hidden, keep in zip(made.hidden_states[-1], given["attention_mask"].bool(), strict=True)
    ]
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
    mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return prompts.finite(hidden, "text_encoder"), mask


def marked(encoder: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs where the encoder is; newer versions want to be told where pictures stand."""
    if "mm_token_type_ids" in inspect.signature(encoder.forward).parameters:
        inputs = inputs | dict(mm_token_type_ids=(inputs["input_ids"] == encoder.config.image_token_id).int())
    return {name: rows.to(encoder.device) for name, rows in inputs.items()}


def text_branches(components: Components, run: Run) -> list[Texts]:
    """Texts of all branches, the prompt's last."""
    length = run["max_sequence_length"]
    return branches(run, lambda texts: encode(components, texts, length), length)


def branches(run: Run, encode: Callable[[list[str]], Texts], length: int | None = None) -> list[Texts]:
    """Of all branches, the prompt's last, what the caller gives (the first `length` tokens) or the encoded texts."""

    def branch(name: str) -> Texts:
        given, mask = run[f"{name}_embeds"], run[f"{name}_embeds_mask"]
        if given is None:
            return encode(prompts.rows(run[name], run.prompts, name))
        mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask.bool()
        return given[:, :length], mask[:, :length]

    return [branch(name) for name in ("negative_prompt", "prompt")[0 if guided(run) else 1 :]]


def joined(branches: Sequence[Texts], run: Run, device: torch.device, straight: bool = False) -> Cond:
    """Texts of all branches as rows, each repeated, the shorter ones padded; a mask only where one is needed.

    As users know it, masks go a b a b where texts go a a b b, but where every picture has its seed, or if `straight`.
    """
    longest, times = max(hidden.shape[1] for hidden, _ in branches), run.batch // run.prompts
    states: list[Tensor] = []
    masks: list[Tensor] = []
    for hidden, mask in branches:
        room = longest - hidden.shape[1]
        states.append(functional.pad(prompts.each(hidden.to(device, branches[-1][0].dtype), times), (0, 0, 0, room)))
        full = functional.pad(mask.to(device), (0, room))
        masks.append(prompts.each(full, times) if straight or run.random.apart else full.repeat(times, 1))
    cond, mask = dict(encoder_hidden_states=torch.cat(states)), torch.cat(masks)
    return cond if bool(mask.all()) else cond | dict(encoder_hidden_states_mask=mask)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    return (stage(components, flux.packed(components, run), text_branches),)


def stage(
    components: Components,
    space: Packed,
    texts: Callable[[Components, Run], list[Texts]] = text_branches,
    *further: tuple[int, int],
) -> Stage:
    """The transformer in packed latents; `further` grids of tokens beside that of x are (rows, columns)."""
    network, scheduler = components["transformer"], components["scheduler"]
    own = space.height // 2, space.width // 2

    def condition(run: Run, x: Tensor) -> Cond:
        cond = joined(texts(components, run), run, network.device)
        count, tokens = cond["encoder_hidden_states"].shape[:2]
        table = network.rotary(tokens, own, *further).to(network.device)
        return cond | {"rotary": table.expand(count, -1, -1, -1)}

    return Stage(
        name="transformer",
        network=network,
        space=space,
        scheduler=scheduler,
        dtype=dtype_of(components),
        schedule=lambda run: flow_schedule(scheduler, run, network.device, own[0] * own[1]),
        condition=condition,
        guide=guide,
        predict=transformer_predict(network),
        public={"encoder_hidden_states": "prompt_embeds"},
        prompt_alone=True,
    )


def dtype_of(components: Components) -> torch.dtype:
    """The precision of the latents: that of the text encoder, or of the transformer without it."""
    encoder = components.get("text_encoder")
    return (components["transformer"] if encoder is None else encoder).dtype


def transformer_predict(network: Any) -> Predict:
    """The transformer as a prediction; angles and masks keep their own kind."""
    typed = ("encoder_hidden_states", "reference")

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        said = {name: rows.to(network.device, network.dtype) if name in typed else rows for name, rows in cond.items()}
        return Pred(network(x.to(network.dtype), t.to(x.dtype) / 1000, **said).to(x.dtype))

    return predict


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """No network takes `guidance_scale`; guidance is said by `true_cfg_scale`."""
    if args["guidance_scale"] is not None:
        raise ValueError("guidance_scale has no effect on this network; pass true_cfg_scale with negative_prompt.")
    return args | dict(guidance_scale=1.0)


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    check_texts(components, args)
    flux.check_size(components, args)
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


def check_texts(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse prompts and embeddings that contradict each other, and a transformer that takes other latents."""
    prompts.check(args, alike=False)
    check_embeds_masks(args)
    if args["max_sequence_length"] > LONGEST:
        raise ValueError(f"max_sequence_length={args['max_sequence_length']} has to be {LONGEST} at most.")
    check_channels(components)
    warn_of_guidance(args, PROMPTS["true_cfg_scale"])


def check_embeds_masks(args: Mapping[str, Any]) -> None:
    """Masks belong to given embeddings, and have a number for each of their tokens."""
    for name in ("prompt", "negative_prompt"):
        embeds, mask = args[f"{name}_embeds"], args[f"{name}_embeds_mask"]
        if mask is not None and (embeds is None or not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]):
            raise ValueError(f"{name}_embeds_mask needs {name}_embeds, and a number for each of its tokens.")


def check_channels(components: Components) -> None:
    """Refuse a transformer that takes other latents."""
    channels, latent = components["transformer"].config.in_channels, components["vae"].config.z_dim
    if channels != 4 * latent:
        raise ValueError(f"The transformer takes {channels} channels, but the vae's latents have 4 x {latent}.")


def warn_of_guidance(args: Mapping[str, Any], usual: float) -> None:
    """Say where a scale (but for the `usual` one, of calls that name none) or a negative prompt has no effect."""
    scale, against = args["true_cfg_scale"], negative(args)
    if scale > 1 and scale != usual and not against:
        warnings.warn(f"true_cfg_scale={scale} has no effect without negative_prompt.", stacklevel=2)
    if scale <= 1 and against:
        warnings.warn(f"The negative prompt has no effect with true_cfg_scale={scale}.", stacklevel=2)


FAMILY = Family(
    key="qwenimage",
    stem="QwenImage",
    slots=SLOTS,
    settings={},
    tasks={"text2image": TEXT2IMAGE, "image2image": IMAGE2IMAGE, "inpaint": INPAINT},
    stages=stages,
    finish=flux.finish,
    check=check,
    read=read,
    size=flux.size,
    variants={frozenset({"ControlNet"}): CONTROLNET},
    addons={"ControlNet": partial(controlnet_streams.attach, several=QwenImageMultiControlNetModel)},
)
