"""What calibration costs: statistics, scores and masks against bare forward passes over the same tokens, in one run.

    python benchmarks/speed.py

Alternates the two, because the machine's speed drifts, and reports the ratio of each pair.
"""

from __future__ import annotations

import statistics
import time

import uniprune
from common import CALIBRATION, relative, save, smollm2
from uniprune import calibration, metrics, patterns
from uniprune.executor import batches
from uniprune.matrices import find_matrices
from uniprune.text import load_windows

PAIRS = 3


def main() -> None:
    loaded = uniprune.load(smollm2(), device="cpu")
    matrices = find_matrices(loaded.model)
    windows = load_windows(CALIBRATION, loaded.tokenizer, use="calibration", length=512, count=64)

    def bare() -> None:
        import torch

        with torch.no_grad():
            for batch in batches(windows.tokens):
                loaded.model(input_ids=batch, use_cache=False)

    def scored(pattern: patterns.Pattern) -> None:
        saliency = calibration.one_shot(loaded.model, matrices, windows.tokens, metrics.Wanda())
        for _ in pattern(saliency):
            pass

    rows = []
    for spec in ("0.5", "2:4"):
        for _ in range(PAIRS):
            seconds = []
            for work in (bare, lambda spec=spec: scored(patterns.parse(spec))):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
            rows.append({"pattern": spec, "bare_s": seconds[0], "scored_s": seconds[1], "ratio": seconds[1] / seconds[0]})
            print(rows[-1], flush=True)
    ratios = {spec: statistics.median(row["ratio"] for row in rows if row["pattern"] == spec) for spec in ("0.5", "2:4")}
    save("speed", {"tokens": windows.tokens.numel(), "text": relative(CALIBRATION), "rows": rows, "median_ratio": ratios})


if __name__ == "__main__":
    main()
