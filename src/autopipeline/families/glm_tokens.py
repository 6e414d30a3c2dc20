"""What GLM-Image's language model says a picture is: tokens, drawn one after the other."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline.stage import Run

Components = Mapping[str, Any]
SQUARE = 32
"""Pixels of a token, along one side; the transformer takes each four times, for patches of half that."""
_SPEAKING = threading.Lock()  # the model of transformers keeps the places of what it is saying on itself


class Told(NamedTuple):
    """Tokens of pictures, one for each patch of the transformer."""

    ids: Tensor  # (P, N), or (B, N) where every picture has its seed
    pictures: list[list[Tensor]]  # those of the pictures that each prompt is given, each (1, N')


class Draw:
    """Chooses the next token by chance; takes the scores of all, gives back those of the chosen one alone.

    Chance comes from generators of this run's own, so that no other thread's numbers are touched.
    """

    def __init__(self, config: Any, generators: Sequence[torch.Generator | None], end: Sequence[int]) -> None:
        home: Any = importlib.import_module("transformers")  # whose model this is
        given = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p", "min_p")}
        top = 50 if given["top_k"] is None else given["top_k"]  # as transformers has it
        self.warpers: list[Any] = []
        if given["temperature"] not in (None, 1.0):
            self.warpers.append(home.TemperatureLogitsWarper(float(given["temperature"])))
        if top:
            self.warpers.append(home.TopKLogitsWarper(top))
        if given["top_p"] is not None and given["top_p"] < 1:
            self.warpers.append(home.TopPLogitsWarper(float(given["top_p"])))
        if given["min_p"] is not None:
            self.warpers.append(home.MinPLogitsWarper(float(given["min_p"])))
        self.generators, self.end = generators, list(end)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) to the same, where all but the chosen ones are impossible; the end never comes too early."""
        warped = scores
        for warper in self.warpers:
            warped = warper(ids, warped)
        shares = functional.softmax(warped, -1)
        shares[:, [k for k in self.end if k < shares.shape[1]]] = 0
        if len(self.generators) == 1:
            chosen = torch.multinomial(shares, 1, generator=self.generators[0])
        else:
            rows = zip(shares, self.generators, strict=True)
            chosen = torch.stack([torch.multinomial(row, 1, generator=each) for row, each in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def grids_of(height: int, width: int, alone: bool) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of a picture and, where there is no other picture, first those of a small one."""
    rows, columns = height // SQUARE, width // SQUARE
    ratio = rows / columns
    small = int(ratio**0.5 * (SQUARE // 2)), int((1 / ratio) ** 0.5 * (SQUARE // 2))
    return [(rows, columns), small] if alone else [(rows, columns)]


def doubled(ids: Tensor, rows: int, columns: int) -> Tensor:
    """(P, rows * columns) to (P, 4 * rows * columns): each token for four patches."""
    grid = ids.view(-1, rows, columns)
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def told(components: Components, run: Run, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Told:
    """What the model says of the texts, which it draws anew for every picture that has its seed."""
    generators = _generators(run)
    encoder, processor = components["vision_language_encoder"], components["processor"]
    grids = grids_of(run["height"], run["width"], alone=not pictures)
    with _SPEAKING:
        looks = _looked(components, texts, pictures, grids)
        if len(generators) > 1:
            times = run.batch // run.prompts
            said = [
                _said(encoder, processor([texts[k // times]], pictures[k // times :][:1], grids), [one], grids)
                for k, one in enumerate(generators)
            ]
            return Told(torch.cat(said), looks)
        return Told(_said(encoder, processor(texts, pictures, grids), generators, grids), looks)


def _generators(run: Run) -> list[torch.Generator | None]:
    """One that begins where the call's began; with a seed each, one for each picture."""
    given = run.random.generator
    if given is None:
        return [None]
    many = given if isinstance(given, list) else [given]
    many = many if run.random.apart else many[:1]
    return [torch.Generator().manual_seed(one.initial_seed()) for one in many]


def _said(
    encoder: Any,
    inputs: dict[str, Tensor],
    generators: Sequence[torch.Generator | None],
    grids: Sequence[tuple[int, int]],
) -> Tensor:
    """Tokens (P, N) of the large picture."""
    (rows, columns), before = grids[0], sum(height * width for height, width in grids[1:])
    home: Any = importlib.import_module("transformers")
    config = encoder.generation_config
    ends = encoder.config.text_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    draw = Draw(config, generators, ends if isinstance(ends, list) else [] if ends is None else [ends])
    settings = dict(do_sample=False, use_cache=True, temperature=1.0, top_k=50, top_p=1.0)  # Draw has the model's own
    plain = home.GenerationConfig(max_new_tokens=before + rows * columns, **settings)
    here = {name: each.to(encoder.device) for name, each in inputs.items()}
    out: Tensor = encoder.generate(**here, generation_config=plain, logits_processor=[draw])
    tokens = out[:, inputs["input_ids"].shape[1] :][:, before : before + rows * columns]
    return doubled(tokens, rows, columns)


def _looked(
    components: Components, texts: Sequence[str], pictures: Sequence[Sequence[Any]], grids: Sequence[tuple[int, int]]
) -> list[list[Tensor]]:
    """The tokens of the pictures that the prompts are given."""
    encoder, found = components["vision_language_encoder"], []
    for text, each in zip(texts, pictures, strict=False):
        inputs = components["processor"]([text], [each], grids)
        shapes = inputs["image_grid_thw"][: len(each)]
        seen = encoder.get_image_features(inputs["pixel_values"].to(encoder.device), shapes.to(encoder.device))
        ids: Tensor = encoder.get_image_tokens(seen.pooler_output, shapes.to(encoder.device))
        parts = ids.split(shapes.prod(-1).tolist())
        found.append([doubled(part, int(h), int(w)) for part, (_, h, w) in zip(parts, shapes.tolist(), strict=True)])
    return found
