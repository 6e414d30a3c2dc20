"""The command line. Only `generate` and `rerun` import torch; the others answer from names, configs and headers.

Exit codes: 0 done; 1 `rerun` made another picture; 2 wrong usage or input; 3 the checkpoint can't be loaded; 4 the
generation failed; 130 interrupted.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from autopipeline import __version__
from autopipeline.errors import Cancelled, CheckpointError, NotFiniteError
from autopipeline.shipped import DEFAULT, recommended

KINDS = ["float32", "bfloat16", "float16"]
OPTIONS: dict[str, Any] = dict(context_settings=dict(help_option_names=["-h", "--help"], max_content_width=110))


def main() -> NoReturn:
    """Run the command line; every failure is one sentence and an exit code."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each retry is not worth a line
    warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)  # type: ignore[assignment]
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line with these arguments; gives the exit code."""
    try:
        return cli.main(arguments, prog_name="autopipeline", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort, Cancelled):
        click.echo("Interrupted.", err=True)
        return 130
    except Exception as error:
        if os.environ.get("AUTOPIPELINE_DEBUG"):
            raise
        return _said(error)


def _said(error: Exception) -> int:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        text = f"{error.filename or 'A file'}: {error.strerror or text}."
    click.echo(f"error: {text}", err=True)
    if isinstance(error, CheckpointError):
        return 3
    if isinstance(error, NotFiniteError | OSError | MemoryError | RuntimeError):
        return 4
    return 2


@click.group(**OPTIONS)
@click.version_option(__version__, prog_name="autopipeline")
def cli() -> None:
    """Pictures from any diffusion checkpoint, for any task."""


@cli.command(**OPTIONS)
@click.argument("prompt")
@click.option("-o", "--output", help="PNG file or folder; by default a new file named after prompt and seed.")
@click.option("-m", "--model", default=DEFAULT, show_default=True, help="Folder, Hub repository, or a shipped model.")
@click.option("--task", type=click.Choice(["text2image", "image2image", "inpaint"]), help="By default from the inputs.")
@click.option("-i", "--image", type=click.Path(exists=True, dir_okay=False), help="Picture to start from.")
@click.option("--mask", type=click.Path(exists=True, dir_okay=False), help="Mask: white is repainted.")
@click.option("-s", "--seed", type=click.IntRange(0, 2**63 - 1), help="By default a new one each time.")
@click.option("-n", "--count", type=click.IntRange(1), default=1, help="How many pictures, with seeds counted up.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("-W", "--width", type=int, help="In pixels.")
@click.option("-H", "--height", type=int, help="In pixels.")
@click.option("--cfg-scale", type=float, help="Guidance scale.")
@click.option("--strength", type=float, help="How much of the picture is changed, 0 to 1.")
@click.option("--negative-prompt", help="What should not be in the picture.")
@click.option("--scheduler", help='Such as "Euler a" or "DPM++ 2M Karras"; `autopipeline schedulers` lists them.')
@click.option("--dtype", help="float32, bfloat16, float16, stored; by default what is fast here.")
@click.option("--device", help="cpu, cuda, cuda:1; by default a GPU if there is one.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the networks first: slow to begin, then faster.")
@click.option("--engine", type=click.Choice(["torch", "openvino"]), help="OpenVINO is an extra, for CPUs.")
@click.option("--reuse", type=float, help="Skip steps that change less, such as 0.2; a little lossy.")
@click.option("--variant", help="Such as fp16: which of several sets of weights.")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar; print only the names of the files.")
def generate(prompt: str, **options: Any) -> int:
    """Make pictures that show PROMPT."""
    from autopipeline import recipe

    _check_inputs(options)
    seed = options["seed"] if options["seed"] is not None else int.from_bytes(os.urandom(4), "little")
    paths = recipe.targets(options["output"], prompt, seed, options["count"])
    order = {
        "model": options["model"],
        "task": options["task"] or _task(options),
        "load": {"variant": options["variant"], "revision": options["revision"], "dtype": options["dtype"]},
        "device": options["device"],
        "compiled": options["compiled"],
        "engine": options["engine"],
        "scheduler_name": options["scheduler"],
        "call": recommended(options["model"]) | _call(prompt, options),
        "images": {"image": options["image"], "mask_image": options["mask"]},
    }
    made = make(order, seed, options["count"], options["quiet"])
    for path, (picture, facts) in zip(paths, made, strict=True):
        recipe.save(picture, path, facts)
        click.echo(str(path) if options["quiet"] else f"{path} (seed {facts['seed']})")
    return 0


def _check_inputs(options: dict[str, Any]) -> None:
    """The task and the pictures have to agree, as the pipeline would go by the pictures."""
    task = options["task"]
    if options["mask"] and not options["image"]:
        raise ValueError("--mask needs --image, the picture that it belongs to.")
    if task == "text2image" and options["image"]:
        raise ValueError("--image has no effect on --task text2image; leave one of them out.")
    if task == "image2image" and options["mask"]:
        raise ValueError("--mask has no effect on --task image2image; leave one of them out.")
    for name in ("model", "scheduler", "device", "dtype"):
        if options[name] == "":
            raise ValueError(f"--{name} is empty.")
    if not math.isfinite(options["cfg_scale"] or 0):
        raise ValueError(f"--cfg-scale {options['cfg_scale']} is no finite number.")


def _task(options: dict[str, Any]) -> str:
    if options["mask"]:
        return "inpaint"
    return "image2image" if options["image"] else "text2image"


def _call(prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call that were given."""
    named = {
        "num_inference_steps": options["steps"],
        "width": options["width"],
        "height": options["height"],
        "guidance_scale": options["cfg_scale"],
        "strength": options["strength"],
        "negative_prompt": options["negative_prompt"],
        "reuse": options["reuse"],
    }
    return {"prompt": prompt} | {name: value for name, value in named.items() if value is not None}


