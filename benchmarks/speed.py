"""What calibration costs: statistics, scores and masks against bare forward passes over the same tokens, in one run.

    python benchmarks/speed.py

Alternates the two, because the machine's speed drifts, and reports the ratio of each pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import uniprune
from common import CALIBRATION, relative, save, smollm2
from uniprune import calibration, metrics, patterns
from uniprune.executor import batches
from uniprune.matrices import find_matrices
from uniprune.text import load_windows

ROUNDS = 2
PATTERNS = ("0.5", "2:4")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    loaded = uniprune.load(smollm2(), device="cpu")
    model, matrices = loaded.model, find_matrices(loaded.model)
    windows = load_windows(CALIBRATION, loaded.tokenizer, use="calibration", length=512, count=32)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches(windows.tokens):
                model(input_ids=batch, use_cache=False)

    def cut(spec: str) -> None:
        for _ in patterns.parse(spec)(saliency):  # scores are computed as they are asked for
            pass

    rows = []
    for _ in range(ROUNDS):
        seconds = {"bare": timed(bare)}
        start = time.perf_counter()
        saliency = calibration.one_shot(model, matrices, windows.tokens, metrics.Wanda())
        seconds["calibrate"] = time.perf_counter() - start
        seconds |= {spec: timed(lambda spec=spec: cut(spec)) for spec in PATTERNS}
        ratio = {spec: (seconds["calibrate"] + seconds[spec]) / seconds["bare"] for spec in PATTERNS}
        rows.append({"seconds": seconds, "ratio": ratio})
        print(rows[-1], flush=True)
    median = {spec: statistics.median(row["ratio"][spec] for row in rows) for spec in PATTERNS}
    save("speed", {"tokens": windows.tokens.numel(), "text": relative(CALIBRATION), "rows": rows, "median_ratio": median})


if __name__ == "__main__":
    main()
