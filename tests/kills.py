"""Commands that are killed again and again, and in the end have written what an undisturbed one writes."""

from __future__ import annotations

import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import processes
import uniprune
from processes import Done, Forked, die, touches
from uniprune import Recipe
from uniprune.storage import runs

CASES = [
    ("prune", "resident"),
    ("prune", "recomputed"),
    ("prune", "streamed"),
    ("calibrate", "resident"),
    ("calibrate", "streamed"),
    ("apply", ""),
]
SMALL = {"windows": 8, "length": 16, "steps": 4, "dtype": "float32"}
KILLED = -9


@dataclass
class Victim:
    """A command on the tiny model in ``folder``; it works in ``place``."""

    place: Path
    folder: Path
    command: str
    execution: str

    def __post_init__(self) -> None:
        suffix = ".safetensors" if self.command == "calibrate" else ""
        self.whole, self.out = self.place / f"whole{suffix}", self.place / f"out{suffix}"
        if self.command == "apply":
            recipe = Recipe(sparsity="2:4", controller="none", **SMALL)
            uniprune.prune(str(self.folder), recipe, self.place / "pruned")
            self.words = [self.command, self.folder, self.place / "pruned" / "pruning" / "masks.safetensors", "--overwrite"]
        else:
            flags = [word for flag, value in SMALL.items() for word in (f"--{flag}", value)]
            flags += ["--execution", self.execution]
            self.words = [self.command, self.folder, "-s", "2:4", *flags, "--resume"]

    def run(self, output: Path, moment: int | None = None, seconds: float | None = None) -> Done:
        """Runs it, and kills it when it is about to change the disk for the ``moment``-th time, or after ``seconds``."""
        return Forked(_run, self.place, moment, [*self.words, "-o", output]).wait(seconds)

    def compare(self) -> None:
        """What it wrote, with what an undisturbed run wrote; nothing else is left. Takes it away."""
        for file in sorted(self.whole.rglob("*.safetensors")) if self.whole.is_dir() else [self.whole]:
            assert (self.out / file.relative_to(self.whole)).read_bytes() == file.read_bytes()
        assert not list(self.place.glob(".*"))
        shutil.rmtree(self.out) if self.out.is_dir() else self.out.unlink()


def _run(place: Path, moment: int | None, words: list[Any]) -> None:
    runs.Pace.due = lambda self: True  # type: ignore[method-assign]  # every step is committed
    count = 0

    def touched(number: int) -> None:
        nonlocal count
        count = number
        if number == moment:
            die()

    touches(place, touched)
    try:
        processes.command(*words)
    finally:
        sys.stderr.write(f"{count}\n")


class Outcome(NamedTuple):
    """How often it was killed, and how often it ended undisturbed and had written the right bytes."""

    kills: int
    ends: int


def survive(victim: Victim, kills: int, seed: int = 0, timed: bool = False) -> Outcome:
    """Kills it ``kills`` times, just before random changes of the disk or, ``timed``, after random times; then lets it end."""
    began = time.monotonic()
    done = victim.run(victim.whole)
    takes = time.monotonic() - began
    assert done.code == 0, done.err
    changes, draw, ends = int(done.err.splitlines()[-1]), random.Random(seed), 0

    def end(**moment: Any) -> bool:
        """Whether it came to its end."""
        done = victim.run(victim.out, **moment)
        assert done.code in (0, KILLED), done.err
        if done.code == 0:
            victim.compare()
        elif victim.out.is_dir():  # an output is there as a whole or not at all
            assert (victim.out / "pruning.json").is_file()
        return done.code == 0

    left = kills
    while left:
        ended = end(seconds=draw.uniform(0, takes)) if timed else end(moment=draw.randint(0, changes))
        left, ends = left - (not ended), ends + ended
    assert end()
    return Outcome(kills, ends + 1)
