"""What both Kandinsky 2 share: a prior that imagines the embedding of a picture, and a decoder in MoVQ's latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images, prompts
from autopipeline.errors import NotFiniteError
from autopipeline.families import callbacks
from autopipeline.families import stable_diffusion as sd
from autopipeline.families.schedules import schedule
from autopipeline.guidance import ClassifierFree, Guidance, Unguided
from autopipeline.spaces import LatentSpace, VectorSpace
from autopipeline.stage import Cond, Finished, Pred, Predict, Random, Run, Slot, Stage, TaskRow
from autopipeline.tasks.image2image import repeat_to
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Scheduler, Solver

Components = Mapping[str, Any]
Condition = Callable[[Run, Tensor], Cond]

DECODER_SLOTS = {
    "unet": Slot(("UNet2DConditionModel",)),
    "scheduler": Slot(("Scheduler",)),
    "movq": Slot(("VQModel",)),
}
PRIOR_SLOTS = {
    "prior": Slot(("PriorTransformer",)),
    "image_encoder": Slot(("CLIPVisionModelWithProjection",)),
    "text_encoder": Slot(("CLIPTextModelWithProjection",)),
    "tokenizer": Slot(("CLIPTokenizer",)),
    "scheduler": Slot(("Scheduler",)),
    "image_processor": Slot(("CLIPImageProcessor",)),
}
LINKED_SLOTS = {f"prior_{name}": slot for name, slot in PRIOR_SLOTS.items()}

STEPS = dict(num_inference_steps=100, guidance_scale=4.0)
SIZE = dict(height=512, width=512)
PRIOR_STEPS = dict(prior_guidance_scale=4.0, prior_num_inference_steps=25)
PRIOR_CALLBACK = {f"prior_{name}": default for name, default in sd.CALLBACK.items()}
PRIOR_TENSORS = ("latents", "prompt_embeds", "text_encoder_hidden_states", "text_mask")
PRIOR_ROW = TaskRow(
    task=Text2Image,
    params=dict(prompt=None, negative_prompt=None, num_images_per_prompt=1, num_inference_steps=25, generator=None)
    | dict(latents=None, guidance_scale=4.0, output_type="pt", return_dict=True)
    | sd.CALLBACK,
    tensors=PRIOR_TENSORS,
)


def guide(run: Run) -> Guidance:
    """Classifier-free guidance for scales above 1."""
    return ClassifierFree(run.guidance_scale) if run.guidance_scale > 1 else Unguided()


class MovqSpace(LatentSpace):
    """Latents of MoVQ, which has neither doubt nor scale; sides are rounded up so that latents can be halved."""

    __slots__ = ()

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.vq_embed_dim or self.vae.config.latent_channels)

    def latent_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents: multiples of the factor, for pictures of multiples of its square."""
        whole = self.factor**2
        return -(-height // whole) * self.factor, -(-width // whole) * self.factor

    def shape(self, run: Run, height: int, width: int) -> tuple[int, ...]:
        """(B, C, h, w)."""
        return run.batch, self.channels, *self.latent_sides(height, width)

    def pixels(self, run: Run, image: Any) -> Tensor:
        """Pictures of any kind at the size of the result."""
        return self._sized(image, self.latent_sides(run["height"], run["width"]))

    def masked_pixels(self, run: Run) -> tuple[Tensor, Tensor]:
        """Picture and mask, both at the size of the result."""
        height, width = (side * self.factor for side in self.latent_sides(run["height"], run["width"]))
        mask = images.pixels(run["mask_image"], height, width, multiple=1, signed=False, grey=True, binary=True)
        return self.pixels(run, run["image"]), mask

    def _sized(self, image: Any, latent: tuple[int, int]) -> Tensor:
        given = self._given(image)
        if given is not None:
            return given
        height, width = (side * self.factor for side in latent)
        return images.pixels(image, height, width, multiple=self.factor, cubic=True)

    def encode(self, pixels: Tensor, random: Random | None, plain: bool = False) -> Tensor:
        """The one answer of the encoder."""
        return self.vae.encode(pixels.to(device=self.vae.device, dtype=self.vae.dtype))

    def decode(self, x: Tensor) -> Tensor:
        """Pictures; raises NotFiniteError where they are not finite."""
        pictures = self.vae.decode(x.to(device=self.vae.device, dtype=self.vae.dtype))
        if not torch.isfinite(pictures).all():
            raise NotFiniteError("The movq gave NaN or infinity while decoding.")
        return pictures


class SourceSpace(MovqSpace):
    """The same for pictures to begin with, whose sides are rounded down, to multiples of the factor alone."""

    __slots__ = ()

    def latent_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents."""
        return height // self.factor, width // self.factor

    def pixels(self, run: Run, image: Any) -> Tensor:
        """At the size of the result; to a decoder by itself, each picture for all results of its embedding."""
        x = super().pixels(run, image)
        combined = run.get("prior_num_inference_steps") is not None
        return x if combined or run.batch % len(x) else prompts.each(x, run.batch // run.prompts)


class Repaint(Text2Image):
    """From noise, while the network sees what of the picture is known; outside the mask the picture is put back.

    The mask is widened by a latent to all sides but two corners, as the networks were trained.
    """

    blends = True

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """Noise, which the picture is noised with as well."""
        stage, run = self.stage, self.run
        pixels, mask = stage.space.masked_pixels(run)
        picture = pixels if pixels.shape[1] == stage.space.channels else stage.space.encode(pixels, None)
        self.image = repeat_to(picture.to(device=stage.device, dtype=stage.dtype), run.batch, "image")
        self.noise = x = super().begin(solver, grid)
        if self.image.shape != x.shape:
            raise ValueError(
                f"image has latents of {tuple(self.image.shape[1:])}; this call needs {tuple(x.shape[1:])}."
            )
        kept = 1 - functional.interpolate(mask, size=x.shape[-2:])
        self.kept = repeat_to(_narrowed(kept).to(self.image), run.batch, "mask_image")
        self.known = self.image * self.kept
        self.sees = int(stage.network.config.in_channels) != stage.space.channels  # type: ignore[union-attr,arg-type]
        return x

    def condition(self) -> Cond:
        """What is known of the picture, and where."""
        return {"concat": torch.cat([self.known, self.kept], 1)} if self.sees else {}

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """Outside the mask, the original at the noise level reached (the clean original at the end)."""
        return self._back(x, self.image if last else solver.noised(self.image, self.noise, i))

    def end(self, x: Tensor) -> Tensor:
        """Outside the mask the original, whatever a callback has made of it."""
        return self._back(x, self.image)

    def _back(self, x: Tensor, known: Tensor) -> Tensor:
        return x if self.sees and not self.blends else self.kept * known + (1 - self.kept) * x

    def tensors(self) -> dict[str, Tensor]:
        """Where the picture is known, and what."""
        return {"mask_image": self.kept, "masked_image": self.known}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a changed mask or masked picture."""
        self.kept = tensors.get("mask_image", self.kept)
        self.known = tensors.get("masked_image", self.known)


def _narrowed(kept: Tensor) -> Tensor:
    """1 where none of a place and its neighbours, but for those on one diagonal, is to be repainted: (B, 1, h, w)."""
    around = kept.new_tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])[None, None]
    return (functional.conv2d(1 - kept, around, padding=1) == 0).to(kept)


