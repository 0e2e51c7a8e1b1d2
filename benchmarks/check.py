"""Records a result that `uniprune evaluate --check` must have again: results/check.json, SmolLM2-135M on WikiText-2.

    python benchmarks/check.py
    uniprune evaluate MODEL.gguf --check benchmarks/results/check.json

Run it in the project's folder, which the text's path is relative to; tests check it on every machine.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import uniprune
from common import RESULTS, smollm2
from uniprune.checkpoints.origin import resolve

TEXT = "../shared/data/wikitext2/wiki.test.raw"


def main() -> None:
    origin = resolve(smollm2())
    loaded = uniprune.load(replace(origin, name=Path(origin.name).name), dtype="float32", device="cpu")
    result = uniprune.evaluate(loaded, text_source=TEXT, windows=4, length=512)
    result.write(RESULTS / "check.json")
    print(result.perplexity, result.protocol.machine)


if __name__ == "__main__":
    main()
