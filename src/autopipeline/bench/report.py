"""What was measured, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from autopipeline.bench.worker import OURS, PEER

BAR, HEIGHT, LEFT, UNIT = 18, 26, 290, 90


def ratio(values: dict[str, float], other: str) -> float | None:
    """How many times faster ours is than another; None where a difference of times drowns in their noise."""
    ours, theirs = values.get(OURS, 0.0), values.get(other, 0.0)
    return theirs / ours if min(ours, theirs) > 0 else None


def columns(found: dict[str, Any]) -> list[str]:
    """The libraries that were measured."""
    return list(dict.fromkeys(name for values in found["figures"].values() for name in values))


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Name, seconds (or a share) of each library, how many times faster ours is, and the share of the roofline."""
    names, made = columns(found), [list[str]()]
    made[0] = ["", *names, *(f"times as fast as {name}" for name in names if name != OURS), "of the machine"]
    for name, values in found["figures"].items():
        share, is_time = found["shares"].get(name), "of the weights" not in name
        shown = [f"{values[lib]:.3g} {'s' if is_time else 'x'}" if lib in values else "-" for lib in names]
        ratios = [ratio(values, lib) if is_time else None for lib in names if lib != OURS]
        shown += ["-" if each is None else f"{each:.2f}" for each in ratios]
        made.append([name, *shown, "-" if share is None else f"{share:.0%}"])
    return made


def table(found: dict[str, Any]) -> str:
    """As Markdown, with the machine above and the differences of the pictures below."""
    best = ", ".join(f"{name} {value:.0f}" for name, value in found["roofline"].items())
    lines = [found["machine"], f"{found['model']}, {found['dtype']}; at best: {best}", ""]
    first, *rest = rows(found)
    lines += [f"| {' | '.join(row)} |" for row in (first, ["---"] * len(first), *rest)]
    for name, (most, usual) in found["difference"].items():
        lines += [
            "",
            f"Pictures differ from those of {name} by {most:.1e} of 1 at most, {usual:.1e} RMS.",
        ]
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """How many times faster, as bars; the line is where both are the same."""
    told = {name: ratio(values, PEER) for name, values in found["figures"].items() if "of the weights" not in name}
    ratios = [(name, each) for name, each in told.items() if each is not None]
    longest = max([ratio for _, ratio in ratios], default=1.0)
    scale = min(UNIT, 600 / longest)
    picture = Image.new("RGB", (LEFT + int(scale * longest) + 90, HEIGHT * (len(ratios) + 2)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((10, 5), f"{OURS}: times as fast as {PEER}", fill="black", font=font)
    for k, (name, times) in enumerate(ratios, 1):
        top, end = k * HEIGHT + 4, LEFT + int(scale * times)
        draw.text((10, top), name, fill="black", font=font)
        draw.rectangle((LEFT, top, end, top + BAR), fill="#2a7f62" if times >= 1 else "#b5442e")
        draw.text((end + 6, top), f"{times:.2f}", fill="black", font=font)
    same = LEFT + int(scale)
    draw.line((same, HEIGHT, same, HEIGHT * (len(ratios) + 1)), fill="black")
    picture.save(file)
