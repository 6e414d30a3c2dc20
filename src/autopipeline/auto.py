"""AutoPipeline: the user names a checkpoint and a task, and gets the right class. torch comes with the first one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from autopipeline import names
from autopipeline.loading.index import ModelIndex, read_index
from autopipeline.loading.uncollected import uncollected
from autopipeline.names import AUTO, NOUNS, Coordinates
from autopipeline.selection import configs, locate, possible

if TYPE_CHECKING:
    from autopipeline.pipeline import DiffusionPipeline

FETCH = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def _class(coordinates: Coordinates) -> type[DiffusionPipeline]:
    from autopipeline.pipeline import pipeline_class

    return pipeline_class(coordinates)


class _Auto:
    """What the classes for the three tasks share."""

    task: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        name = type(self).__name__
        raise OSError(
            f"{name} can't be instantiated; use {name}.from_pretrained(checkpoint) or {name}.from_pipe(pipeline)."
        )

    @classmethod
    @uncollected()
    def from_pretrained(cls, pretrained_model_or_path: str | Path, **options: Any) -> DiffusionPipeline:
        """Load a checkpoint as the class for this task.

        Options are those of `DiffusionPipeline.from_pretrained`; besides, `controlnet=` and `enable_pag=True` select
        the class with that add-on.

        Raises:
            ValueError: if the mapping has no class for this checkpoint and task, or the networks can't do it.
            CheckpointError: if the checkpoint is missing, incomplete or damaged.
        """
        fetch = {name: options[name] for name in FETCH if name in options}
        folder = locate(pretrained_model_or_path, only=lambda index: (), **fetch)
        index = read_index(folder)
        chosen = _runnable(names.select(index.class_name, cls.task, add=_addons(options)))
        _refuse_impossible(folder, index, chosen)
        options = _without_addons(options)
        return _class(chosen).from_pretrained(pretrained_model_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
        """The same components as the class for this task; nothing is copied, moved or converted.

        `parts` replace components or settings; `controlnet=None` and `enable_pag=False` take an add-on away.
        """
        from autopipeline.pipeline import DiffusionPipeline

        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(f"from_pipe takes a loaded pipeline, not {type(pipeline).__name__}.")
        kinds = ("ControlNet", "ControlNetUnion", "Inpaint")
        flags = (*((kind, "controlnet") for kind in kinds), ("PAG", "enable_pag"))
        drop = [name for name, flag in flags if _off(parts, flag)]
        add = _addons(parts)
        chosen = names.select(type(pipeline).__name__, cls.task, add=add, drop=drop)
        for name in ("enable_pag", *(["controlnet"] if "ControlNet" in drop else [])):
            parts.pop(name, None)
        made = _class(_runnable(chosen)).from_pipe(pipeline, **parts)
        reason = possible(
            {name: part.config for name, part in made.components.items() if hasattr(part, "config")}, cls.task
        )
        if reason:
            raise ValueError(reason)
        return made


def _addons(options: dict[str, Any]) -> list[str]:
    control = options.get("controlnet")
    nets = control if isinstance(control, list | tuple) and control else [control]
    union = all(type(net).__name__.endswith("ControlNetUnionModel") for net in nets)  # one, or several
    add = [] if control is None else ["ControlNetUnion" if union else "ControlNet"]
    return [*add, "PAG"] if options.get("enable_pag") else add


def _without_addons(options: dict[str, Any]) -> dict[str, Any]:
    """The options without the flags that only select a class; `controlnet=None` is the same as none given."""
    off = {"enable_pag"} | ({"controlnet"} if options.get("controlnet") is None else set())
    return {name: value for name, value in options.items() if name not in off}


def _off(parts: dict[str, Any], flag: str) -> bool:
    return flag in parts and not parts[flag]


def _runnable(chosen: Coordinates) -> Coordinates:
    if not chosen.row.built:
        name = chosen.row.classes[chosen.task]
        raise ValueError(f"{NOUNS[chosen.task].capitalize()} with this is {name}, which is not built in this version.")
    return chosen


def _refuse_impossible(folder: Path, index: ModelIndex, chosen: Coordinates) -> None:
    reason = possible(configs(folder, index), chosen.task)
    if reason:
        raise ValueError(f"{index.class_name} can't do {NOUNS[chosen.task]} with this checkpoint. {reason}")


class AutoPipelineForText2Image(_Auto):
    """Text-to-image: `AutoPipelineForText2Image.from_pretrained(checkpoint)(prompt).images[0]`."""

    task = "text2image"


class AutoPipelineForImage2Image(_Auto):
    """Image-to-image: `AutoPipelineForImage2Image.from_pretrained(checkpoint)(prompt, image=picture).images[0]`."""

    task = "image2image"


class AutoPipelineForInpainting(_Auto):
    """Inpainting: `AutoPipelineForInpainting.from_pretrained(checkpoint)(prompt, image=picture, mask_image=mask)`."""

    task = "inpaint"


class AutoPipeline(_Auto):
    """No task named: the object does whatever its inputs ask for (`image=`, `mask_image=`)."""

    @classmethod
    @uncollected()
    def from_pretrained(cls, pretrained_model_or_path: str | Path, **options: Any) -> DiffusionPipeline:
        """Load a checkpoint as the class of its family that does all of its tasks, by the inputs of each call."""
        fetch = {name: options[name] for name in FETCH if name in options}
        folder = locate(pretrained_model_or_path, only=lambda index: (), **fetch)
        index = read_index(folder)
        here = names.whole(names.find(index.class_name))
        if here is None:
            return AutoPipelineForText2Image.from_pretrained(pretrained_model_or_path, **options)
        known = configs(folder, index)
        able = [task for task in here.row.classes if possible(known, task) is None]
        chosen = names.select(index.class_name, able[0] if able else here.task, add=_addons(options))
        options = _without_addons(options)
        return _class(_runnable(chosen)).from_pretrained(pretrained_model_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
        """The same components as the class of the family that does all of its tasks, by the inputs of each call."""
        here = names.whole(names.find(type(pipeline).__name__))
        first = next(iter(here.row.classes)) if here else "text2image"
        return next(c for c in _Auto.__subclasses__() if c.__name__ == AUTO[first]).from_pipe(pipeline, **parts)
