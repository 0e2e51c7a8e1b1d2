"""What the tests do a few times, by the thousand; writes results/soak.json, part by part.

python benchmarks/soak.py [kills] [files] [examples] [--seed 0]

kills: commands are killed a thousand times and go on, half of them just before a random change of the disk, half after a random
time. files: 100,000 mutated files for every reader; what does harm goes into tests/corpus. examples: the properties that the
tests try on 40 examples each, on 2000.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, load, peak_memory, save

# What the tests share is imported where it is used: each process that is killed begins with the imports of this file.
sys.path.insert(0, str(ROOT / "tests"))

KILLS, FILES = 1000, 100_000


def kills(seed: int) -> dict[str, Any]:
    """Every command as often, resident and streamed."""
    import processes
    from conftest import write_folder
    from kills import CASES, Victim, survive

    rows = []
    for case, timed in itertools.product(CASES, (False, True)):
        with tempfile.TemporaryDirectory() as place:
            victim, began = Victim(Path(place), write_folder(Path(place) / "model"), *case), time.perf_counter()
            found = survive(victim, KILLS // (2 * len(CASES)), seed, timed)
        row = {"command": " ".join(case).strip(), "moments": "times" if timed else "changes of the disk", **found._asdict()}
        rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
        print(rows[-1], flush=True)
    processes.end()
    return {"kills": sum(row["kills"] for row in rows), "rows": rows}


def files(seed: int) -> dict[str, Any]:
    """Mutated files, the same number for each reader."""
    before, rows = peak_memory(), []
    import fuzzing

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "fuzz"
        folder.mkdir()
        outcomes = fuzzing.fuzz(folder, FILES, seed)
    for name, outcome in outcomes.items():
        for content, problem in outcome.failures.values():
            print(f"{name}: {problem}")
            (ROOT / "tests" / "corpus" / name).mkdir(parents=True, exist_ok=True)
            (ROOT / "tests" / "corpus" / name / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)
        row = {"reader": name, "cases": outcome.cases, "refused": outcome.refused, "failures": len(outcome.failures)}
        rows.append(row | {"seconds": round(outcome.seconds, 1), "slowest": round(outcome.slowest, 3)})
    return {"cases": sum(row["cases"] for row in rows), "peak_growth_bytes": peak_memory() - before, "rows": rows}


class Counter:
    """A plugin of pytest that counts how tests end."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed += 1


def examples(seed: int) -> dict[str, Any]:
    """The tests of properties, with many more examples each."""
    import pytest
    from hypothesis import settings

    counter, began = Counter(), time.perf_counter()
    options = ["-q", "-m", "hypothesis", "--hypothesis-profile", "soak", "--hypothesis-seed", str(seed)]
    pytest.main([*options, str(ROOT / "tests")], plugins=[counter])
    found = {"properties": counter.passed, "examples_each": settings.get_profile("soak").max_examples}
    found |= {"failures": counter.failed}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {"kills": kills, "files": files, "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = []
    for part in options.parts or PARTS:
        found = PARTS[part](options.seed)
        save("soak", load("soak") | {part: {"seed": options.seed, **found}})
        if found.get("failures") or any(row.get("failures") for row in found.get("rows", [])):
            failed.append(part)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
