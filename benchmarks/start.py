"""How long a user waits before anything happens, as whole processes: python benchmarks/start.py --help."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import measure
from autopipeline import shipped

PROMPT = "a large red circle left of a small blue square on a yellow background"
PEER = """
import sys, torch
from diffusers import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
generator = torch.Generator().manual_seed(1)
pipe(sys.argv[2], num_inference_steps=int(sys.argv[3]), generator=generator).images[0].save(sys.argv[4])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="scenes-128", help="a shipped model or a folder")
    parser.add_argument("--folder", help="an SDXL folder for `inspect`; by default the model")
    given = parser.parse_args()
    model = str(shipped.path(given.model)) if given.model in shipped.names() else given.model
    ours = [sys.executable, "-m", "autopipeline"]
    print(measure.machine())
    with tempfile.TemporaryDirectory() as work:
        picture, other = Path(work, "ours.png"), Path(work, "peer.png")
        generate = ["generate", PROMPT, "-m", model, "--steps", str(given.steps), "--device", "cpu", "--dtype"]
        commands = {
            "python, doing nothing": measure.python("pass"),
            "import autopipeline": measure.python("import autopipeline"),
            "import diffusers": measure.python("import diffusers"),
            "autopipeline --help": [*ours, "--help"],
            "autopipeline inspect": [*ours, "inspect", given.folder or model],
            "autopipeline generate": [*ours, *generate, "float32", "-q", "-s", "1", "-o", str(picture)],
            "diffusers, the same picture": measure.python(PEER, model, PROMPT, given.steps, other),
        }
        taken = measure.in_turn(commands, given.runs)
    against = {"import autopipeline": "import diffusers", "autopipeline generate": "diffusers, the same picture"}
    for name, values in taken.items():
        print(measure.row(name, values, peer=taken.get(against.get(name, ""))))


if __name__ == "__main__":
    main()
