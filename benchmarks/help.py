"""How long `uniprune --help` and `uniprune prune --help` take, in seconds of CPU time: results/help.json.

    python benchmarks/help.py [SRC of another version, which is then measured in turn with this one]

The best of the rounds counts, user and system time together: what else a machine does only adds to it. `bare` is Python alone.
Which imports take it: python -X importtime -m uniprune prune --help
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, save

ROUNDS = 15
COMMANDS = {"bare": ["-c", ""], "--help": ["-m", "uniprune", "--help"], "prune --help": ["-m", "uniprune", "prune", "--help"]}


def main() -> None:
    sources = {"this": ROOT / "src"}
    if sys.argv[1:]:
        sources["other"] = Path(sys.argv[1])
    seconds: dict[str, dict[str, float]] = {name: {} for name in sources}
    for _ in range(ROUNDS):
        for command, words in COMMANDS.items():
            for name, source in sources.items():
                seconds[name][command] = min(cpu_seconds(words, source), seconds[name].get(command, float("inf")))
    save("help", {"rounds": ROUNDS, "cpu_seconds": seconds})
    print(seconds)


def cpu_seconds(words: Sequence[str], source: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(words, source)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 3)


def run(words: Sequence[str], source: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(source)}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)


if __name__ == "__main__":
    main()