# --- the prior -------------------------------------------------------------------------------------------------


def paired(run: Run) -> bool:
    """Whether the prior imagines a picture of the negative prompt too, beside that of the prompt."""
    return run.get("negative_prompt") is not None


def prior_condition(components: Components, run: Run) -> Cond:
    """Vectors, hidden states and masks of the texts of all branches."""
    texts = prompts.rows(run["prompt"], run.prompts, "prompt")
    negative = prompts.rows(run.get("negative_prompt") or "", run.prompts, "negative_prompt")
    texts, against = (texts + negative, negative + negative) if paired(run) else (texts, negative)
    encoder, tokenizer, prior = (components[name] for name in ("text_encoder", "tokenizer", "prior"))
    branches = [against, texts] if "negative" in guide(run).branches else [texts]
    columns: list[tuple[Tensor, ...]] = []
    for branch in branches:
        out = encoder(prompts.tokens(tokenizer, branch).to(encoder.device))
        hidden = prompts.finite(out.last, "text_encoder")
        columns.append((out.pooled.to(prior.dtype), hidden.to(prior.dtype), tokenizer.counted(branch).bool()))
    times, pairs = run.batch // run.prompts, zip(*columns, strict=True)
    joined = [torch.cat([prompts.each(rows.to(prior.device), times) for rows in each]) for each in pairs]
    return dict(zip(("proj_embedding", "encoder_hidden_states", "attention_mask"), joined, strict=True))


