"""What was measured, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from autopipeline.bench.runs import OURS, PEER

COLUMNS = ("", f"{OURS}", f"{PEER}", "ratio", "of the machine")
BAR, HEIGHT, LEFT, UNIT = 18, 26, 250, 90


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, seconds (or a share) of each library, how many times faster ours is, and the share of the roofline."""
    made: list[tuple[str, ...]] = []
    for name, values in found["figures"].items():
        ours: float | None = values.get(OURS)
        theirs: float | None = values.get(PEER)
        unit = "x" if "of the weights" in name else "s"
        shown = ["-" if each is None else f"{each:.3g} {unit}" for each in (ours, theirs)]
        # the difference of two times may drown in their noise
        ratio = "-"
        if unit == "s" and ours is not None and theirs is not None and min(ours, theirs) > 0:
            ratio = f"{theirs / ours:.2f}"  # differences of times may drown in noise
        share = found["shares"].get(name)
        made.append((name, *shown, ratio, "-" if share is None else f"{share:.0%}"))
    return made


def table(found: dict[str, Any]) -> str:
    """As Markdown, with the machine above and the differences of the pictures below."""
    best = ", ".join(f"{name} {value:.0f}" for name, value in found["roofline"].items())
    lines = [found["machine"], f"{found['model']}, {found['dtype']}; at best: {best}", ""]
    lines += [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows(found))]
    if found["difference"] is not None:
        lines += ["", f"The pictures differ by {found['difference']:.1e} of 1 at most."]
    return "\n".join(lines)


def plot(found: dict[str, Any], file: Path) -> None:
    """How many times faster, as bars; the line is where both are the same."""
    ratios = [(row[0], float(row[3])) for row in rows(found) if row[3] != "-"]
    longest = max([ratio for _, ratio in ratios], default=1.0)
    scale = min(UNIT, 600 / longest)
    picture = Image.new("RGB", (LEFT + int(scale * longest) + 90, HEIGHT * (len(ratios) + 2)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((10, 5), f"{OURS}: times as fast as {PEER}", fill="black", font=font)
    for k, (name, ratio) in enumerate(ratios, 1):
        top, end = k * HEIGHT + 4, LEFT + int(scale * ratio)
        draw.text((10, top), name, fill="black", font=font)
        draw.rectangle((LEFT, top, end, top + BAR), fill="#2a7f62" if ratio >= 1 else "#b5442e")
        draw.text((end + 6, top), f"{ratio:.2f}", fill="black", font=font)
    same = LEFT + int(scale)
    draw.line((same, HEIGHT, same, HEIGHT * (len(ratios) + 1)), fill="black")
    picture.save(file)
