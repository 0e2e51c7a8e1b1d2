"""What `uniprune prune MODEL -s 2:4 -o FOLDER` takes with default settings, and gives: time, memory, tokens, perplexity.

    python benchmarks/defaults.py [smollm2] [qwen] [--scratch FOLDER]

Each run is a process of its own, on all cores, looked at every 10 ms (scale.measured). Qwen2.5-Coder-0.5B is downloaded the
first time; its output takes 2 GB for a while. Rows accumulate in results/defaults.json, keyed by model. Twelve minutes
for the smaller model on two cores; the larger takes several times that.
Perplexity is that of quality.py's tables (24 windows of 512 of WikiText-2's raw test, float32), of the folder that was written.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import uniprune
from common import load, processor, save
from quality import MODELS, perplexity_of
from scale import verb
from uniprune.storage.files import REPORT

PATTERN = "2:4"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--scratch", type=Path)
    chosen = parser.parse_args()
    for model in chosen.models:
        with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
            output = Path(scratch) / "pruned"
            cost = verb("prune", MODELS[model](), "-s", PATTERN, "-o", str(output))
            report = json.loads((output / REPORT).read_text())
            sources = {"perplexity": str(output), "dense_perplexity": MODELS[model]()}
            perplexities = {
                name: perplexity_of(uniprune.load(source, dtype="float32", device="cpu")) for name, source in sources.items()
            }
        descent = report["controller"]
        row = {"model": model, "pattern": PATTERN, "cpu": processor()["name"], **cost, "seconds_of": report["seconds"]}
        row |= perplexities
        row["prunable"] = sum(math.prod(matrix["shape"]) for matrix in report["matrices"].values())
        row |= {name: descent[name] for name in ("tokens", "steps", "held_out_loss", "best_held_out_loss")}
        others = [other for other in load("defaults").get("rows", []) if other["model"] != model]
        save("defaults", {"rows": [*others, row]})
        print(row, flush=True)


if __name__ == "__main__":
    main()
