"""The callbacks of older families: `callback(step, timestep, latents)`, after every so many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARAMS: dict[str, Any] = dict(callback=None, callback_steps=1)


def read(components: Mapping[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with `callback` as a `callback_on_step_end`; of a step in two halves it sees the second."""
    callback, every = args["callback"], args["callback_steps"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"callback_steps={every!r} has to be a whole number of at least 1.")
    if callback is None:
        if every != 1:
            raise ValueError(f"callback_steps={every} has no effect without callback.")
        return args
    if not callable(callback):
        raise TypeError(f"callback has to be a function, not {type(callback).__name__}.")
    if args["callback_on_step_end"] is not None:
        raise ValueError("Pass either callback or callback_on_step_end, not both.")
    halves = getattr(args["scheduler"] or components["scheduler"], "order", 1)

    def after(pipe: Any, index: int, t: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        whole = (index + 1) % halves == 0 or index + 1 == pipe.num_timesteps
        if whole and index % every == 0:
            callback(index // halves, t, tensors["latents"])
        return {}

    own = dict(callback_on_step_end=after, callback_on_step_end_tensor_inputs=("latents",))
    return args | own
