"""Checkpoints from the Hub: only the files that are needed, kept in the Hub's own cache. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from autopipeline.errors import CheckpointError
from autopipeline.loading.index import FILE, ModelIndex, read_index

REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)"
    r"(?:-\d{5}-of-\d{5})?(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?P<ending>safetensors|bin)(?:\.index(?:\.(?P<tail>[\w-]+))?\.json)?"
)
OTHERS = (
    ".safetensors",
    ".bin",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".ckpt",
    ".pt",
    ".pth",
    ".gguf",
    ".xml",
    ".pb",
)
CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")


class Planned(NamedTuple):
    """A file that loading would need."""

    file: str
    bytes: int
    cached: bool


def resolve(
    name: str | Path,
    *,
    only: Callable[[ModelIndex], Collection[str]] | None = None,
    variant: str | None = None,
    use_safetensors: bool = True,
    **fetch: Any,
) -> Path:
    """The folder of a checkpoint of the Hub, with what is needed in it.

    Args:
        name: a repository, such as "stabilityai/sdxl-turbo".
        only: given the index, the components whose weights are needed; all by default. The small configurations of
            all components are always there.
        variant: which of several sets of weights to take, such as "fp16".
        use_safetensors: False to also take pickled weights.
        fetch: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        CheckpointError: in one sentence, if the name is neither a folder nor a repository, or can't be reached.
    """
    name = str(name)
    if not REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"{name} is neither a folder here, nor a shipped model, nor a repository of the form owner/name."
        )
    folder = Path(_download(name, FILE, **fetch)).parent
    index = read_index(folder)
    wanted = set(index.components) if only is None else set(only(index))
    if fetch.get("local_files_only"):
        return folder
    pinned = fetch | {"revision": folder.name}
    files = choose(_listing(name, pinned), index, wanted, variant, use_safetensors)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(_download, name, **pinned), [file for file in files if file != FILE]))
    return folder


def plan(name: str, *, variant: str | None = None, use_safetensors: bool = True, **fetch: Any) -> list[Planned]:
    """The files that loading would need, their sizes, and whether they are in the cache already."""
    from huggingface_hub import try_to_load_from_cache

    folder = resolve(name, only=lambda index: (), **fetch)
    index = read_index(folder)
    sizes = _sizes(name, fetch | {"revision": folder.name})
    files = choose(list(sizes), index, set(index.components), variant, use_safetensors)
    found = {
        file: try_to_load_from_cache(name, file, cache_dir=fetch.get("cache_dir"), revision=folder.name)
        for file in files
    }
    return [Planned(file, sizes[file], isinstance(found[file], str)) for file in files]


def choose(
    files: Iterable[str], index: ModelIndex, wanted: Collection[str], variant: str | None, use_safetensors: bool
) -> list[str]:
    """Of a repository's files, those to fetch: one set of weights for each wanted component, and all that is small."""
    there = list(files)
    chosen = [file for file in there if file in (FILE, "README.md")]
    lacking: list[str] = []
    for name, entry in index.components.items():
        inside = [file for file in there if file.startswith(f"{name}/") and "/" not in file[len(name) + 1 :]]
        if entry is None:
            continue
        if name not in wanted:
            chosen += [file for file in inside if file.rsplit("/", 1)[1] in CONFIGS]
            continue
        chosen += [file for file in inside if not file.endswith(OTHERS) and ".index." not in file]
        weights, has_variant = _weights(inside, variant, use_safetensors, name)
        chosen += weights
        if weights and variant and not has_variant:
            lacking.append(name)
    if lacking:
        _refuse_variant(there, variant, [file for file in chosen if f".{variant}" in file])
    return chosen


def _weights(inside: list[str], variant: str | None, use_safetensors: bool, name: str) -> tuple[list[str], bool]:
    """One set of weights of a component, and whether it is the variant's."""
    sets: dict[tuple[str | None, str], list[str]] = {}
    for file in inside:
        match = WEIGHTS.fullmatch(file.rsplit("/", 1)[1])
        if match:
            sets.setdefault((match["variant"] or match["tail"], match["ending"]), []).append(file)
    endings = ["safetensors"] if use_safetensors else ["safetensors", "bin"]
    for which in [variant, None] if variant else [None]:
        for ending in endings:
            if (which, ending) in sets:
                return _whole(sets[which, ending]), which == variant
    if sets and all(ending == "bin" for _, ending in sets):
        raise CheckpointError(
            f"The {name} has only pickled weights, which can hide code; "
            "pass use_safetensors=False to read them with weights_only=True."
        )
    if sets:
        there = ", ".join(sorted({which for which, _ in sets if which}))
        raise CheckpointError(f"The {name} has weights only as the variants {there}; pass variant=.")
    return [], True


def _whole(files: list[str]) -> list[str]:
    """A single file where there is one; else the shards and their index."""
    single = [file for file in files if "-of-" not in file and not file.endswith(".json")]
    return single or files


def _refuse_variant(there: list[str], variant: str | None, found: list[str]) -> None:
    if found:  # loading says which components fall back to the plain weights
        return
    matches = (WEIGHTS.fullmatch(file.rsplit("/", 1)[-1]) for file in there)
    variants = sorted({match["variant"] or match["tail"] for match in matches if match} - {None})
    others = f"there are {', '.join(variants)}" if variants else "there are no variants at all"
    raise CheckpointError(f"The repository has no variant {variant!r}; {others}.")


def _options(fetch: dict[str, Any]) -> dict[str, Any]:
    able = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: fetch[name] for name in able if fetch.get(name) is not None}


def _download(name: str, file: str, /, **fetch: Any) -> str:
    from huggingface_hub import hf_hub_download

    return _said(partial(hf_hub_download, name, file, **_options(fetch)), name, file, fetch)


def _listing(name: str, fetch: dict[str, Any]) -> list[str]:
    return list(_sizes(name, fetch))


def _sizes(name: str, fetch: dict[str, Any]) -> dict[str, int]:
    from huggingface_hub import HfApi

    api = HfApi(token=fetch.get("token"))
    info = _said(
        lambda: api.model_info(name, revision=fetch.get("revision"), files_metadata=True),
        name,
        "its list of files",
        fetch,
    )
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def _said(call: Callable[[], Any], name: str, file: str, fetch: dict[str, Any]) -> Any:
    """What a call gives; its failure in one sentence."""
    from huggingface_hub import errors

    at = f" at revision {fetch['revision']!r}" if fetch.get("revision") else ""
    try:
        return call()
    except errors.GatedRepoError:
        raise CheckpointError(f"{name} is gated: accept its terms on the Hub, then pass token=.") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a folder here nor a repository on the Hub (a private one needs token=)."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {fetch.get('revision')!r}.") from None
    except errors.LocalEntryNotFoundError:
        if fetch.get("local_files_only"):
            raise CheckpointError(f"{name} has no {file} in the local cache, and local_files_only is set.") from None
        raise CheckpointError(f"{file} of {name} is not in the cache, and the Hub can't be reached.") from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{name} has no {file}{at}, so it is no whole checkpoint.") from None
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(f"{file} of {name} is not in the cache, and HF_HUB_OFFLINE is set.") from None
    except (errors.HfHubHTTPError, OSError, errors.HFValidationError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} of {name} can't be fetched: {first}") from None
