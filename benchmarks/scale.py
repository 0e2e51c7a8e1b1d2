"""What pruning takes that does not hold the whole model: memory, time, disk, and several processes.

    python benchmarks/scale.py [PART ...] [--scratch FOLDER] [--rounds N] [--text T] [--max-memory SIZE]
                               [--size SIZE ...] [--other FOLDER]

- local: Wanda's 2:4 masks of a model of 1.1e9 and one of 3e9 weights, within 1.5 GB.
- step: the same with one step of the controller, within 2.5 GB.
- depth: both on 8, 16 and 32 blocks of one width; memory must not grow with the depth.
- sweep: SmolLM2 held whole against streamed, time and masks.
- apply: writing the pruned checkpoint of 3e9 weights against `cp -r`, both until the disk has it.
- ranks: two processes of one thread each (torchrun) against one of two threads, time and masks.
- shared: one, two and four processes of one thread each, which divide the controller's state: memory of each, and time.
- versions: a streamed step of 16,384 tokens beside that of 3cca470, the version that issues compare with: time, memory, bytes.
  Only with --other, a checkout of it. An hour and a half at 1e9 weights and 3e9; --size takes one of them.
- mask: `uniprune mask` of SmolLM2 from a scores file beside that of 3cca470, start-up included. Only with --other.

Every run is a process of its own, looked at every 10 ms: its peak is that of anonymous and shared memory; pages of mapped
files, which the system may drop, stand beside it. Sides of a ratio alternate, because the machine's speed drifts; the median
counts. Rows accumulate in results/scale.json. --scratch keeps the checkpoints for the next time (10 GB; outputs take as much
again and more, for a while); --max-memory stands in for each part's own limit (none: no limit is set).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import shards
from common import load, save, smollm2_folder
from uniprune.artefacts.masks import MasksFile
from uniprune.artefacts.writer import MASKS, checkpoint_bytes
from uniprune.checkpoints.origin import Origin
from uniprune.errors import InputError
from uniprune.storage.files import REPORT, check_disk_space, new_folder

UNIPRUNE = ["-m", "uniprune.cli.main"]
STREAMED = ["--execution", "streamed"]
RUNS = {
    "local": ["--controller", "none", *STREAMED],
    "step": ["--controller", "feedback", "--steps", "1", "--set", "batch_tokens=4096", *STREAMED],
}
LIMITS = {"local": "1.5GB", "step": "2.5GB"}
DEPTH_LIMITS = {"local": "0.9GB", "step": "1.5GB"}
BLOCKS = (8, 16, 32)
STEP_TOKENS = 16_384
# Version 3cca470 has no option for the tokens of a step: 1,024, a number that no other default has.
OTHER = f"""
import runpy, sys
from uniprune.mirror_descent import MirrorDescent as Controller
first = Controller.__init__
first.__defaults__ = tuple({STEP_TOKENS} if value == 1024 else value for value in first.__defaults__)
sys.argv[0] = "uniprune"
runpy.run_module("uniprune", run_name="__main__")
"""
VERSION_LIMITS = {"1b": "3GB", "3b": "5GB", "tiny": "800MB"}
RANKS, PROCESSES = 2, (1, 2, 4)
INTERVAL = 0.01  # seconds between two looks at a process
KINDS = ("RssAnon", "RssShmem", "RssFile")

Row = dict[str, Any]
Cost = dict[str, float]


class Failed(Exception):
    """A command that was to be measured went wrong; the message is what it wrote to stderr."""


def memory(process: int) -> dict[str, int]:
    """Bytes that a process has resident, by kind; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    found = dict(line.split(":", 1) for line in lines)
    return {kind: int(found.get(kind, "0").split()[0]) * 1024 for kind in KINDS}


