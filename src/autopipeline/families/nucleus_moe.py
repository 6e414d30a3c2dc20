"""NucleusMoE-Image (2026): experts on packed latents, led by what one of the last layers of Qwen 3-VL thinks of a chat.

Guidance keeps the length of every token's prediction, and the network points towards the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopipeline import images, prompts
from autopipeline.families import flux, qwenimage
from autopipeline.families.once import once
from autopipeline.families.qwenimage import Texts
from autopipeline.families.schedules import flow_schedule
from autopipeline.guidance import Guidance, NormPreserving, Unguided
from autopipeline.stage import Cond, Family, Pred, Predict, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import SharedImage2Image
from autopipeline.tasks.inpaint import Blend
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]
LAYER, LONGEST, MULTIPLE = -8, 1024, 8
"""Which hidden states are heard, of how many tokens at most; texts are padded to multiples of 8."""
SYSTEM = (
    "You are an image generation assistant. Follow the user's prompt literally. Pay careful attention to spatial "
    "layout: objects described as on the left must appear on the left, on the right on the right. Match exact object "
    "counts and assign colors to the correct objects."
)

SLOTS = {
    "transformer": Slot(("NucleusMoEImageTransformer2DModel",)),
    "scheduler": Slot(("Scheduler",)),
    "vae": Slot(("AutoencoderKLQwenImage",)),
    "text_encoder": Slot(("Qwen3VLForConditionalGeneration", "Qwen3VLModel"), optional=True),
    "processor": Slot(("Qwen3VLProcessor", "Qwen2Tokenizer", "Qwen2TokenizerFast"), optional=True),
}
_TEXT = dict(prompt=None, negative_prompt=None)
_REST = (
    dict(num_inference_steps=50, sigmas=None, num_images_per_prompt=1, max_sequence_length=None, return_index=None)
    | dict(generator=None, latents=None)
    | qwenimage.EMBEDS
    | dict(output_type="pil", return_dict=True, attention_kwargs=None)
    | dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",))
)
_LED = dict(guidance_scale=4.0) | qwenimage.SIZE
_STRENGTH = dict(strength=0.6)
TASKS = {
    "text2image": TaskRow(task=Text2Image, params=_TEXT | _LED | _REST, tensors=qwenimage.TENSORS),
    "image2image": TaskRow(
        task=SharedImage2Image,
        params=_TEXT | dict(image=None) | _LED | _STRENGTH | _REST,
        tensors=qwenimage.TENSORS,
    ),
    "inpaint": TaskRow(
        task=Blend,
        params=_TEXT | dict(image=None, mask_image=None) | _LED | dict(padding_mask_crop=None) | _STRENGTH | _REST,
        tensors=qwenimage.TENSORS,
    ),
}


def guided(run: Run) -> bool:
    """Whether there is a negative branch."""
    return run.guidance_scale > 1


def guide(run: Run) -> Guidance:
    """Guidance for scales above 1."""
    return NormPreserving(run.guidance_scale) if guided(run) else Unguided()


def encode(components: Components, texts: list[str], length: int, layer: int) -> Texts:
    """States (P, T, J) that the text encoder has of each text in a chat after so many layers, and their masks."""
    encoder, processor = components["text_encoder"], components["processor"]
    if encoder is None or processor is None:
        raise ValueError("This checkpoint has no text_encoder with a processor; pass prompt_embeds.")
    told = dict(tokenize=False, add_generation_prompt=True)
    chats = [[dict(role="system", content=SYSTEM), dict(role="user", content=[_said(text)])] for text in texts]
    whole = [processor.apply_chat_template(chat, **told) for chat in chats]
    tokenizer = getattr(processor, "tokenizer", processor)
    ids, mask = (
        part.to(encoder.device)
        for part in prompts.foreign_tokens(tokenizer, whole, length, "longest", multiple=MULTIPLE)
    )
    made = encoder(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    return prompts.finite(made.hidden_states[layer], "text_encoder"), mask.bool()


def _said(text: str) -> dict[str, str]:
    return dict(type="text", text=text)


def branches(components: Components, run: Run) -> list[Texts]:
    """Texts of all branches, the prompt's last, as given or encoded; none means an empty negative prompt."""
    layer = LAYER if run["return_index"] is None else run["return_index"]

    def branch(name: str) -> Texts:
        given, mask = run[f"{name}_embeds"], run[f"{name}_embeds_mask"]
        if given is None:
            texts = prompts.rows(run[name] or "", run.prompts, name)
            return encode(components, texts, run["max_sequence_length"] or LONGEST, layer)
        full = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        return given, full if mask is None else mask.bool()

    return [branch(name) for name in ("negative_prompt", "prompt")[0 if guided(run) else 1 :]]


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents."""
    network, scheduler = components["transformer"], components["scheduler"]
    space = flux.packed(components, run)
    own = space.height // 2, space.width // 2

    def condition(run: Run, x: Tensor) -> Cond:
        cond = qwenimage.joined(branches(components, run), run, network.device, straight=True)
        count, tokens = cond["encoder_hidden_states"].shape[:2]
        return cond | {"rotary": network.rotary(tokens, *own).to(network.device).expand(count, -1, -1, -1)}

    return (
        Stage(
            name="transformer",
            network=network,
            space=space,
            scheduler=scheduler,
            dtype=qwenimage.dtype_of(components),
            schedule=lambda run: flow_schedule(scheduler, run, network.device, own[0] * own[1]),
            condition=condition,
            guide=guide,
            predict=_predict(network, scheduler.config["num_train_timesteps"]),
            public={"encoder_hidden_states": "prompt_embeds"},
            prompt_alone=True,
        ),
    )


def _predict(network: Any, times: int) -> Predict:
    """The transformer, turned to noise, as a prediction."""

    @once
    def hear(states: Tensor, table: Tensor) -> Any:
        return network.hear(states.to(network.device, network.dtype), table[0])

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        heard = hear(cond["encoder_hidden_states"], cond["rotary"])
        time, mask = t.to(x.dtype) / times, cond.get("encoder_hidden_states_mask")
        told = cond["rotary"][0], mask, cond.get("perturbed")
        return Pred(-network(x.to(network.dtype), time, heard, *told).to(x.dtype))

    return predict


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args, alike=False)
    qwenimage.check_embeds_masks(args)
    layer, encoder = args["return_index"], components["text_encoder"]
    if layer is not None and encoder is not None:
        layers = encoder.config.text_config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or abs(layer) >= layers:
            raise ValueError(f"return_index={layer!r} has to be a whole number less than {layers}, or minus such.")
    qwenimage.check_channels(components)
    flux.check_size(components, args)
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


FAMILY = Family(
    key="nucleusmoe-image",
    stem="NucleusMoEImage",
    slots=SLOTS,
    settings={},
    tasks=TASKS,
    stages=stages,
    finish=flux.finish,
    check=check,
    size=flux.size,
)