def prior_stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: from noise to the embeddings of pictures, those of the negative prompt after those of the prompt."""
    prior, scheduler = components["prior"], components["scheduler"]

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        return Pred(prior(x.to(prior.dtype), t, **cond).to(x.dtype))  # type: ignore[arg-type]

    return (
        Stage(
            name="prior",
            network=prior,
            space=VectorSpace(prior.config.embedding_dim, 2 if paired(run) else 1),
            scheduler=scheduler,
            dtype=components["text_encoder"].dtype,
            schedule=lambda run: schedule(scheduler, run, prior.device),
            condition=lambda run, x: prior_condition(components, run),
            guide=guide,
            predict=predict,
            emit=lambda x, x0: prior.denormed(x.to(prior.dtype)),
            public={
                "proj_embedding": "prompt_embeds",
                "encoder_hidden_states": "text_encoder_hidden_states",
                "attention_mask": "text_mask",
            },
        ),
    )


def embeddings(components: Components, run: Run, x: Tensor) -> dict[str, Tensor]:
    """What the prior imagined, and what to lead away from: the negative prompt's, or that of a black picture."""
    if paired(run):
        image, negative = x.chunk(2)
    else:
        encoder = components["image_encoder"]
        side = encoder.config.image_size
        black = torch.zeros(1, 3, side, side, device=encoder.device, dtype=encoder.dtype)
        image, negative = x, encoder(black).to(x).expand(len(x), -1)
    return {"image_embeds": image, "negative_image_embeds": negative}


def prior_finish(components: Components, run: Run, x: Tensor) -> dict[str, Any]:
    """The embeddings, as tensors or arrays."""
    made = embeddings(components, run, x)
    return {name: rows.cpu().numpy() if run["output_type"] == "np" else rows for name, rows in made.items()}


def prior_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    if args["output_type"] not in ("pt", "np"):
        raise ValueError(f"output_type={args['output_type']!r} has to be 'pt' or 'np': a prior makes no pictures.")


# --- the decoder -----------------------------------------------------------------------------------------------


def unet_predict(unet: Any, scheduler: Scheduler) -> Predict:
    """The U-Net's prediction, and the variance that it learned where the scheduler asks for that."""
    asked = str(scheduler.config.get("variance_type")).startswith("learned")

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        seen = {
            name: rows.to(unet.device, unet.dtype if rows.is_floating_point() else None) for name, rows in cond.items()
        }
        beside = seen.pop("concat", None)
        inner = x.to(unet.dtype)
        out = unet(inner if beside is None else torch.cat([inner, beside], 1), t, **seen).to(x.dtype)
        mean, *rest = out.split(x.shape[1], 1)
        return Pred(mean, rest[0] if rest and asked else None)

    return predict


