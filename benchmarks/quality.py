"""Perplexity of the local metrics: SmolLM2-135M, C4 calibration (64 windows of 512), WikiText-2 raw test, float32.

python benchmarks/quality.py            # short protocol: 24 windows of 512 tokens spread over the test text
python benchmarks/quality.py --full     # also the whole test text at 2048, for the rows marked full
"""

from __future__ import annotations

import time

import uniprune
from common import CALIBRATION, EVALUATION, peak_memory, relative, save, smollm2
from uniprune import calibration, evaluation, masks, metrics, patterns
from uniprune.matrices import find_matrices
from uniprune.text import load_windows

PATTERNS = (("0.5", "row"), ("2:4", None), ("0.5", "model"), ("0.6", "row"), ("0.7", "row"), ("4:8", None))
METHODS = {"wanda": PATTERNS, "ria:a=0.5": PATTERNS[:2], "magnitude": PATTERNS[:2], "stochria": PATTERNS[:2]}


def main() -> None:
    loaded = uniprune.load(smollm2(), device="cpu")
    model, matrices = loaded.model, find_matrices(loaded.model)
    windows = load_windows(CALIBRATION, loaded.tokenizer, use="calibration", length=512, count=64)
    short = load_windows(EVALUATION, loaded.tokenizer, use="evaluation", length=512, count=24)
    rows = []

    def record(method: str, pattern: str, scope: str | None, seconds: float) -> None:
        row = {"method": method, "pattern": pattern, "scope": scope, "seconds": seconds, "peak_bytes": peak_memory()}
        row["perplexity"] = evaluation.perplexity(model, short).perplexity
        rows.append(row)
        print(row, flush=True)
        results = {"calibration": windows.describe(), "evaluation": short.describe(), "rows": rows}
        for text in (results["calibration"], results["evaluation"]):
            text["text"] = relative(text["text"])
        save("local", results)

    record("dense", "-", None, 0)
    for method, wanted in METHODS.items():
        start = time.perf_counter()
        saliency = calibration.one_shot(model, matrices, windows.tokens, metrics.parse(method))
        calibrated = time.perf_counter() - start
        for spec, scope in wanted:
            start = time.perf_counter()
            pattern = patterns.parse(spec, scope)
            cut = dict(pattern(saliency if pattern.local else metrics.Comparable(saliency)))
            seconds = calibrated + time.perf_counter() - start
            with masks.applied(matrices, cut):
                record(method, spec, scope, seconds)


if __name__ == "__main__":
    main()