def started(process: int) -> list[int]:
    """The processes that ``torchrun`` has started."""
    return [int(found) for found in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def moved(process: int) -> dict[str, int]:
    """Bytes that a process has read and written by calls, whether or not the disk was needed; none once it has ended."""
    try:
        found = dict(line.split(":", 1) for line in Path(f"/proc/{process}/io").read_text().splitlines())
    except OSError:
        found = {}
    return {"read_bytes": int(found.get("rchar", 0)), "written_bytes": int(found.get("wchar", 0))}


def measured(
    command: list[str], threads: int | None = None, synced: bool = False, environment: Mapping[str, str] = os.environ
) -> Cost:
    """Wall seconds, peaks and bytes moved of a command, of torchrun's the largest process's; ``synced``: the time ends when the
    disk has all that it wrote."""
    environment = {**environment, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    os.sync()  # what earlier runs wrote is not to slow this one down
    peak = mapped = 0
    bytes_moved = dict.fromkeys(("read_bytes", "written_bytes"), 0)
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                for each in started(process.pid) if "torch.distributed.run" in command else [process.pid]:
                    now = memory(each)
                    peak, mapped = max(peak, now["RssAnon"] + now["RssShmem"]), max(mapped, now["RssFile"])
                    bytes_moved |= {key: max(bytes_moved[key], size) for key, size in moved(each).items()}
                time.sleep(INTERVAL)
        finally:
            process.terminate()  # only if we are interrupted is it still there; torchrun ends its own processes then
            process.wait()
        if synced:
            os.sync()
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise Failed(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read()}")
    return {"seconds": seconds, "peak_bytes": peak, "file_bytes": mapped, **bytes_moved}


def verb(*arguments: str) -> Cost:
    return measured([sys.executable, *UNIPRUNE, *arguments])


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def flags(limit: str | None) -> list[str]:
    return ["--max-memory", limit] if limit else []


def alternate(rounds: int, sides: Mapping[str, Callable[[], Cost]]) -> dict[str, list[Cost]]:
    """The costs of each side, round by round; every other round in reverse."""
    costs: dict[str, list[Cost]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in list(sides)[:: -1 if turn % 2 else 1]:
            costs[side].append(sides[side]())
            print(side, costs[side][-1], file=sys.stderr, flush=True)
    return costs


def summary(costs: list[Cost]) -> Cost:
    """Median seconds, highest peaks."""
    return {key: (max if key.endswith("bytes") else statistics.median)([cost[key] for cost in costs]) for key in costs[0]}


def ratio(above: list[Cost], below: list[Cost], key: str) -> float:
    """Median over rounds of the one side's cost through the other's."""
    return statistics.median(one[key] / other[key] for one, other in zip(above, below, strict=True))


def differing(one: Path, other: Path) -> float:
    """Fraction of the masks' bits that two files do not share."""
    first, second = MasksFile(one), MasksFile(other)
    if first.shapes != second.shapes:
        raise Failed(f"{one} and {other} do not mask the same matrices")
    differ = sum(int((mask != second[name]).sum()) for name, mask in first.items())
    return differ / sum(rows * columns for rows, columns in first.shapes.values())


class Bench:
    """The checkpoints, and a method for each part that yields its rows."""

    def __init__(self, scratch: Path, chosen: argparse.Namespace) -> None:
        self.scratch, self.rounds, self.text, self.limit = scratch, chosen.rounds, chosen.text, chosen.max_memory
        self.tiny, self.other = chosen.tiny, chosen.other
        self.models = ("tiny",) if chosen.tiny else tuple(chosen.size)

    def local(self) -> Iterator[Row]:
        for model in self.models:
            yield {"part": "local", "model": model, **self.within("local", self.shards(model), self.masks(model))}

    def step(self) -> Iterator[Row]:
        for model in self.models:
            yield {"part": "step", "model": model, **self.within("step", self.shards(model))}

    def depth(self) -> Iterator[Row]:
        model = "tiny" if self.tiny else "width"
        for run in RUNS:
            first = 0.0
            for blocks in BLOCKS:
                row = self.within(run, self.shards(model, blocks), limits=DEPTH_LIMITS)
                first = first or row["peak_bytes"]
                grown = row["peak_bytes"] / first - 1
                yield {"part": "depth", "model": model, "blocks": blocks, "run": run, **row, "growth": grown}

    def sweep(self) -> Iterator[Row]:
        """Seconds of calibration are those that 64 windows take beyond one: start, loading and writing cancel."""
        model = self.smollm2()
        sides = ("resident", "streamed")

        def side(folder: Path, name: str) -> Cost:
            def calibrate(windows: int) -> Cost:
                arguments = ["--controller", "none", "--execution", name, *self.windows(windows), "--overwrite"]
                return verb("calibrate", str(model), *arguments, "-o", str(folder / f"scores-{name}.safetensors"))

            one, many = calibrate(1), calibrate(64)
            return many | {"calibrate_seconds": many["seconds"] - one["seconds"]}

        with self.outputs() as folder:
            costs = alternate(self.rounds, {name: partial(side, folder, name) for name in sides})
            masks = {name: folder / f"masks-{name}.safetensors" for name in sides}
            for name in sides:
                verb("mask", str(folder / f"scores-{name}.safetensors"), "-s", "2:4", "-o", str(masks[name]))
            differ = differing(masks["resident"], masks["streamed"])
        yield {
            "part": "sweep",
            "model": model.name,
            **{name: summary(costs[name]) for name in sides},
            "ratio": ratio(costs["streamed"], costs["resident"], "calibrate_seconds"),
            "process_ratio": ratio(costs["streamed"], costs["resident"], "seconds"),
            "differing_bits": differ,
        }

    def apply(self) -> Iterator[Row]:
        model = self.models[-1]
        source, masks = self.shards(model), self.masks(model)
        if not masks.exists():
            self.within("local", source, masks)
        size = checkpoint_bytes(Origin(model, source))
        check_disk_space(self.scratch / "outputs", 3 * size)

        def written(*command: str) -> Cost:
            with self.outputs() as folder:
                return measured([*command, str(folder / "out")], synced=True)

        apply = partial(written, sys.executable, *UNIPRUNE, "apply", str(source), str(masks), "-o")
        costs = alternate(self.rounds, {"apply": apply, "copy": partial(written, "cp", "-r", str(source))})
        speeds = {f"{name}_bytes_per_second": size / summary(costs[name])["seconds"] for name in costs}
        faster = ratio(costs["copy"], costs["apply"], "seconds")
        yield {"part": "apply", "model": model, "bytes": size, **speeds, "ratio": faster, **summary(costs["apply"])}

    def ranks(self) -> Iterator[Row]:
        """Seconds of pruning are those of every stage but preparing and writing, as the reports have them."""
        model = self.smollm2()
        masks = {name: self.scratch / f"masks-{name}.safetensors" for name in ("one", "ranks")}
        for run, settings in {"feedback": ["--steps", "8"], "none": []}.items():
            arguments = ["--controller", run, *settings, *self.windows(64)]
            one = partial(self.prune, model, arguments, masks["one"], threads=RANKS)
            ranks = partial(self.prune, model, arguments, masks["ranks"], launcher=torchrun(RANKS), threads=1)
            costs = alternate(self.rounds, {"one": one, "ranks": ranks})
            yield {
                "part": "ranks",
                "model": model.name,
                "run": run,
                **{name: {key: summary(costs[name])[key] for key in ("seconds", "pruning_seconds")} for name in costs},
                "ratio": ratio(costs["ranks"], costs["one"], "pruning_seconds"),
                "process_ratio": ratio(costs["ranks"], costs["one"], "seconds"),
                "differing_bits": differing(masks["one"], masks["ranks"]),
            }

    def shared(self) -> Iterator[Row]:
        model = "tiny" if self.tiny else "width"
        blocks = BLOCKS[0]
        steps = ["--steps", "1", "--set", "batch_tokens=1024", "--set", "checks=1", "--dtype", "bfloat16"]
        arguments = ["--execution", "resident", *steps, *self.windows(5)]
        for count in PROCESSES:
            cost = self.prune(self.shards(model, blocks), arguments, launcher=torchrun(count), threads=1)
            yield {"part": "shared", "model": model, "blocks": blocks, "processes": count, **cost}

    def versions(self) -> Iterator[Row]:
        """Both sides take Wanda's scores on 36 samples, one step on 32 of them, and judge by the others before and after."""
        step = ["--set", f"batch_tokens={STEP_TOKENS}", *STREAMED]
        both = self.both()
        sides = {"this": (UNIPRUNE, step, os.environ), "other": (["-c", OTHER], [], both["other"][1])}
        for model in self.models:
            limit = self.limited(VERSION_LIMITS[model])
            shared = ["-s", "2:4", "--controller", "feedback", "--steps", "1", "--dtype", "bfloat16", *flags(limit)]
            shared += self.windows(STEP_TOKENS // self.length + 4)

            def side(name: str, model: str = model, shared: list[str] = shared) -> Cost:
                start, own, environment = sides[name]
                with self.outputs() as folder:
                    command = [*start, "prune", str(self.shards(model)), *shared, *own, "-o", str(folder / "out")]
                    return measured([sys.executable, *command], environment=environment)

            costs = alternate(self.rounds, {name: partial(side, name) for name in sides})
            keys = ("seconds", "peak_bytes", "read_bytes", "written_bytes")
            ratios = {f"{key}_ratio": ratio(costs["this"], costs["other"], key) for key in keys}
            yield {
                "part": "versions",
                "model": model,
                "limit": limit,
                **ratios,
                **{side: summary(costs[side]) for side in costs},
            }

    def mask(self) -> Iterator[Row]:
        """Each version cuts the scores that it has written itself; magnitudes, for the time does not depend on them."""
        sides = self.both()
        with self.outputs() as folder:
            for name, (start, environment) in sides.items():
                scored = ["calibrate", str(self.smollm2()), "--metric", "magnitude", "--controller", "none", *self.windows(8)]
                command = [sys.executable, *start, *scored, "-o", str(folder / f"{name}.safetensors")]
                measured(command, environment=environment)

            def side(name: str, pattern: str) -> Cost:
                start, environment = sides[name]
                cut = ["mask", str(folder / f"{name}.safetensors"), "-s", pattern, "-o", str(folder / "cut.safetensors")]
                return measured([sys.executable, *start, *cut, "--overwrite"], environment=environment)

            for pattern in ("2:4", "0.5"):
                costs = alternate(self.rounds, {name: partial(side, name, pattern) for name in sides})
                key = {"part": "mask", "model": "smollm2", "run": pattern}
                yield (
                    key
                    | {"seconds_ratio": ratio(costs["this"], costs["other"], "seconds")}
                    | {name: summary(cost) for name, cost in costs.items()}
                )

    def both(self) -> dict[str, tuple[list[str], Mapping[str, str]]]:
        """How this version and the other are started, and with which environment."""
        if not self.other:
            raise Failed("this part needs --other FOLDER, a checkout of the version to compare with")
        elsewhere = os.environ | {"PYTHONPATH": str(self.other.resolve() / "src")}
        return {"this": (UNIPRUNE, os.environ), "other": (["-m", "uniprune"], elsewhere)}

    def within(self, run: str, model: Path, masks: Path | None = None, limits: Mapping[str, str] = LIMITS) -> Row:
        """2:4 masks of a model within the memory of a kind of run."""
        limit = self.limited(limits[run])
        arguments = [*RUNS[run], *self.windows(8), "--dtype", "bfloat16", *flags(limit)]
        return {"limit": limit, **self.prune(model, arguments, masks)}

    def prune(
        self,
        model: Path,
        arguments: list[str],
        masks: Path | None = None,
        launcher: list[str] | None = None,
        threads: int | None = None,
    ) -> Cost:
        """Prunes to 2:4 and keeps of the output no more than the masks, and those only if they are wanted."""
        with self.outputs() as folder:
            out = folder / "out"
            command = [*(launcher or []), *UNIPRUNE, "prune", str(model), "-s", "2:4", *arguments, "-o", str(out)]
            cost = measured([sys.executable, *command], threads)
            stages = json.loads((out / REPORT).read_text())["seconds"]
            if masks:
                os.replace(out / MASKS, masks)
        pruning = sum(seconds for stage, seconds in stages.items() if stage not in ("prepare", "write"))
        return cost | {"pruning_seconds": pruning}

    @contextmanager
    def outputs(self) -> Iterator[Path]:
        """An empty folder for what runs write; it goes with all that lies there, also what a run that failed left behind."""
        folder = self.scratch / "outputs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    @property
    def length(self) -> int:
        return 64 if self.tiny else 512

    def windows(self, count: int) -> list[str]:
        return ["--text", self.text, "--windows", str(count), "--length", str(self.length)]

    def limited(self, limit: str) -> str | None:
        """A part's own limit, or what the command line says instead."""
        chosen = self.limit or limit
        return None if chosen == "none" else chosen

    def masks(self, model: str) -> Path:
        """Where the part `local` leaves its masks for `apply`."""
        return self.scratch / f"masks-{model}.safetensors"

    def shards(self, size: str, blocks: int | None = None) -> Path:
        folder = self.scratch / (f"{size}-{blocks}" if blocks else size)
        if not folder.exists():
            shards.write(folder, size, blocks)
        return folder

    def smollm2(self) -> Path:
        """SmolLM2 as a Hugging Face folder, float32."""
        if self.tiny:
            return self.shards("tiny")
        folder = self.scratch / "SmolLM2-135M"
        if not folder.exists():
            with new_folder(folder) as partial:
                smollm2_folder(partial, "float32")
        return folder


def keep(row: Row) -> None:
    """Puts a row in the place of the one before it, if there is one."""

    def key(of: Row) -> tuple[Any, ...]:
        return tuple(of.get(name) for name in ("part", "model", "blocks", "run", "processes"))

    save("scale", {"rows": [other for other in load("scale").get("rows", []) if key(other) != key(row)] + [row]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--max-memory")
    parser.add_argument("--size", nargs="+", default=["1b", "3b"])
    parser.add_argument("--other", type=Path)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # does it work at all? Records nothing
    chosen = parser.parse_args()
    parts = ("local", "step", "depth", "sweep", "apply", "ranks", "shared", "versions", "mask")
    if unknown := set(chosen.parts) - set(parts):
        raise SystemExit(f"no part {', '.join(unknown)}; they are {', '.join(parts)}")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = chosen.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        bench = Bench(scratch, chosen)
        for part in chosen.parts or [part for part in parts if part not in ("versions", "mask") or chosen.other]:
            try:
                for row in getattr(bench, part)():
                    print(json.dumps(row), flush=True)
                    if not chosen.tiny:
                        keep(row)
            except (Failed, InputError) as error:
                print(f"{part}: {error}", file=sys.stderr, flush=True)
                failed.append(part)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