def image_rows(run: Run) -> Tensor:
    """The embeddings of pictures of all branches, (branches * B, E)."""
    rows = [run["image_embeds"]]
    if "negative" in guide(run).branches:
        rows.insert(0, run["negative_image_embeds"].to(rows[0]))
    return torch.cat([prompts.each(branch, run.batch // len(branch)) for branch in rows])


def decoder_stage(components: Components, run: Run, condition: Condition, public: Mapping[str, str]) -> Stage:
    """The U-Net in the latents of MoVQ."""
    unet, scheduler = components["unet"], components["scheduler"]
    space = SourceSpace if run.get("strength") is not None else MovqSpace
    return Stage(
        name="unet",
        network=unet,
        space=space(components["movq"]),
        scheduler=scheduler,
        dtype=unet.dtype,
        schedule=lambda run: schedule(scheduler, run, unet.device),
        condition=condition,
        guide=guide,
        predict=unet_predict(unet, scheduler),
        public=public,
    )


def decoder_finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode; tensors are given as they are, except where a picture was begun with."""
    return Finished(MovqSpace(components["movq"]).decode(x), raw=run.get("strength") is None)


def decoder_read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with lists of embeddings joined and old callbacks as new ones."""
    for name in ("image_embeds", "negative_image_embeds"):
        given = args[name]
        if isinstance(given, list | tuple) and given and all(isinstance(one, Tensor) for one in given):
            args = args | {name: torch.cat(list(given))}
    return callbacks.read(components, args)


def decoder_check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    image, negative = args["image_embeds"], args["negative_image_embeds"]
    if not isinstance(image, Tensor):
        raise TypeError("image_embeds are needed, as a torch.Tensor or a list of them; a prior makes them.")
    if negative is None and args["guidance_scale"] > 1:
        raise ValueError("Guidance needs negative_image_embeds beside image_embeds; a prior makes both.")
    config = components["unet"].config
    width = config.encoder_hid_dim if config.encoder_hid_dim_type == "image_proj" else config.cross_attention_dim
    for name, rows in (("image_embeds", image), ("negative_image_embeds", negative)):
        if rows is not None and rows.shape[1] != width:
            raise ValueError(f"{name} have {rows.shape[1]} numbers each; this unet takes {width}.")
    check_pictures(args)


def check_pictures(args: Mapping[str, Any]) -> None:
    """Picture and mask fit each other."""
    if args.get("mask_image") is not None:
        images.same_size(args["image"], args["mask_image"])


def size(components: Components) -> tuple[int, int]:
    """Height and width in pixels, where a call names none."""
    return 512, 512


# --- both ------------------------------------------------------------------------------------------------------


def chained(components: Components, run: Run, decoder: Stage) -> tuple[Stage, ...]:
    """The prior with its own steps, guidance and callback, then the decoder with what the prior has imagined."""
    args, scale = run.args, run.guidance_scale
    parts = {name.removeprefix("prior_"): part for name, part in components.items() if name.startswith("prior_")}
    own = {name: value for name, value in args.items() if name != "strength"}
    own |= {name.removeprefix("prior_"): value for name, value in args.items() if name.startswith("prior_")}

    def first(run: Run, x: Tensor) -> None:
        run.args, run.guidance_scale = own, args["prior_guidance_scale"]

    def second(run: Run, x: Tensor) -> None:
        run.args, run.guidance_scale = {**args, **embeddings(parts, run, x), "latents": None}, scale

    return (*(replace(stage, enter=first) for stage in prior_stages(parts, run)), replace(decoder, enter=second))


def check(components: Components, args: Mapping[str, Any]) -> None:
    """Refuse what can't work, before anything is computed."""
    prompts.check(args)
    check_pictures(args)
    callback, names = (args.get(name) for name in PRIOR_CALLBACK)
    if callback is not None and not callable(callback):
        raise TypeError(f"prior_callback_on_step_end has to be a function, not {type(callback).__name__}.")
    unknown = [name for name in names or () if name not in PRIOR_TENSORS]
    if unknown:
        able = ", ".join(PRIOR_TENSORS)
        raise ValueError(f"prior_callback_on_step_end_tensor_inputs may name {able}, not {unknown[0]!r}.")
