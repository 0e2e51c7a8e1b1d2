"""Mutated files for every reader, by the hundred thousand; writes results/fuzz.json, and what it finds into tests/corpus.

python benchmarks/fuzz.py [--cases 100000] [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

from common import ROOT, peak_memory, save

sys.path.insert(0, str(ROOT / "tests"))

import fuzzing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before = peak_memory()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "fuzz"
        folder.mkdir()
        outcomes = fuzzing.fuzz(folder, options.cases, options.seed)
    rows = []
    for name, outcome in outcomes.items():
        for content, problem in outcome.failures.values():
            print(f"{name}: {problem}")
            (ROOT / "tests" / "corpus" / name).mkdir(parents=True, exist_ok=True)
            (ROOT / "tests" / "corpus" / name / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)
        row = {"reader": name, "cases": outcome.cases, "refused": outcome.refused, "failures": len(outcome.failures)}
        rows.append(row | {"seconds": round(outcome.seconds, 1), "slowest": round(outcome.slowest, 3)})
    grown = peak_memory() - before
    save("fuzz", {"seed": options.seed, "cases": sum(row["cases"] for row in rows), "peak_growth_bytes": grown, "rows": rows})
    sys.exit(any(row["failures"] for row in rows))


if __name__ == "__main__":
    main()
