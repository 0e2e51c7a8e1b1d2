"""Calibrate on text of your own, and keep the tokens, so that everybody can calibrate on the very same.

    python examples/own_text.py [MODEL] [FOLDER]

A text is a file of plain text or of rows (docs/text.md), a token file, or a folder of them. Nothing is downloaded.
"""

import json
import sys
from pathlib import Path

import uniprune
from uniprune.data.text import read

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "own-text")
folder.mkdir(parents=True, exist_ok=True)

# Stands in for your documents, one to a line. Short ones are no problem: all are joined, and windows are cut from the whole.
documents = read("builtin", "calibration").split("\n\n")[:2000]
(folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

recipe = uniprune.Recipe(sparsity=0.5, text=str(folder / "corpus.jsonl"), windows=16, length=128, controller="none")
tokens = folder / "windows.safetensors"
report = uniprune.prune(model, recipe, folder / "pruned", save_tokens=tokens, overwrite=True)
print("windows", report.calibration.sha256)

again = recipe.replace(text=str(tokens), windows=None, length=None)
same = uniprune.prune(model, again, folder / "again", overwrite=True)
print("again  ", same.calibration.sha256)
print("the same masks:", report.masks_sha256 == same.masks_sha256)
