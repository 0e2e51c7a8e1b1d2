"""What pruning takes that does not hold the whole model: memory, time, disk, and several processes.

    python benchmarks/scale.py [PART ...] [--scratch FOLDER] [--rounds N] [--text T] [--max-memory SIZE]

- local: Wanda's 2:4 masks of a model of 1.1e9 and one of 3e9 weights, within 1.5 GB.
- step: the same with one step of the controller, within 2.5 GB.
- depth: both on 8, 16 and 32 blocks of one width; memory must not grow with the depth.
- sweep: SmolLM2 held whole against streamed, time and masks.
- apply: writing the pruned checkpoint of 3e9 weights against `cp -r`, both until the disk has it.
- forecast: what uniprune expects of Llama models of 7e9, 70e9 and 405e9 weights, bfloat16; nothing is run.
- ranks: two processes of one thread each (torchrun) against one of two threads, time and masks.

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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shards
from common import load, save, smollm2_folder
from uniprune.artefacts.masks import MasksFile
from uniprune.artefacts.writer import MASKS, checkpoint_bytes
from uniprune.checkpoints.origin import Origin
from uniprune.errors import InputError
from uniprune.job.estimate import needs
from uniprune.models.matrices import find_matrices
from uniprune.storage.files import REPORT, check_disk_space, new_folder

UNIPRUNE = ["-m", "uniprune.cli.main"]
RUNS = {"local": ["--controller", "none"], "step": ["--controller", "feedback", "--steps", "1"]}
LIMITS = {"local": "1.5GB", "step": "2.5GB"}
# Less than the smallest of these models takes when it is held whole; `streamed` tells when that is no longer so.
DEPTH_LIMITS = {"local": "0.9GB", "step": "1.5GB"}
SWEEP_LIMIT = "1GB"
BLOCKS = (8, 16, 32)
STEP_TOKENS = 16_384  # of a step that is worth two readings of a large model
LLAMAS: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
RANKS = 2
INTERVAL = 0.01  # seconds between two looks at a process
KINDS = ("RssAnon", "RssShmem", "RssFile")

Row = dict[str, Any]
Cost = dict[str, float]


class Failed(Exception):
    """A command that was to be measured went wrong; the message is what it wrote to stderr."""


def memory(process: int) -> dict[str, int]:
    """Bytes that a process has resident, by kind; zeros once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {kind: int(found.get(kind, "0").split()[0]) * 1024 for kind in KINDS}


def measured(command: list[str], threads: int | None = None, synced: bool = False) -> Cost:
    """Wall seconds and peaks of a command; ``synced``: the time ends when the disk has all that it wrote."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    os.sync()  # what earlier runs wrote is not to slow this one down
    peak = mapped = 0
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                now = memory(process.pid)
                peak, mapped = max(peak, now["RssAnon"] + now["RssShmem"]), max(mapped, now["RssFile"])
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
    return {"seconds": seconds, "peak_bytes": peak, "file_bytes": mapped}


def verb(*arguments: str) -> Cost:
    return measured([sys.executable, *UNIPRUNE, *arguments])


def flags(limit: str | None) -> list[str]:
    return ["--max-memory", limit] if limit else []


def streamed(model: Path, recipe: Mapping[str, str], limit: str | None) -> None:
    """Raises Failed if a run would hold the model whole, and so not be what is to be measured."""
    if limit is None:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.writelines(f"{setting}: {value}\n" for setting, value in recipe.items())
        file.flush()
        command = [sys.executable, *UNIPRUNE, "plan", str(model), "--config", file.name, *flags(limit), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr)
    if json.loads(done.stdout)["execution"] == "resident":
        raise Failed(f"{model.name} fits whole into {limit}; lower the limit")


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

    def __init__(self, scratch: Path, rounds: int, text: str, limit: str | None, tiny: bool) -> None:
        self.scratch, self.rounds, self.text, self.limit, self.tiny = scratch, rounds, text, limit, tiny
        self.models = ("tiny",) if tiny else ("1b", "3b")

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
        limits = {"resident": None, "streamed": self.limited(SWEEP_LIMIT)}
        if not self.tiny:
            streamed(model, {"controller": "none"}, limits["streamed"])

        def side(folder: Path, name: str) -> Cost:
            def calibrate(windows: int) -> Cost:
                arguments = [*RUNS["local"], *self.windows(windows), *flags(limits[name])]
                return verb(
                    "calibrate", str(model), *arguments, "-o", str(folder / f"scores-{name}.safetensors"), "--overwrite"
                )

            one, many = calibrate(1), calibrate(64)
            return many | {"calibrate_seconds": many["seconds"] - one["seconds"]}

        with self.outputs() as folder:
            costs = alternate(self.rounds, {name: partial(side, folder, name) for name in limits})
            masks = {name: folder / f"masks-{name}.safetensors" for name in limits}
            for name in limits:
                verb("mask", str(folder / f"scores-{name}.safetensors"), "-s", "2:4", "-o", str(masks[name]))
            differ = differing(masks["resident"], masks["streamed"])
        yield {
            "part": "sweep",
            "model": model.name,
            "limit": limits["streamed"],
            **{name: summary(costs[name]) for name in limits},
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
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        masks = {name: self.scratch / f"masks-{name}.safetensors" for name in ("one", "ranks")}
        for run, settings in {"feedback": ["--steps", "8"], "none": []}.items():
            arguments = ["--controller", run, *settings, *self.windows(64)]
            one = partial(self.prune, model, arguments, masks["one"], threads=RANKS)
            ranks = partial(self.prune, model, arguments, masks["ranks"], launcher=torchrun, threads=1)
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

    def forecast(self) -> Iterator[Row]:
        for name, shape in LLAMAS.items():
            config = LlamaConfig(**shape, tie_word_embeddings=False)
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            matrices = find_matrices(model)
            row: Row = {"part": "forecast", "model": name, "parameters": sum(p.numel() for p in model.parameters())}
            for run in RUNS:
                controller = RUNS[run][1]
                needed = needs(model, matrices, torch.bfloat16, controller, STEP_TOKENS, mapped=True)
                row |= {f"{run}_{key}": value for key, value in asdict(needed).items()}
            yield row

    def within(self, run: str, model: Path, masks: Path | None = None, limits: Mapping[str, str] = LIMITS) -> Row:
        """2:4 masks of a model within the memory of a kind of run."""
        limit = self.limited(limits[run])
        if not self.tiny:
            streamed(model, {"controller": RUNS[run][1], "dtype": "bfloat16"}, limit)
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

    def windows(self, count: int) -> list[str]:
        return ["--text", self.text, "--windows", str(count), "--length", "64" if self.tiny else "512"]

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
        return tuple(of.get(name) for name in ("part", "model", "blocks", "run"))

    save("scale", {"rows": [other for other in load("scale").get("rows", []) if key(other) != key(row)] + [row]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--max-memory")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # does it work at all? Records nothing
    chosen = parser.parse_args()
    parts = ("forecast", "local", "step", "depth", "sweep", "apply", "ranks")
    if unknown := set(chosen.parts) - set(parts):
        raise SystemExit(f"no part {', '.join(unknown)}; they are {', '.join(parts)}")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = chosen.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        bench = Bench(scratch, chosen.rounds, chosen.text, chosen.max_memory, chosen.tiny)
        for part in chosen.parts or parts:
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
