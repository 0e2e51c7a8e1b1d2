"""A table of five methods by ``compare``: its time beside that of its parts, and what a kill costs. SmolLM2-135M.

    python benchmarks/comparison.py [--folder /tmp] [--measure go parts kills]

The parts: the model is loaded once, then each row is made for itself by ``prune_in_place`` (SparseGPT by its own function) and
``evaluate``, with the same settings; their numbers must be those of the table. Then the command is killed in the middle of a
row, twice, and resumed. Times are of the processor, since the machine may be shared; of commands they include Python's start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uniprune
from common import CALIBRATION, DATA, EVALUATION, load, relative, save, smollm2
from uniprune import Recipe
from uniprune.comparison.results import COMPARISON, Comparison, ComparisonRow
from uniprune.comparison.sparsegpt import sparsegpt
from uniprune.data.windows import load_windows
from uniprune.evaluation.generation import generate
from uniprune.models.loading import Loaded
from uniprune.models.masking import preserved
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns import spelling

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "feedback")
SPARSITIES = ("0.5", "2:4")
CALIBRATE = {"text": str(CALIBRATION), "windows": 16, "length": 128, "dtype": "float32"}
MEASURE = {"text": str(EVALUATION), "windows": 4, "length": 256}
TASKS = {"tasks": tuple(str(DATA / "zeroshot" / f"{name}.jsonl") for name in ("piqa", "arc_easy")), "limit": 8}
PROMPTS = {"prompts": ("The capital of France is",), "new_tokens": 8}
KILLED_WITH = (3, 9)  # rows that stand in the table
LATER = 4.0  # seconds of the processor after that: the next row is in the making


class Clock:
    """Seconds of this process's processor time that were spent inside ``with``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start


def in_one_go(output: Path) -> tuple[Comparison, float]:
    """The table, and the seconds of the processor that it took."""
    clock, measured = Clock(), {f"eval_{name}": value for name, value in MEASURE.items()}
    with clock():
        asked = {"methods": METHODS, "sparsities": SPARSITIES, **CALIBRATE, **measured, **TASKS, **PROMPTS}
        found = uniprune.compare(smollm2(), output, **asked)
    return found, clock.seconds


def in_parts(table: Comparison) -> tuple[list[float], float]:
    """Each row by itself: its perplexity, and the seconds of the processor in all."""
    clock, found = Clock(), []
    with clock():
        loaded = uniprune.load(smollm2(), dtype=CALIBRATE["dtype"])
    matrices = find_matrices(loaded.model)
    for row in table.rows:
        with preserved(matrices, matrices), clock():
            prune(loaded, row)
            asked = {"text_source": MEASURE["text"], "windows": MEASURE["windows"], "length": MEASURE["length"], **TASKS}
            found.append(uniprune.evaluate(loaded, **asked).perplexity)
            generate(loaded.model, loaded.tokenizer, PROMPTS["prompts"], PROMPTS["new_tokens"])
        print(f"{row.method} {row.pattern}: {found[-1]:.2f}, in the table {row.perplexity:.2f}", flush=True)
    return found, clock.seconds


def prune(loaded: Loaded, row: ComparisonRow) -> None:
    """As the row's own method does it, in memory."""
    if row.method == "sparsegpt":
        options = {"use": "calibration", "count": CALIBRATE["windows"], "length": CALIBRATE["length"]}
        windows = load_windows(CALIBRATE["text"], loaded.tokenizer, **options)
        sparsegpt(loaded.model, find_matrices(loaded.model), windows.tokens, spelling.parse(row.pattern))
    elif row.pattern:
        uniprune.prune_in_place(loaded, Recipe(**row.recipe | {"text": CALIBRATE["text"]}))


def interrupted(output: Path) -> tuple[Comparison, list[int], float]:
    """The table of a command that is killed and resumed, how many rows each kill left, the seconds of all processes."""
    rows, seconds, path = [], 0.0, output / COMPARISON
    for count in (*KILLED_WITH, None):
        words = [sys.executable, "-m", "uniprune", "compare", smollm2(), "-o", output, "--resume", *flags()]
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)
        before = path.read_text() if path.exists() else None
        if count is not None:
            wait_for(count, path, process.pid)
            process.send_signal(signal.SIGKILL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == (0 if count is None else -signal.SIGKILL), process.returncode
        seconds += used.ru_utime + used.ru_stime
        table = Comparison.read(path)
        if before:
            earlier = Comparison(**json.loads(before)).rows
            assert table.rows[: len(earlier)] == earlier, "a row was made again"
        rows.append(len(table.rows))
        print(f"{len(table.rows)} rows, {seconds:.0f} s", flush=True)
    return table, rows, seconds


def flags() -> list[Any]:
    given = {**CALIBRATE, **{f"eval-{name}": value for name, value in MEASURE.items()}}
    given |= {"tasks": ",".join(TASKS["tasks"]), "limit": TASKS["limit"], "new-tokens": PROMPTS["new_tokens"]}
    given |= {"methods": ",".join(METHODS), "sparsity": ",".join(SPARSITIES)}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [*words, *(word for prompt in PROMPTS["prompts"] for word in ("--prompt", prompt))]


def wait_for(count: int, path: Path, process: int) -> None:
    """Until so many rows are there, and the process has worked on the next one for a while."""
    while not path.exists() or len(Comparison.read(path).rows) < count:
        time.sleep(1)
    start = used_by(process)
    while used_by(process) < start + LATER:
        time.sleep(1)


def used_by(process: int) -> float:
    """Seconds of the processor."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--measure", nargs="*", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    results = load("comparison")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        for name in asked.measure:
            results |= PARTS[name](Path(folder) / name, results)
            save("comparison", {key: value for key, value in results.items() if key not in ("versions", "machine")})
            print({key: value for key, value in results.items() if key != "table"}, flush=True)


def measure_go(folder: Path, _: dict[str, Any]) -> dict[str, Any]:
    table, seconds = in_one_go(folder)
    return {"seconds": seconds, "table": anonymous(table.record())}


def measure_parts(_: Path, results: dict[str, Any]) -> dict[str, Any]:
    table = Comparison(**results["table"])
    alone, seconds = in_parts(table)
    return {"seconds_of_parts": seconds, "differ_alone": differing(table, alone)}


def measure_kills(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    table, kills, seconds = interrupted(folder)
    differ = differing(Comparison(**results["table"]), [row.perplexity for row in table.rows])
    return {"seconds_killed_and_resumed": seconds, "killed_with_rows": kills[:-1], "differ_resumed": differ}


PARTS = {"go": measure_go, "parts": measure_parts, "kills": measure_kills}


def differing(table: Comparison, values: list[float]) -> int:
    """How many rows have another perplexity."""
    return sum(row.perplexity != value for row, value in zip(table.rows, values, strict=True))


def anonymous(value: Any) -> Any:
    """Without this machine's folders."""
    if isinstance(value, dict):
        return {anonymous(key): anonymous(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(anonymous, value))
    return relative(value) if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    main()
