"""What one budget under constraints brings on SmolLM2-135M, and what it costs.

    python benchmarks/budget.py [PART ...] [--scores FILE]

- artefact: scores of the controller, calibrated for any sparsity on 65,536 tokens of C4 in bfloat16; the next three parts cut
  from them. --scores: use these, or write them there.
- levels: seconds for ten levels and patterns, by the command line's verb, without the model.
- scope: one budget for the model against one for each row, at 50, 60 and 70 %.
- mixed: 45 % in 2:4 and dense, chosen by the solver, against all 2:4 (50 %), against the same total with the dense matrices
  evenly over depth, and over the power of a score that counts as its loss.
- permutation: Wanda's 2:4, with `--refine` and without, on the model as it is and with its channels permuted.
- threshold: one threshold over a billion scores in a file, against reading that file once; neither finds it in the page cache.

Perplexity: WikiText-2 raw test, 24 windows of 512, float32. Rows accumulate in results/budget.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uniprune
from common import CALIBRATION, EVALUATION, load, relative, save, smollm2, smollm2_folder
from scale import measured
from uniprune.artefacts import scores as scores_file
from uniprune.data.windows import load_windows
from uniprune.evaluation import perplexity as perplexity_module
from uniprune.models import masking
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.mixed import Mixed
from uniprune.sparsity.patterns.nm import DENSE, NM
from uniprune.sparsity.patterns.protocol import BasePattern, Pattern

LEVELS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "2:4", "4:8")
MIXED = 0.45
POWERS = (1.0, 2.0, 4.0)
SCORES, MATRIX = 64, (3125, 5000)  # a billion in all
ROUNDS = 3
SETTLE = """
import sys
from pathlib import Path
from uniprune.artefacts.scores import ScoresFile
from uniprune.sparsity.patterns import spelling
spelling.parse("0.6", "model").prepare(ScoresFile(Path(sys.argv[1])))
"""
READ = """
import sys
buffer = bytearray(1 << 23)
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--scores", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), chosen.scores)
        for part in chosen.parts or ("levels", "scope", "mixed", "permutation", "threshold"):
            keep(part, list(getattr(bench, part)()))


def keep(part: str, rows: list[dict[str, Any]]) -> None:
    others = {name: found for name, found in load("budget").items() if isinstance(found, list) and name != part}
    save("budget", {"calibration": relative(CALIBRATION), "evaluation": relative(EVALUATION), **others, part: rows})


