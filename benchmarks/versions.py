"""The controller of this version beside another version's: seconds a descent takes, and how good its masks are.

    python benchmarks/versions.py --other FOLDER [--pattern P ...] [--tokens N] [--seed N] [--rounds N]

FOLDER: a checkout of the other version. Both descend for the same pattern on the same windows of C4, each in a process of its
own, by turns, every other round in reverse. Seconds are those of the descent, start and judging included, without loading the
model. Masks are compared by their KL to the dense model, nats a token, on 12 windows of 512 from another file of C4. Rows
accumulate in results/versions.json. Two rounds of 32,768 tokens take about 20 minutes a pattern on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import uniprune
from common import DATA, FAST, ROOT, load, save, smollm2
from scale import Cost, Row, alternate, ratio
from uniprune.data.windows import load_windows
from uniprune.evaluation.divergence import Recording, closeness
from uniprune.evaluation.perplexity import perplexity
from uniprune.models import masking
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.protocol import Masks

HELD_OUT = DATA / "c4" / "c4_short.jsonl"
# In a version's own benchmarks folder. Older ones read patterns elsewhere.
SIDE = """
import json, sys, time, torch, quality
spec, tokens, seed, masks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pattern = getattr(quality, "spelling", None) or quality.patterns
pattern = pattern.parse(spec, default="model")
bench = quality.Bench(seed)
bench.reload(quality.FAST)
bench.reload = lambda dtype=None: None
start = time.perf_counter()
saliency, counted = bench.descend([pattern], tokens)
seconds = time.perf_counter() - start
torch.save(dict(pattern(saliency)), masks)
print(json.dumps({"seconds": seconds, "tokens": counted}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--pattern", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", chosen.other, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=True
    )
    sides = {"this": ROOT, "other": chosen.other.resolve()}
    judge = Judge()
    for spec in chosen.pattern:
        costs = alternate(
            chosen.rounds,
            {side: partial(descended, root, spec, chosen.tokens, chosen.seed, judge) for side, root in sides.items()},
        )
        found = {side: some[0] | {"seconds": [cost["seconds"] for cost in some]} for side, some in costs.items()}
        key = {"other_version": commit.stdout.strip(), "pattern": spec, "budget": chosen.tokens, "seed": chosen.seed}
        facts = {"dtype": dtype_name(FAST), "seconds_ratio": ratio(costs["this"], costs["other"], "seconds")}
        keep(key | facts | found)


def descended(root: Path, spec: str, tokens: int, seed: int, judge: Judge) -> Cost:
    """What a version's controller took, and how good its masks are."""
    places = os.pathsep.join(str(root / part) for part in ("src", "benchmarks"))
    with tempfile.TemporaryDirectory() as scratch:
        masks = Path(scratch) / "masks.pt"
        words = [sys.executable, "-c", SIDE, spec, str(tokens), str(seed), str(masks)]
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": places}, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]) | judge(torch.load(masks))  # type: ignore[no-any-return]


class Judge:
    """How far masks take the model from the dense one."""

    def __init__(self) -> None:
        loaded = uniprune.load(smollm2(), dtype=dtype_name(FAST), device="cpu")
        self._model, self._matrices = loaded.model, find_matrices(loaded.model)
        self._windows = load_windows(HELD_OUT, loaded.tokenizer, use="evaluation", length=512, count=12)
        with Recording(self._model, self._windows) as self._dense:
            perplexity(self._model, self._windows)

    def __call__(self, masks: Masks) -> Cost:
        with masking.applied(self._matrices, masks), Recording(self._model, self._windows) as here:
            found = perplexity(self._model, self._windows).perplexity
        return {"kl": closeness(here, self._dense, self._windows).kl, "perplexity": found}


def keep(row: Row) -> None:
    key = ("other_version", "pattern", "budget", "seed")
    rows = [other for other in load("versions").get("rows", []) if any(other[name] != row[name] for name in key)]
    save("versions", {"held_out": HELD_OUT.name, "rows": [*rows, row]})
    print(row, flush=True)


if __name__ == "__main__":
    main()
