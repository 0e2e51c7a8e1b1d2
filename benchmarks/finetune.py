"""What examples/finetune.py recovers on SmolLM2: runs it on C4, measures on WikiText-2, and checks that every zero is there.

    python benchmarks/finetune.py [tuned] [merged] [--folder FOLDER]

A few minutes for each. FOLDER: where the models are kept, and taken from if they are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import uniprune
from common import CALIBRATION, EVALUATION, ROOT, load, relative, save, smollm2
from uniprune.artefacts.mask_tools import verify

PARTS = {"tuned": [], "merged": ["--lora"]}


def measured(model: str | Path) -> dict[str, Any]:
    found = uniprune.evaluate(model, text_source=str(EVALUATION), windows=8, length=512, dtype="float32")
    return {"perplexity": found.perplexity, "sparsity": found.sparsity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS])
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    rows = {row["model"]: row for row in load("finetune").get("rows", [])}
    facts = {"text": relative(CALIBRATION), "evaluation": relative(EVALUATION), "protocol": "8 windows of 512, float32"}

    def add(name: str, model: str | Path) -> None:
        rows[name] = {"model": name, **measured(model)}
        print(rows[name], flush=True)
        order = ["dense", "pruned", *PARTS]
        save("finetune", {**facts, "rows": sorted(rows.values(), key=lambda row: order.index(row["model"]))})

    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        for part in chosen.parts:
            example = [sys.executable, str(ROOT / "examples" / "finetune.py"), smollm2(), str(folder), str(CALIBRATION)]
            if not (folder / part).is_dir():
                subprocess.run([*example, *PARTS[part]], check=True)
            verify(folder / "pruned" / "pruning" / "masks.safetensors", pruned=folder / part)  # raises if a zero is not there
            add(part, folder / part)
        for name, model in (("dense", smollm2()), ("pruned", folder / "pruned")):
            if name not in rows:
                add(name, model)


if __name__ == "__main__":
    main()
