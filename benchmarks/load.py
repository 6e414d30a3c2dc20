"""Time and peak memory to load an SDXL U-Net with random weights: python benchmarks/load.py --help.

Each load is a process of its own. Memory is the high-water mark of the process above that after its imports; pages of
a mapped file count as soon as they have been read, so every weight is read once before it is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import measure

XL: dict[str, Any] = dict(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
LOAD = """
import json, sys, time
import torch, {library}
from {library} import UNet2DConditionModel

def memory(kind):  # in bytes, of this process
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(kind))

before, begin = memory("VmRSS"), time.perf_counter()
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]))
loaded = time.perf_counter() - begin
total = sum(float(weight.flatten()[::1024].float().sum()) for weight in unet.parameters())
print(json.dumps(dict(seconds=loaded, touched=time.perf_counter() - begin, peak=memory("VmHWM") - before)))
"""


def write(folder: Path, width: float, dtype: torch.dtype) -> int:
    """A U-Net with random weights; gives the bytes of its weights."""
    from autopipeline import UNet2DConditionModel

    channels = tuple(max(32, int(c * width) // 32 * 32) for c in XL["block_out_channels"])
    heads = tuple(max(1, c // 64) for c in channels)
    unet = UNet2DConditionModel(**XL | dict(block_out_channels=channels, attention_head_dim=heads)).to(dtype)
    unet.save_pretrained(folder)
    return sum(weight.nbytes for weight in unet.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=1.0, help="share of the channels; 1.0 has 2.6 billion weights")
    parser.add_argument("--stored", default="float16", help="dtype of the file")
    parser.add_argument("--dtype", default="float16", help="dtype to load in; another one than stored is converted")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--at", help="where the temporary folder goes; a full U-Net in float16 needs 5.2 GB")
    given = parser.parse_args()
    print(measure.machine())
    with tempfile.TemporaryDirectory(dir=given.at) as work:
        size = write(Path(work), given.width, getattr(torch, given.stored))
        asked = size * getattr(torch, given.dtype).itemsize / getattr(torch, given.stored).itemsize
        print(f"{size / 1e9:.2f} GB in {given.stored}, loaded in {given.dtype} ({asked / 1e9:.2f} GB)")
        found: dict[str, list[dict[str, float]]] = {"autopipeline": [], "diffusers": []}
        for run in range(given.runs + 1):
            for library, rows in found.items():
                text = measure.output(measure.python(LOAD.format(library=library), work, given.dtype))
                if run:  # the first one warms the page cache
                    rows.append(json.loads(text.splitlines()[-1]))
    for name in ("seconds", "touched"):
        columns = {library: [row[name] for row in rows] for library, rows in found.items()}
        for library, values in columns.items():
            peer = columns["diffusers"] if library == "autopipeline" else None
            print(measure.row(f"{library}, {name}", values, peer=peer))
    for library, rows in found.items():
        peak = statistics.median(row["peak"] for row in rows)
        print(f"{library + ', peak memory':34} {peak / 1e9:.3f} GB, {peak / asked:.2f} x the weights")


if __name__ == "__main__":
    main()