def make(order: dict[str, Any], seed: int, count: int, quiet: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Load and call; gives pictures with their recipes."""
    import inspect

    import torch

    from autopipeline import auto, recipe, samplers
    from autopipeline.names import AUTO
    from autopipeline.selection import locate

    device = order["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    load = {name: value for name, value in order["load"].items() if value}
    pipe = getattr(auto, AUTO[order["task"]]).from_pretrained(
        order["model"], device_map=device, **{"dtype": "auto"} | load
    )
    taken = str(pipe.dtype).removeprefix("torch.")
    if load.get("dtype", "auto") == "auto" and taken != "float32" and not quiet:
        click.echo(f"precision: {taken}, which is fast here (--dtype float32 for the exact numbers)", err=True)
    if order["scheduler_name"]:
        pipe.scheduler = samplers.scheduler(order["scheduler_name"], pipe.scheduler)
    if order.get("compiled") or order.get("engine") == "openvino":
        pipe.compile(engine=order.get("engine") or "torch")
    pipe.set_progress_bar_config(disable=quiet, desc="steps", unit="step")
    images = {name: path for name, path in order["images"].items() if path}
    result = pipe(**order["call"], **images, num_images_per_prompt=count, seed=seed)
    shown = inspect.signature(type(pipe).__call__).parameters
    plain = {name: p.default for name, p in shown.items() if _is_plain(p.default)} | order["call"]
    folder = locate(order["model"], only=lambda index: (), **{k: v for k, v in load.items() if k == "revision"})
    facts = order | {
        "call": plain,
        "class": type(pipe).__name__,
        "device": str(device),
        "load": order["load"] | {"dtype": load.get("dtype", "auto") if load.get("dtype", "auto") != "auto" else taken},
        "scheduler": {"_class_name": type(pipe.scheduler).__name__} | _listed(pipe.scheduler.config),
        "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in _networks(pipe).items()},
        "model_digest": recipe.model_digest(folder),
        "inputs": {path: recipe.digest(Path(path)) for path in images.values()},
        "versions": {"autopipeline": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }
    batch = {"seed": seed, "count": count}
    return [
        (picture, facts | {"seed": seed + k, "size": list(picture.size), "batch": batch | {"index": k}})
        for k, picture in enumerate(result.images)
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, type)


def _listed(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_use_default_values" and value != -float("inf")}


def _networks(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if hasattr(part, "parameters")}


@cli.command(**OPTIONS, short_help="Make the picture in a file again, and compare.")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("-o", "--output", help="Keep the new picture here.")
@click.option("-m", "--model", help="Where the model is now, if it has moved.")
@click.option("-i", "--image", help="Where the picture to start from is now.")
@click.option("--mask", help="Where the mask is now.")
@click.option("--device", help="Another device than then.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def rerun(file: str, output: str | None, quiet: bool, **moved: str | None) -> int:
    """Make the picture in FILE again from its recipe, and say whether it is identical."""
    import numpy as np
    from PIL import Image

    from autopipeline import recipe

    facts = recipe.load(Path(file))
    facts |= {"images": _inputs(Path(file), facts, moved)}
    facts["load"] |= {"dtype": facts["load"]["dtype"] or "float32"}  # as it was when recipes did not say
    facts |= {name: moved[name] for name in ("model", "device") if moved[name]}
    paths = recipe.targets(output, "", 0, 1) if output else []
    plain = {name: facts["call"][name] for name in facts["call"] if name in _call_names(facts)}
    batch = facts["batch"]  # the same neighbours: the arithmetic of a batch differs in the last digits
    picture, new = make(facts | {"call": plain}, batch["seed"], batch["count"], quiet)[batch["index"]]
    for path in paths:
        recipe.save(picture, path, new)
    if recipe.pixels_digest(picture) == facts["pixels"]:
        click.echo("identical")
        return 0
    with Image.open(file) as opened:
        before = np.asarray(opened.convert("RGB"), np.int16)
    after = np.asarray(picture.convert("RGB"), np.int16)
    same_shape = before.shape == after.shape
    far = f"by at most {np.abs(before - after).max()} of 255 levels" if same_shape else "in size"
    changed = [
        f"{name} {facts['versions'][name]} then, {new['versions'][name]} now"
        for name in new["versions"]
        if facts["versions"].get(name) != new["versions"][name]
    ]
    changed += ["the weights are others"] if facts["model_digest"] != new["model_digest"] else []
    click.echo(f"different {far}{'; ' if changed else ''}{'; '.join(changed)}")
    return 1


def _inputs(file: Path, facts: dict[str, Any], moved: dict[str, str | None]) -> dict[str, str]:
    """Where the pictures of a recipe are now: where the caller says, where they were, or beside the file."""
    found: dict[str, str] = {}
    for name, option in (("image", "image"), ("mask_image", "mask")):
        before = facts["images"].get(name)
        if not before:
            if moved[option]:
                raise ValueError(f"--{option} has no effect: the recipe has no such picture.")
            continue
        able = [moved[option]] if moved[option] else [before, file.parent / before, file.parent / Path(before).name]
        path = next((str(path) for path in able if Path(str(path)).is_file()), None)
        if path is None:
            raise ValueError(f"The recipe needs {able[0]}, which does not exist; pass --{option} with its place.")
        from autopipeline import recipe

        if recipe.digest(Path(path)) != facts["inputs"].get(before):
            raise ValueError(f"{path} has changed since the picture was made.")
        found[name] = path
    return found


def _call_names(facts: dict[str, Any]) -> list[str]:
    """The arguments to give again: all that the recipe has, but for those that `make` sets itself."""
    return [name for name in facts["call"] if name not in ("num_images_per_prompt", "output_type", "return_dict")]


@cli.command(**OPTIONS, short_help="Say what a model is and what it needs.")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
@click.option("--variant", help="Such as fp16.")
def inspect(model: str, as_json: bool, revision: str | None, variant: str | None) -> int:
    """Say what MODEL is: class, tasks, components, memory, and what would be downloaded."""
    from autopipeline.inspection import inspect_model, shown

    facts = inspect_model(model, revision=revision, variant=variant)
    click.echo(json.dumps(facts, indent=2) if as_json else shown(facts))
    return 0


@cli.command(**OPTIONS, short_help="List the families and their classes.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--markdown", "as_page", is_flag=True, help="As a page with add-ons and stages, for documentation.")
def models(as_json: bool, as_page: bool) -> int:
    """List the families and the class for each task; * marks what this version can run, + what diffusers lacks."""
    from autopipeline import mapping, names, shipped

    if as_page:
        click.echo(mapping.markdown(), nl=False)
        return 0
    rows = names.rows()
    if as_json:
        table = [{"key": row.key, "built": row.built, "ours": list(row.ours), **row.classes} for row in rows]
        click.echo(json.dumps(table, indent=2))
        return 0
    width = max(len(row.key) for row in rows) + 2
    click.echo("  " + "family".ljust(width) + "".join(names.NOUNS[task].ljust(48) for task in names.TASKS).rstrip())
    for row in rows:
        shown = {task: name + " +" * (task in row.ours) for task, name in row.classes.items()}
        cells = "".join(shown.get(task, "-").ljust(48) for task in names.TASKS).rstrip()
        click.echo(("* " if row.built else "  ") + row.key.ljust(width) + cells)
    click.echo("\n* can be run by this version. + is a class that diffusers lacks.")
    click.echo(f"Shipped models: {', '.join(shipped.names()) or 'none'}.")
    return 0


@cli.command(**OPTIONS, short_help="List the schedulers by the names that people use.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def schedulers(as_json: bool) -> int:
    """List the schedulers: names, classes, and the words for noise levels that may follow a name."""
    from autopipeline import samplers

    if as_json:
        rows = [row._asdict() | {"config": dict(row.config)} for row in samplers.SAMPLERS]
        levels = {word: dict(sets) for word, sets in samplers.LEVELS.items()}
        click.echo(json.dumps({"samplers": rows, "levels": levels}, indent=2))
        return 0
    click.echo("name".ljust(20) + "class, and what is set".ljust(72) + "also for")
    for row in samplers.SAMPLERS:
        sets = ", ".join(f"{key}={value}" for key, value in row.config.items())
        also = ", ".join(kind for kind, able in (("flow", row.flow), ("edm", row.edm)) if able)
        click.echo((row.name.ljust(20) + f"{row.plain} {sets and f'({sets})'}".ljust(72) + also).rstrip())
    click.echo(f"\nAfter a name, for the noise levels: {', '.join(samplers.LEVELS)}. Example: DPM++ 2M SDE Karras.")
    click.echo("flow: models such as SD3 and Flux; edm: such as Playground 2.5. Class names do as well.")
    return 0


@cli.command(**OPTIONS, short_help="Measure import, load, step, decode and whole pictures, beside diffusers.")
@click.option("-m", "--model", default=DEFAULT, show_default=True, help="Folder or shipped model.")
@click.option("--random", is_flag=True, help="The folder has configs and tokenizers alone; draw the weights.")
@click.option(
    "--dtype",
    type=click.Choice([*KINDS, "default"]),
    default="float32",
    show_default=True,
    help="default: each one's own.",
)
@click.option("--stored", type=click.Choice(KINDS), help="With --random: how the weights are stored; else float16.")
@click.option("--depth", type=click.IntRange(1), help="With --random: so many blocks of each kind in transformers.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--size", type=click.IntRange(8), help="Side of the pictures in pixels; by default the model's own.")
@click.option("--steps", type=click.IntRange(2), nargs=2, help="A short, a long run; 2 4 unless said.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, help="Measure throughput too; several times."
)
@click.option("--only", "parts", type=click.Choice(["import", "load", "run"]), multiple=True)
@click.option("--without", type=click.Choice(["diffusers", "openvino"]), multiple=True, help="Even where installed.")
@click.option("--compiled", is_flag=True, help="Measure each library under torch.compile as well.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write what was found to a file as well.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False), help="Draw the ratios into a PNG.")
def bench(json_file: str | None, plot_file: str | None, parts: tuple[str, ...], **options: Any) -> int:
    """Measure this machine and print a table: seconds, ratios, and the share of what the machine can do."""
    from autopipeline import bench as measuring
    from autopipeline.bench import report

    unused = [
        name for name in ("batches", "compiled", "size", "steps") if options[name] and "run" not in (parts or ("run",))
    ]
    if unused:
        flag = unused[0].replace("batches", "batch")
        raise ValueError(f"--{flag} has no effect unless pictures are made: --only run.")
    options["steps"] = options["steps"] or (2, 4)
    if options["steps"][0] >= options["steps"][1]:
        raise ValueError(f"--steps {options['steps'][0]} {options['steps'][1]}: the first has to be the smaller one.")
    unused = [name for name in ("depth", "stored") if options[name] and not options["random"]]
    if unused:
        raise ValueError(f"--{unused[0]} has no effect without --random.")
    found = measuring.bench(**options, parts=parts or ("import", "load", "run"))
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    if plot_file:
        report.plot(found, Path(plot_file))
    click.echo(report.table(found))
    return 0


Command = Callable[..., int]

if __name__ == "__main__":
    main()
