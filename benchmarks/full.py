"""Perplexity of the local metrics over the whole WikiText-2 raw test text, windows of 2048, bfloat16.

python benchmarks/full.py
"""

from __future__ import annotations

import uniprune
from common import CALIBRATION, EVALUATION, relative, save, smollm2
from uniprune import calibration, evaluation, masks, metrics, patterns
from uniprune.matrices import find_matrices
from uniprune.text import load_windows

ROWS = (("wanda", "2:4"), ("wanda", "0.5"))


def main() -> None:
    loaded = uniprune.load(smollm2(), dtype="bfloat16", device="cpu")
    model, matrices = loaded.model, find_matrices(loaded.model)
    windows = load_windows(CALIBRATION, loaded.tokenizer, use="calibration", length=512, count=64)
    whole = load_windows(EVALUATION, loaded.tokenizer, use="evaluation", length=2048)
    facts = whole.describe() | {"text": relative(EVALUATION)}
    rows = []

    def record(method: str, pattern: str | None, scope: str | None) -> None:
        rows.append({"method": method, "pattern": pattern, "scope": scope})
        rows[-1]["perplexity"] = evaluation.perplexity(model, whole).perplexity
        print(rows[-1], flush=True)
        save("full", {"evaluation": facts, "dtype": "bfloat16", "rows": rows})

    record("dense", None, None)
    for method, spec in ROWS:
        pattern = patterns.parse(spec)
        saliency = calibration.one_shot(model, matrices, windows.tokens, metrics.parse(method))
        with masks.applied(matrices, dict(pattern(saliency))):
            record(method, spec, "row" if isinstance(pattern, patterns.Unstructured) else None)


if __name__ == "__main__":
    main()
