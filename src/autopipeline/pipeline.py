"""DiffusionPipeline: components, the call, saving and switching. Every public pipeline class is made from it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from autopipeline import families, images, names, samplers
from autopipeline.binding import Bound, bind, nearest, runs, signature
from autopipeline.config import Config
from autopipeline.denoise import OnStep, answer, denoise, drive
from autopipeline.errors import Cancelled, CheckpointError
from autopipeline.linked import Source, load_all
from autopipeline.loading import foreign
from autopipeline.loading.components import check_fit, find_device, precision, same_precision
from autopipeline.loading.index import read_index
from autopipeline.loading.uncollected import uncollected
from autopipeline.names import Coordinates
from autopipeline.selection import locate, possible
from autopipeline.spaces import crop_box
from autopipeline.speed import compiling, quantizing
from autopipeline.speed.prepare import ready
from autopipeline.stage import Ask, Family, Finished, Loop, Run, Stage, Step

PEER_VERSION = "0.42.1"
"""Written as `_diffusers_version`: the layout that saved folders have."""

PACKAGES = {
    "StableDiffusionSafetyChecker": "stable_diffusion",
    "IFSafetyChecker": "deepfloyd_if",
    "IFWatermarker": "deepfloyd_if",
    "MultilingualCLIP": "kandinsky",
    "ChatGLMModel": "kolors",
    "ChatGLMTokenizer": "kolors",
    "PaellaVQModel": "wuerstchen",
    "WuerstchenDiffNeXt": "wuerstchen",
    "WuerstchenPrior": "wuerstchen",
}
"""Classes that model_index.json names with a package of pipelines, in place of a library."""

HARMLESS = {"low_cpu_mem_usage", "proxies", "mirror", "add_watermarker", "trust_remote_code", "custom_pipeline"}
"""Keywords of `from_pretrained` that other libraries take; accepted only where they ask for what happens anyway."""


@dataclass(frozen=True)
class Output:
    """What a call returns: the pictures, and for each whether a safety checker objected (None: nobody looked)."""

    images: Any
    nsfw_content_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None  # a mark of others, which DeepFloyd's checker looks for too

    @property
    def nsfw_detected(self) -> list[bool] | None:
        """The same as `nsfw_content_detected`."""
        return self.nsfw_content_detected

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        marks = () if self.watermark_detected is None else (self.watermark_detected,)
        return (self.images, self.nsfw_content_detected, *marks)[key]


class Named(dict[str, Any]):
    """What a call returns that makes no pictures (a prior's embeddings): by name, as attributes, or by position."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"This output has {', '.join(self)}, not {name!r}.")

    def __getitem__(self, key: int | str) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@dataclass(frozen=True)
class StreamStep:
    """One step of `stream`; the last item of a stream has the `result` too."""

    index: int  # from 0
    total: int
    timestep: Tensor  # ()
    latents: Tensor  # (B, C, h, w)
    preview: Callable[[], list[Image.Image]]  # small pictures of what the network has in mind
    result: Output | Named | None = None


class RunView:
    """The pipeline as one run sees it: `_interrupt` and the guidance scale set on it concern this run alone."""

    def __init__(self, pipe: DiffusionPipeline, run: Run, steps: int) -> None:
        self.__dict__.update(_pipe=pipe, _run=run, num_timesteps=steps, _num_timesteps=steps)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_pipe"])

    def __getattr__(self, name: str) -> Any:
        run: Run = self.__dict__["_run"]
        if name in ("_interrupt", "interrupt"):
            return run.interrupted
        if name in ("_guidance_scale", "guidance_scale"):
            return run.guidance_scale
        if name == "do_classifier_free_guidance":
            return run.guidance_scale > 1
        if name in run.args:
            return run.args[name]
        return getattr(self.__dict__["_pipe"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        run: Run = self.__dict__["_run"]
        if name in ("_interrupt", "interrupt"):
            run.interrupted = bool(value)
        elif name in ("_guidance_scale", "guidance_scale"):
            run.guidance_scale = float(value)
        else:
            self.__dict__[name] = value


class DiffusionPipeline:
    """A loaded checkpoint that makes pictures; one object may serve any number of threads.

    `DiffusionPipeline.from_pretrained(name)` gives the class that the checkpoint names. That object does text-to-image;
    with `image=` it does image-to-image, with `image=` and `mask_image=` inpainting.
    """

    coordinates: ClassVar[Coordinates]
    family: ClassVar[Family]

    def __init__(self, **parts: Any) -> None:
        if type(self) is DiffusionPipeline:
            raise OSError("DiffusionPipeline is made by DiffusionPipeline.from_pretrained(checkpoint).")
        slots, defaults = self.family.slots, self.family.settings
        unknown = [name for name in parts if name not in slots and name not in defaults and name != "_name_or_path"]
        if unknown:
            near = nearest(unknown[0], [*slots, *defaults])
            raise TypeError(f"{type(self).__name__} has no component {unknown[0]!r}{near}.")
        missing = [name for name, slot in slots.items() if not slot.optional and parts.get(name) is None]
        if missing:
            raise ValueError(f"{type(self).__name__} needs {', '.join(missing)}.")
        check_fit(slots, parts)
        for name in slots:
            setattr(self, name, slots[name].take(parts.get(name)))
        self._settings = {name: parts.get(name, default) for name, default in defaults.items()}
        self._name_or_path: str | None = parts.get("_name_or_path")
        self._progress: dict[str, Any] = {}

    # --- what it is ------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The networks, tokenizers and the scheduler by name; None for those that are left out."""
        return {name: getattr(self, name) for name in self.family.slots}

    @property
    def config(self) -> Config:
        """What model_index.json says: the class of each component, and the settings."""
        entries = {name: _entry(self.family, name, part) for name, part in self.components.items()}
        head = {"_class_name": type(self).__name__, "_diffusers_version": PEER_VERSION}
        named = {"_name_or_path": self._name_or_path} if self._name_or_path else {}
        unsaved = self.family.tasks[self.coordinates.task].unsaved
        defaults = self.family.settings
        settings = {k: v for k, v in self._settings.items() if k not in unsaved or v != defaults[k]}
        return Config(head | named | entries | settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True)}\n"

    @property
    def device(self) -> torch.device:
        """Where the denoising network is (the first network there is)."""
        return self._networks()[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first network."""
        return self._networks()[0].dtype

    def _networks(self) -> list[Any]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def tasks(self) -> tuple[str, ...]:
        """The tasks that this checkpoint can do: "text2image", "image2image", "inpaint"."""
        return tuple(task for task in self.family.tasks if self._impossible(task) is None)

    def _impossible(self, task: str) -> str | None:
        """Why the networks can't do a task; None if they can."""
        found = {name: getattr(part, "config", None) for name, part in self.components.items()}
        configs = {name: dict(config) for name, config in found.items() if isinstance(config, Mapping)}
        return possible(configs, task)

    # --- the call --------------------------------------------------------------------------------------------

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        task, name = self.coordinates.task, type(self).__name__
        if args:
            own = list(self.family.tasks[task].params)
            if len(args) > len(own):
                raise TypeError(f"{name} takes at most {len(own)} positional arguments.")
            twice = [key for key in own[: len(args)] if key in kwargs]
            if twice:
                raise TypeError(f"{name} got {twice[0]!r} twice.")
            kwargs = dict(zip(own, args, strict=False)) | kwargs
        bound = bind(self.family, task, name, kwargs)
        self._check(bound)
        return Bound(bound.task, self.family.read({**self._settings, **self.components}, bound.args))

    def _components(self, run: Run) -> dict[str, Any]:
        """The components, with the scheduler that the run asks for."""
        chosen = run["scheduler"]
        if chosen is None:
            return self.components
        made = samplers.scheduler(chosen, self.components["scheduler"]) if isinstance(chosen, str) else chosen
        return self.components | {"scheduler": made}

    def _check(self, bound: Bound) -> None:
        args = bound.args
        reason = self._impossible(bound.task)
        if reason:
            raise ValueError(reason)
        if args["output_type"] not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={args['output_type']!r} has to be 'pil', 'np', 'pt' or 'latent'.")
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
            scale = args.get(name)
            if scale is not None and not isinstance(scale, Mapping):
                raise TypeError(f"{name} has to be a dict such as {{'scale': 1.0}}, not {scale!r}.")
            if scale and (set(scale) != {"scale"} or scale["scale"] != 1.0):
                raise ValueError(f"{name}={scale} scales adapters, and none is loaded.")
        if args.get("padding_mask_crop") is not None:
            if args["output_type"] != "pil":
                raise ValueError("padding_mask_crop needs output_type='pil', as the result is pasted into the picture.")
            for name in ("image", "mask_image"):
                if not isinstance(args[name], Image.Image):
                    raise ValueError(f"padding_mask_crop needs {name} to be a PIL picture.")
        tensors = _tensor_names(args)
        if not all(isinstance(name, str) for name in tensors):
            raise TypeError("callback_on_step_end_tensor_inputs has to be a list of names.")
        able = self.family.tasks[bound.task].tensors
        unknown = [name for name in tensors if name not in able]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs may name {', '.join(able)}, not {unknown[0]!r}.")

    def __call__(self, *args: Any, **kwargs: Any) -> Output | Named | tuple[Any, ...]:
        """Make pictures. The parameters are those of the family and task: see `inspect.signature(type(pipe).__call__)`.

        Besides: `seed` (an int, counted up over the pictures, or one for each), `scheduler` (a scheduler or a name such
        as "DPM++ 2M Karras", for this call alone), `cancel` (a `threading.Event`), `reuse` (how much, as a share, the
        network's output may have changed for it not to be asked again: 0.2 halves the time of many steps, and changes
        the picture a little), and any number (steps, guidance, strength, sizes ...) as a list, one item a prompt.
        """
        bound = self._bind(args, kwargs)
        made = [self._prepare(bound.task, run) for run in runs(self.family, bound, self._settings)]
        with ready(self.components.values()):
            with tqdm(total=None, **self._progress) as bar:
                loops = [(loop, run, self._reporter(run, bar)) for loop, run, _ in made]
                results = drive(loops)
            outputs = [self._finish(bound.task, run, x) for (_, run, _), x in zip(loops, results, strict=True)]
        return self._returned(_joined(outputs), bound.args["return_dict"])

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[StreamStep]:
        """Make pictures step by step: yields a `StreamStep` after each step; the last one has the `result`.

        Closing the iterator cancels the run.
        """
        bound = self._bind(args, kwargs)
        every = runs(self.family, bound, self._settings)
        if len(every) > 1:
            raise ValueError("stream takes one run at a time; give numbers as single values, not as lists.")
        return self._ready(self._streamed(bound, *self._prepare(bound.task, every[0])))

    def _ready(self, steps: Iterator[StreamStep]) -> Iterator[StreamStep]:
        with ready(self.components.values()):
            yield from steps

    def _streamed(self, bound: Bound, loop: Loop, run: Run, stages: Sequence[Stage]) -> Iterator[StreamStep]:
        reply: Any = None
        report = self._reporter(run, None)
        spaces = {stage.name: stage.space for stage in stages}
        last: StreamStep | None = None
        while True:
            if run.cancel.is_set():
                loop.close()
                raise Cancelled("The run was cancelled.")
            try:
                with torch.no_grad():
                    event = loop.send(reply)
            except StopIteration as done:
                x: Tensor = done.value
                break
            if isinstance(event, Ask):
                reply = answer([event])[0]
                continue
            reply = report(event)
            look = partial(_preview, spaces[event.stage], event.x0)
            step = StreamStep(event.index, event.total, event.timestep, event.tensors["latents"], look)
            if event.stage == stages[-1].name and (event.index == event.total - 1 or run.interrupted):
                last = step  # comes with the result
            else:
                yield step
        result = self._finish(bound.task, run, x)
        if last is not None:
            yield replace(last, result=result)

    def _prepare(self, task: str, run: Run) -> tuple[Loop, Run, Sequence[Stage]]:
        args = dict(run.args)
        run.args = args
        if "height" in args and (args["height"] is None or args["width"] is None):
            height, width = self.family.size({**self._settings, **self.components})
            for side, default in (("height", height), ("width", width)):
                args[side] = default if args[side] is None else args[side]
        components = self._components(run)
        self.family.check({**self._settings, **components}, args)
        stages = self.family.stages(components, run)
        return self._chain(task, stages, run), run, stages

    def _chain(self, task: str, stages: Sequence[Stage], run: Run) -> Loop:
        """All stages one after the other; the task belongs to the last one."""
        x = torch.empty(0)
        for stage in stages:
            stage.enter(run, x)
            own = task if stage is stages[-1] else "text2image"
            x = yield from denoise(stage, self.family.tasks[own].task, run)
        return x

    def _reporter(self, run: Run, bar: Any) -> OnStep:
        views: dict[str, RunView] = {}  # one for the whole stage: what a callback sets on it stays

        def report(step: Step) -> Mapping[str, Tensor] | None:
            if bar is not None:
                if step.index == 0:
                    bar.total = (bar.total or 0) + step.total
                bar.update()
            callback = run["callback_on_step_end"]
            if callback is None:
                return None
            view = views.setdefault(step.stage, RunView(self, run, step.total))
            seen = {name: step.tensors[name] for name in _tensor_names(run.args) if name in step.tensors}
            changes = callback(view, step.index, step.timestep, seen)
            unknown = [name for name in changes or {} if name not in step.tensors]
            if unknown:
                able = ", ".join(step.tensors)
                raise ValueError(f"callback_on_step_end gave back {unknown[0]!r}; it may give {able}.")
            return changes

        return report

    @torch.no_grad()
    def _finish(self, task: str, run: Run, x: Tensor) -> Output | Named:
        kind = run["output_type"]
        if kind == "latent":
            return Output(x)
        done = self.family.finish(self.components, run, x)
        if not isinstance(done, Finished):
            return Named(done)
        if done.raw and kind == "pt":
            return Output(done.pictures, done.flagged, done.marked)
        shown = images.to_output(done.pictures, kind)
        if run.get("padding_mask_crop") is not None and self.family.tasks[task].pasted:
            box = crop_box(run)
            shown = [images.overlay(picture, run["image"], run["mask_image"], box) for picture in shown]
        if done.each is not None:
            shown = [shown[k : k + done.each] for k in range(0, len(shown), done.each)]
        return Output(shown, done.flagged, done.marked)

    def _returned(self, output: Output | Named, as_object: bool) -> Output | Named | tuple[Any, ...]:
        if as_object:
            return output
        if isinstance(output, Named):
            return tuple(output.values())
        seen = [name in self.family.slots for name in ("safety_checker", "watermarker")]
        return (output.images, output.nsfw_content_detected, output.watermark_detected)[: 1 + sum(seen)]

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the progress bar, as tqdm takes them; `disable=True` turns it off."""
        self._progress = options

    # --- loading, saving, switching --------------------------------------------------------------------------

    @classmethod
    @uncollected()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **parts: Any,
    ) -> Self:
        """Load a checkpoint from a folder, the Hub, or the package.

        Args:
            pretrained_model_name_or_path: a folder, a repository such as "stabilityai/sdxl-turbo", or a shipped model.
            torch_dtype: precision of the networks: a torch.dtype, its name, "auto" (what this machine computes well,
                by what is stored), "stored" or a dict by component with "default". The default is float32.
            dtype: the same by its newer name.
            device_map: a device, "balanced" (spread over the GPUs), or a dict by component. The default is the CPU.
            variant: such as "fp16": which of several sets of weights to take.
            use_safetensors: False to also take pickled weights (read with `weights_only=True`).
            revision: branch, tag or commit of the repository.
            token: of the Hub; True takes the stored one.
            cache_dir: where downloads are kept.
            local_files_only: use only what is in the cache.
            force_download: download again.
            parts: components and settings that replace the checkpoint's.

        Raises:
            CheckpointError: if the checkpoint is missing, incomplete or damaged.
            ValueError: if the class does not fit the checkpoint.
        """
        _refuse_keywords(parts)
        if torch_dtype is not None and dtype is not None and not same_precision(torch_dtype, dtype):
            raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} contradict each other; pass one of them.")
        fetch = dict(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            variant=variant,
            use_safetensors=use_safetensors is not False,
        )
        folder = locate(pretrained_model_name_or_path, only=lambda index: _wanted(index, parts), **fetch)
        index = read_index(folder)
        target = cls._target(index.class_name)
        _check_names(target, parts)
        check_fit(target.family.slots, parts)
        _refuse_family(target, index.class_name)
        source = Source(folder, index, not os.path.isdir(pretrained_model_name_or_path), fetch)
        loaded = load_all(
            source, target.family, parts, dtype=dtype if torch_dtype is None else torch_dtype, device_map=device_map
        )
        stored = {name: value for name, value in index.settings.items() if name in target.family.settings}
        stored |= {name: list(e) for name, e in index.components.items() if e and name in target.family.settings}
        settings = stored | {name: value for name, value in parts.items() if name in target.family.settings}
        return target(**target.family.adopt(loaded), **settings, _name_or_path=str(pretrained_model_name_or_path))  # type: ignore[return-value]

    @classmethod
    def _target(cls, class_name: str) -> type[DiffusionPipeline]:
        """The class to make: this one, or for DiffusionPipeline itself the one that the checkpoint names."""
        if cls is not DiffusionPipeline:
            return cls
        found = names.find(class_name)
        if found is None or not found.row.built:
            what = "is not built in this version" if found else "is not a pipeline that autopipeline knows"
            raise CheckpointError(
                f"The checkpoint is a {class_name}, which {what}; there are {', '.join(names.built())}."
            )
        return pipeline_class(found)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts: Any) -> Self:
        """The same components as another class; nothing is copied, moved or converted.

        `parts` replace components or settings.
        """
        target = type(pipeline) if cls is DiffusionPipeline else cls
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(f"from_pipe takes a loaded pipeline, not {type(pipeline).__name__}.")
        if "torch_dtype" in parts or "dtype" in parts:
            raise TypeError("from_pipe changes nothing about the components; use pipe.to(dtype) where that is meant.")
        _check_names(target, parts)
        _refuse_family(target, type(pipeline).__name__)
        shared = {name: part for name, part in pipeline.components.items() if name in target.family.slots}
        settings = {name: value for name, value in pipeline._settings.items() if name in target.family.settings}
        made = target(**{**shared, **settings, **parts}, _name_or_path=pipeline._name_or_path)
        made._progress = dict(pipeline._progress)
        return made  # type: ignore[return-value]

    def save_pretrained(
        self, save_directory: str | Path, *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """Write the checkpoint as a folder; it is written beside it first, so that nothing is left half-done."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained needs a folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, part in self.components.items():
                if isinstance(part, torch.nn.Module):
                    part.save_pretrained(work / name, variant=variant, max_shard_size=max_shard_size)  # type: ignore[operator]
                elif part is not None:
                    part.save_pretrained(work / name)
            saved = {key: value for key, value in self.config.items() if key != "_name_or_path"}
            (work / "model_index.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", "utf-8")
            folder.mkdir(exist_ok=True)
            for item in sorted(work.iterdir(), key=lambda item: item.is_file()):  # model_index.json last
                _replace(item, folder / item.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert all networks in place: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`."""
        device, dtype = _destination(args, kwargs)
        if (
            device is not None
            and torch.device(device).type != "cpu"
            and any(map(quantizing.quantized, self._networks()))
        ):
            raise ValueError("Layers in eight bits are for the CPU; quantize(disable=True), move, and quantize there.")
        for network in self._networks():
            network.to(device=device, dtype=dtype)
        return self

    def compile(self, *names: str, engine: str = "torch", disable: bool = False, **options: Any) -> Self:
        """Have networks compiled by torch.compile at the next call: those of the names, or all that denoise or decode.

        Networks that are rows of blocks are compiled block by block, the first for all. `options` are torch.compile's:
        `mode="reduce-overhead"` records CUDA graphs, `backend=` names another compiler. `engine="openvino"` has
        OpenVINO compute them instead, on the CPU. `disable=True` takes it back. What compiled networks compute differs
        in the last digits.
        """
        chosen = self._chosen(names, besides=("encoder", "checker"))
        if disable and (options or engine != "torch"):
            raise TypeError(f"{next(iter(options), 'engine')} has no effect beside disable=True.")
        if disable:
            compiling.plain_networks(chosen)
        elif any(map(quantizing.quantized, chosen)):
            raise ValueError("Layers in eight bits can't be compiled; quantize(disable=True) takes them back.")
        else:
            compiling.compile_networks(chosen, engine, **options)
        return self

    def quantize(self, kind: str = "int8", *names: str, disable: bool = False) -> Self:
        """Have the large layers of networks compute in eight bits: lossy; of the names, or of those that denoise.

        "int8" is for CPUs, where weights stay as they are beside the whole numbers and `disable=True` takes it back;
        on GPUs, where torchao is needed, it replaces the weights, as does "float8".
        """
        chosen = self._chosen(names, besides=("encoder", "checker", "vae", "vqgan", "movq"))
        if disable and kind != "int8":
            raise ValueError(f"quantize(disable=True) takes back int8 alone, not {kind!r}.")
        if disable:
            quantizing.plain_networks(chosen)
        elif not quantizing.quantize(chosen, kind):
            raise ValueError(
                f"No layer of {', '.join(type(each).__name__ for each in chosen)} is large enough for {kind}."
            )
        return self

    def _chosen(self, names: Sequence[str], besides: Sequence[str]) -> list[torch.nn.Module]:
        """The networks of these names, or all whose names don't tell of something else."""
        parts = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        unknown = [name for name in names if name not in parts]
        if unknown:
            raise ValueError(f"There is no {unknown[0]!r}; the networks are {', '.join(parts)}.")
        return [parts[name] for name in names or parts if names or not any(each in name for each in besides)]


def _tensor_names(args: Mapping[str, Any]) -> list[str]:
    """The tensors that the callback wants: its own list where it has one."""
    own = getattr(args["callback_on_step_end"], "tensor_inputs", None)
    names = own if own is not None else args["callback_on_step_end_tensor_inputs"]
    return list(names) if isinstance(names, list | tuple) else [names]


def _preview(space: Any, x0: Tensor) -> list[Image.Image]:
    with torch.no_grad():
        return images.to_output(space.preview(x0), "pil")


def _joined(outputs: list[Output | Named]) -> Output | Named:
    first, pictures = outputs[0], [output for output in outputs if isinstance(output, Output)]
    if len(outputs) == 1:
        return first
    if isinstance(first, Named):
        return Named({name: _cat([output[name] for output in outputs]) for name in first})
    shown = [output.images for output in pictures]
    flags = [flag for output in pictures for flag in output.nsfw_content_detected or []] or None
    marks = [mark for output in pictures for mark in output.watermark_detected or []] or None
    if all(isinstance(each, Tensor) for each in shown):
        same = len({each.shape[1:] for each in shown}) == 1
        return Output(torch.cat(shown) if same else shown, flags, marks)
    if all(hasattr(each, "dtype") for each in shown):
        same = len({each.shape[1:] for each in shown}) == 1
        return Output(np.concatenate(shown) if same else shown, flags, marks)
    return Output([picture for each in shown for picture in each], flags, marks)


def _cat(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def _entry(family: Family, name: str, part: Any) -> list[str | None]:
    """The [library, class] pair of a component, as model_index.json has it."""
    if part is None:
        return [None, None]
    class_name = type(part).__name__
    if class_name in PACKAGES:
        return [PACKAGES[class_name], class_name]
    if foreign.is_foreign(type(part)):
        return ["transformers", class_name]
    theirs = ("CLIP", "T5", "UMT5", "XLMRoberta", "Bert", "Llama", "Gemma", "Qwen2VLProcessor", "Qwen3VLProcessor")
    return ["transformers" if class_name.startswith(theirs) else "diffusers", class_name]


def _wanted(index: Any, parts: Mapping[str, Any]) -> set[str]:
    """The components to fetch: those that the class needs and the caller does not bring."""
    found = names.find(index.class_name)
    able = (
        set(families.load(found.row.family, found.row.addons).slots)
        if found and found.row.built
        else set(index.components)
    )
    return {name for name, entry in index.components.items() if entry and name in able and name not in parts}


def _refuse_keywords(parts: dict[str, Any]) -> None:
    for name in HARMLESS & set(parts):
        value = parts.pop(name)
        if value and name in ("proxies", "mirror"):
            raise ValueError(f"{name}= is not supported; set HTTPS_PROXY or HF_ENDPOINT in the environment.")
        if value and name in ("trust_remote_code", "custom_pipeline", "add_watermarker"):
            raise ValueError(f"{name}={value!r} is not supported: no code from checkpoints is run, no mark is put in.")


def _check_names(target: type[DiffusionPipeline], parts: Mapping[str, Any]) -> None:
    known = [*target.family.slots, *target.family.settings, *([target.family.linked] if target.family.linked else [])]
    for name in parts:
        if name not in known:
            raise TypeError(f"{target.__name__} has no component or setting {name!r}{nearest(name, known)}.")


def _refuse_family(target: type[DiffusionPipeline], class_name: str) -> None:
    """ValueError where a checkpoint is of a family with other components; relatives such as LCM share theirs."""
    found, row = names.find(class_name), target.coordinates.row
    if found is None or row.family in (found.row.family, found.row.whole) or found.row.family == row.whole:
        return
    if not found.row.built or families.load(found.row.family).slots != target.family.slots:
        task = names.AUTO[target.coordinates.task]
        raise ValueError(
            f"This is a {class_name}, whose components are not those of a {target.__name__}; "
            f"{task} finds the class that fits."
        )


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _destination(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    kwargs = {name: value for name, value in kwargs.items() if name != "silence_dtype_warnings"}  # nobody is warned
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if kwargs:
        raise TypeError(
            f"to() has no parameter {next(iter(kwargs))!r}{nearest(next(iter(kwargs)), ('device', 'dtype'))}."
        )
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif device is not None:
            raise TypeError(f"to() takes one device, not {device!r} and {arg!r}.")
        else:
            device = arg
    return None if device is None else find_device(device), None if dtype is None else precision(dtype, "")


_CLASSES: dict[str, type[DiffusionPipeline]] = {}
_LOCK = threading.Lock()


def pipeline_class(coordinates: Coordinates) -> type[DiffusionPipeline]:
    """The public class at these coordinates, made once."""
    name = coordinates.row.classes[coordinates.task]
    with _LOCK:
        if name not in _CLASSES:
            _CLASSES[name] = _make(name, names.find(name) or coordinates)  # one class may stand for several tasks
    return _CLASSES[name]


def _make(name: str, coordinates: Coordinates) -> type[DiffusionPipeline]:
    family = families.load(coordinates.row.family, coordinates.row.addons)

    def __call__(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return DiffusionPipeline.__call__(self, *args, **kwargs)

    __call__.__doc__ = DiffusionPipeline.__call__.__doc__
    __call__.__signature__ = signature(family, coordinates.task)  # type: ignore[attr-defined]
    body = {
        "coordinates": coordinates,
        "family": family,
        "__call__": __call__,
        "__module__": "autopipeline",
        "__doc__": f"{names.NOUNS[coordinates.task].capitalize()} with a {coordinates.row.key} checkpoint.",
    }
    return type(name, (DiffusionPipeline,), body)