class Bench:
    def __init__(self, scratch: Path, scores: Path | None) -> None:
        self.scratch = scratch
        self._scores = scores or scratch / "scores.safetensors"

    def artefact(self) -> Path:
        """The scores file, calibrated if it is not there yet."""
        if not self._scores.exists():
            recipe = uniprune.Recipe(text=str(CALIBRATION), dtype="bfloat16", windows=128, length=512)
            uniprune.calibrate(smollm2(), recipe, self._scores)
        return self._scores

    @property
    def scores(self) -> scores_file.ScoresFile:
        return scores_file.ScoresFile(self.artefact())

    def perplexity(self, model: str, pattern: Pattern | dict[str, Tensor] | None = None) -> float:
        """Of a model, or of it under masks cut from the artefact, or under masks."""
        loaded = uniprune.load(model, dtype="float32", device="cpu")
        cut = pattern(self.scores) if isinstance(pattern, BasePattern) else (pattern or {}).items()
        masking.apply(find_matrices(loaded.model), cut)
        windows = load_windows(EVALUATION, loaded.tokenizer, use="evaluation", length=512, count=24)
        return perplexity_module.perplexity(loaded.model, windows).perplexity

    def levels(self) -> Iterator[dict[str, Any]]:
        source, output = self.artefact(), self.scratch / "masks.safetensors"
        start = time.perf_counter()
        found = [uniprune.mask(source, spec, output, overwrite=True).sparsity for spec in LEVELS]
        yield shown({"levels": LEVELS, "seconds": time.perf_counter() - start, "sparsities": found})

    def scope(self) -> Iterator[dict[str, Any]]:
        for level in ("0.5", "0.6", "0.7"):
            for scope in ("row", "model"):
                pattern = spelling.parse(level, default=scope)  # type: ignore[arg-type]
                yield shown({"level": level, "scope": scope, "perplexity": self.perplexity(smollm2(), pattern)})

    def mixed(self) -> Iterator[dict[str, Any]]:
        allow = NM(2, 4), DENSE
        for power in POWERS:
            pattern = Mixed(MIXED, allow, power)
            yield self.mix(f"2:4 and dense, chosen by scores to the power {power:g}", dict(pattern(self.scores)))
        yield self.mix("2:4 and dense, dense ones evenly over depth", self.even())
        yield self.mix("all 2:4", dict(allow[0](self.scores)))

    def mix(self, name: str, cut: dict[str, Tensor]) -> dict[str, Any]:
        removed = sum(int((~mask).sum()) for mask in cut.values()) / sum(mask.numel() for mask in cut.values())
        dense = [name for name, mask in cut.items() if bool(mask.all())]
        return shown({"masks": name, "sparsity": removed, "dense": dense, "perplexity": self.perplexity(smollm2(), cut)})

    def even(self) -> dict[str, Tensor]:
        """2:4 masks but for dense matrices at equal distances in the model's order, the total as near to MIXED as it gets."""
        cut = dict(NM(2, 4)(self.scores))
        total = sum(mask.numel() for mask in cut.values())
        names = list(cut)

        def spared(count: int) -> list[str]:
            return [names[int((index + 0.5) * len(names) / count)] for index in range(count)]

        def miss(count: int) -> float:
            return abs(0.5 * (1 - sum(cut[name].numel() for name in spared(count)) / total) - MIXED)

        for name in spared(min(range(1, len(names)), key=miss)):
            cut[name] = torch.ones_like(cut[name])
        return cut

    def permutation(self) -> Iterator[dict[str, Any]]:
        dense = smollm2_folder(self.scratch / "dense")
        text = {"sparsity": "2:4", "text": str(CALIBRATION), "length": 512}
        local = uniprune.Recipe(**text, controller="none", windows=64)
        refined = uniprune.Recipe(**text, controller="none", windows=64, refine=True)
        report = uniprune.permute(dense, local, self.scratch / "permuted")
        gains = defaultdict(list)
        for name, gain in report.permuted.items():
            kind = name.rpartition(".")[2]
            gains[kind if kind in ("down_proj", "o_proj") else "others"].append(gain.kept_after / gain.kept_before - 1)
        yield shown(
            {
                "kept": {kind: statistics.fmean(found) for kind, found in gains.items()},
                "search": report.seconds["search"],
                "calibrate": report.seconds["calibrate"],
            }
        )
        for name in ("dense", "permuted"):
            row = {"model": name, "dense": self.perplexity(str(self.scratch / name))}
            for kind, recipe in (("wanda", local), ("refine", refined)):
                uniprune.prune(str(self.scratch / name), recipe, self.scratch / f"{name}-{kind}")
                row[kind] = self.perplexity(str(self.scratch / f"{name}-{kind}"))
            yield shown(row)

    def threshold(self) -> Iterator[dict[str, Any]]:
        path = self.scratch / "billion.safetensors"
        names = [f"matrix.{index}" for index in range(SCORES)]
        facts = scores_file.ScoresFacts(base="", base_name="", transposed=[], digests={}, matrices=names, comparable=True)
        scores_file.write_scores(path, ((name, torch.rand(MATRIX)) for name in names), dict.fromkeys(names, MATRIX), facts)
        rows = []
        for _ in range(ROUNDS):
            read, found = (cold(path, code) for code in (READ, SETTLE))
            imports = measured([sys.executable, "-c", "from uniprune.artefacts import scores"])["seconds"]
            seconds = found["seconds"] - imports
            rows.append(
                {"read": read["seconds"], "settle": seconds, "ratio": seconds / read["seconds"], "peak": found["peak_bytes"]}
            )
            shown(rows[-1])
        middle = {key: statistics.median(row[key] for row in rows) for key in ("read", "settle", "ratio")}
        yield {"scores": SCORES * math.prod(MATRIX), **middle, "peak_bytes": max(row["peak"] for row in rows)}


def cold(path: Path, code: str) -> Any:
    """The cost of a process that reads a file of which nothing is in the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return measured([sys.executable, "-c", code, str(path)])


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
