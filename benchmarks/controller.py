"""The controller on SmolLM2-135M: C4 calibration, at most 131,072 tokens counted with repeats, WikiText-2 raw test.

    python benchmarks/controller.py 2:4 0.5          # each calibrated for itself
    python benchmarks/controller.py any              # one calibration, all five targets cut from it

112 steps of 2 x 512 tokens, 16 windows twice for the start (local statistics, output gradients): 131,072 tokens; 4 more windows
judge. Descends in bfloat16 (`--dtype bfloat16`), twice as fast on a CPU that has it; evaluates in float32, 24 windows of
512. Rows accumulate in results/controller.json; a row is replaced by a newer one of the same kind.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import uniprune
from common import CALIBRATION, EVALUATION, load, peak_memory, save, smollm2
from uniprune import artefacts, evaluation, masks
from uniprune.matrices import find_matrices
from uniprune.text import load_windows

TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
STEPS = 112


def main() -> None:
    arguments = sys.argv[1:]
    seed = int(arguments.pop(arguments.index("--seed") + 1)) if "--seed" in arguments else 0
    for target in [word for word in arguments if word != "--seed"]:
        with tempfile.TemporaryDirectory() as scratch:
            scores = Path(scratch) / "scores.safetensors"
            recipe = uniprune.Recipe(
                sparsity=None if target == "any" else target,
                text=str(CALIBRATION),
                windows=2 * STEPS + 4,
                length=512,
                steps=STEPS,
                seed=seed,
                dtype="bfloat16",
            )
            start = time.perf_counter()
            facts = uniprune.calibrate(smollm2(), recipe, scores)
            seconds = time.perf_counter() - start
            memory = peak_memory()
            loaded = uniprune.load(smollm2(), dtype="float32", device="cpu")
            matrices = find_matrices(loaded.model)
            windows = load_windows(EVALUATION, loaded.tokenizer, use="evaluation", length=512, count=24)
            for pattern in TARGETS if target == "any" else (target,):
                file = Path(scratch) / "masks.safetensors"
                uniprune.mask(scores, pattern, file, overwrite=True)
                with masks.applied(matrices, artefacts.MasksFile(file)):
                    perplexity = evaluation.perplexity(loaded.model, windows).perplexity
                row = {"pattern": pattern, "scope": None if ":" in pattern else "model", "targets": target, "seed": seed}
                row |= {"perplexity": perplexity, "tokens": (2 * STEPS + 32) * 512, "seconds": seconds, "peak_bytes": memory}
                keep(row | {"held_out_kl": facts["controller"]["held_out_kl"]})


def keep(row: dict[str, object]) -> None:
    rows = load("controller").get("rows", [])
    kind = ("pattern", "targets", "seed")
    rows = [other for other in rows if [other[key] for key in kind] != [row[key] for key in kind]]
    save("controller", {"rows": [*rows, row]})
    print(row, flush=True)


if __name__ == "__main__":
    main()
