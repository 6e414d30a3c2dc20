"""Read-only configurations: a dictionary whose keys can also be read as attributes."""

from __future__ import annotations

from typing import Any, NoReturn


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
