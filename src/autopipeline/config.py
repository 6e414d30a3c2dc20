"""Read-only configurations, and objects that are made from the published ones."""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from autopipeline.errors import CheckpointError


class Config(dict[str, Any]):
    """What a network, a scheduler or a pipeline was made from; `config["key"]` and `config.key` are the same.

    It can't be changed: a pipeline may be in use by other threads. Make a new object with `from_config` instead.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no key {name!r}") from None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a configuration can't be changed; use from_config(config, key=value) to make another")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (dict(self),)


class Configured:
    """An object that is its configuration; the keys and their defaults are those of published checkpoints."""

    config_name: ClassVar[str] = "config.json"
    defaults: ClassVar[Mapping[str, Any]] = {}
    also: ClassVar[tuple[str, ...]] = ()  # keys that have an effect where they are given, but no default
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}  # values that keys may have
    renamed: ClassVar[dict[str, dict[Any, str]]] = {}  # the nearest of its values for those of other classes

    config: Config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = inspect.Parameter
        parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=d) for name, d in cls.defaults.items()]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **config: Any) -> None:
        given = dict(zip(self.defaults, args, strict=False)) | config
        unknown = [name for name in given if name not in (*self.defaults, *self.also)]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {unknown[0]!r}.")
        self._configure(given)

    def _configure(self, given: Mapping[str, Any]) -> None:
        left = [name for name in self.defaults if name not in given]
        named = {key: str(given.get(key)) for key in self.renamed if key in self.defaults}
        nearest = {key: self.renamed[key][name] for key, name in named.items() if name in self.renamed[key]}
        all_of_it = {**self.defaults, **given, **nearest} | ({"_use_default_values": left} if left else {})
        self.config = Config({key: list(v) if isinstance(v, tuple) else v for key, v in all_of_it.items()})
        self.check()

    def check(self) -> None:
        """Refuse values that can't work: text for numbers, and what is none of the choices."""
        for name, default in self.defaults.items():
            value = self.config[name]
            if isinstance(default, int | float) and not isinstance(value, Real | None):
                raise ValueError(f"{name}={value!r} has to be a number, such as the default {default}.")
        for name, able in self.choices.items():
            if name in self.defaults and self.config[name] not in able:
                kind, can = type(self).__name__, ", ".join(map(str, able))
                raise ValueError(f"{name}={self.config[name]!r} is not known to {kind}; it can be {can}.")

    @property
    def own(self) -> Config:
        """The configuration without the keys that are kept for other classes."""
        return Config({key: self.config[key] for key in (*self.defaults, *self.also) if key in self.config})

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | Configured, *, return_unused_kwargs: bool = False, **changes: Any
    ) -> Self:
        """An object from the configuration of another, of any class.

        Keys that this class does not know are kept for the next one; those that the other class had left at its own
        defaults take this class's defaults. With `return_unused_kwargs`, what this class does not know comes second.
        """
        given = dict(config.config if isinstance(config, Configured) else config)
        left = set(given.pop("_use_default_values", ()))
        given = {name: value for name, value in given.items() if name not in left and not name.startswith("_")}
        made = cls.__new__(cls)
        made._configure(given | {name: value for name, value in changes.items() if name in cls.defaults})
        unused = {name: value for name, value in (given | changes).items() if name not in cls.defaults}
        return (made, unused) if return_unused_kwargs else made  # type: ignore[return-value]

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, **changes: Any) -> Self:
        """Read the configuration from a folder; raises CheckpointError where there is none that makes sense."""
        config = cls.load_config(folder, subfolder)
        try:
            return cls.from_config(config, **changes)
        except ValueError as error:
            where = Path(folder, subfolder or "", cls.config_name)
            raise CheckpointError(f"{where} does not describe a {cls.__name__}: {error}") from None

    @classmethod
    def load_config(
        cls, folder: str | Path, subfolder: str | None = None, *, return_unused_kwargs: bool = False, **unused: Any
    ) -> Any:
        """What the file says; with `return_unused_kwargs`, with the other keywords that were given."""
        config = read_object((Path(folder, subfolder) if subfolder else Path(folder)) / cls.config_name)
        return (config, unused) if return_unused_kwargs else config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        part = Path(folder, self.config_name + ".part")
        part.write_text(self._json(self._as_list) + "\n", "utf-8")
        os.replace(part, Path(folder, self.config_name))

    save_config = save_pretrained

    def _json(self, default: Callable[[Any], Any]) -> str:
        shown = {"_class_name": type(self).__name__, "_diffusers_version": "0.42.1"}
        shown |= {name: value for name, value in self.config.items() if name != "_use_default_values"}
        return json.dumps(shown, indent=2, sort_keys=True, default=default)

    def _as_list(self, value: Any) -> list[Any]:
        """Arrays for JSON; functions and other objects, which a configuration may also hold, have no place there."""
        if not hasattr(value, "__iter__"):
            raise TypeError(f"{value!r} can't be written to {self.config_name}.")
        return list(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._json(str)}\n"


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError where it is missing or damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError:
        raise CheckpointError(f"{file.parent} has no {file.name}.") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold an object.")
    return content


def falling(own: Sequence[float], low: float, high: float) -> bool:
    """Whether there are numbers, all within the limits and each smaller than the one before."""
    return bool(own) and all(a > b for a, b in itertools.pairwise(own)) and low <= own[-1] <= own[0] <= high


def listed(numbers: Any) -> list[float] | None:
    """Arrays and tensors as plain lists."""
    return numbers if numbers is None else list(numbers.tolist() if hasattr(numbers, "tolist") else numbers)
