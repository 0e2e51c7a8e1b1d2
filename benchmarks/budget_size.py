"""Whether `uniprune prune --size` keeps its word: SmolLM2-135M pruned to several sizes, packed, and the archive weighed.

    python benchmarks/budget_size.py [folder] [gguf] [choice]

folder: the model in bfloat16, in safetensors; gguf: its GGUF file, from which float32 is written. An archive should have at
most the size asked for, and not much less. choice: how much it matters which weights are kept, by the estimates of one level.
Rows that are measured again replace the old ones.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import uniprune
from common import CALIBRATION, load, save, smollm2, smollm2_folder
from uniprune import Recipe, Unstructured
from uniprune.artefacts import archive
from uniprune.artefacts.archive_size import Estimate
from uniprune.checkpoints.origin import resolve
from uniprune.common.formatting import parse_size
from uniprune.models.loading import skeleton
from uniprune.models.matrices import find_matrices

QUICK = {"metric": "magnitude", "controller": "none", "windows": 2, "length": 64}
WANDA = {"controller": "none", "text": str(CALIBRATION), "windows": 8, "length": 128}
RUNS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "folder": [
        ("magnitude, by row", "140MB", QUICK),
        ("magnitude, by row", "100MB", QUICK),
        ("magnitude, by row", "60MB", QUICK),
        ("magnitude, one budget", "100MB", QUICK | {"scope": "model"}),
        ("Wanda, by row", "100MB", WANDA),
        ("Wanda, `--sequential`", "100MB", WANDA | {"sequential": True}),
    ],
    "gguf": [("magnitude, by row", size, QUICK) for size in ("220MB", "160MB", "100MB")],
    "choice": [],
}


def main() -> None:
    for kind in sys.argv[1:] or RUNS:
        with tempfile.TemporaryDirectory() as name:
            source = smollm2() if kind == "gguf" else smollm2_folder(Path(name) / "dense")
            if kind == "choice":
                save("size", before() | {"choice": choice(source)})
            for label, size, settings in RUNS[kind]:
                row = {"kind": kind, "run": label, **measure(source, size, settings, Path(name))}
                others = [old for old in before()["rows"] if any(old[key] != row[key] for key in ("kind", "run", "size"))]
                save("size", before() | {"rows": [*others, row]})
                print(row, flush=True)


def before() -> dict[str, Any]:
    """What was measured already."""
    results = load("size")
    return {key: results.get(key, nothing) for key, nothing in (("rows", []), ("choice", {}))}


def measure(source: str, size: str, settings: dict[str, Any], place: Path) -> dict[str, Any]:
    start = time.perf_counter()
    report = uniprune.prune(source, Recipe(size=size, **settings), place / "pruned", overwrite=True)
    seconds = time.perf_counter() - start
    packed = archive.pack(place / "pruned", place / "pruned.upz", overwrite=True)["archive_bytes"]
    asked = parse_size(size)
    facts = {"size": size, "bytes": asked, "level": report.size.sparsity if report.size else None, "archive_bytes": packed}
    return facts | {"of_size": packed / asked, "seconds": seconds}


def choice(source: str) -> dict[str, float]:
    """By level: bytes with weights kept at random, over those with the largest kept."""
    origin, draw, found = resolve(source), torch.Generator().manual_seed(0), {}
    matrices = find_matrices(skeleton(origin))
    for level in (0.5, 0.7):
        pattern = Unstructured(level, "row")
        estimate = Estimate(origin, matrices, pattern)
        scores = {name: torch.rand(shape, generator=draw) for name, shape in estimate.shapes.items()}
        found[f"{level:g}"] = estimate(pattern, scores) / estimate(pattern)
    return found


if __name__ == "__main__":
    main()
