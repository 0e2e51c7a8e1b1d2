"""What it costs to ask for help: processor time of `uniprune --help`; writes results/startup.json.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

from common import save

LIMIT = 0.3  # seconds
WORDS = ([], ["--help"], ["prune", "--help"])


def seconds(words: list[str]) -> float:
    """User and system time of one process."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "uniprune", *words], check=False, capture_output=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    rows = []
    for words in WORDS:
        seconds(words)  # what is imported is compiled once
        times = [seconds(words) for _ in range(9)]
        rows.append(
            {"command": " ".join(["uniprune", *words]), "median": round(median(times), 3), "least": round(min(times), 3)}
        )
        print(rows[-1], flush=True)
    save("startup", {"limit": LIMIT, "rows": rows})
    sys.exit(any(row["median"] > LIMIT for row in rows))


if __name__ == "__main__":
    main()
