"""A step of the controller that keeps the activations of all blocks, and one that computes them again, block by block.

    python benchmarks/recompute.py [--size SIZE ...] [--blocks N] [--tokens N] [--rounds N] [--steps N] [--record]

A Llama of random weights in bfloat16; each side is a process of its own, and the sides alternate, because the machine's speed
drifts. Seconds are of the processor, since others may work on the machine. A peak is the most that is resident while a step
runs, beyond what is resident before it: weights, states, libraries. Beside it stand the forecast of all that, and the most that
the process ever had. Masks of both sides are compared bit by bit. --record adds rows to results/recompute.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import load, save
from shards import SIZES, STD
from uniprune import Recipe
from uniprune.controller.descent import loop
from uniprune.controller.descent.position import Position
from uniprune.controller.descent.teacher import TeacherCache
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.opening import open_passes
from uniprune.job.forecast.memory import Work, needs
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.storage.runs import Run
from uniprune.storage.stash import Stash, give_back_memory
from uniprune.storage.tensor_store import Store

SIDES = ("resident", "recomputed")
LENGTH, VOCABULARY = 512, 32_000

Row = dict[str, Any]


def model_of(size: str, blocks: int | None) -> LlamaForCausalLM:
    """Weights are stretches of one buffer of normal values: to draw them all takes longer than a step."""
    shape = SIZES[size]
    config = LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_hidden_layers=blocks or shape["blocks"],
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    buffer = torch.empty(16_777_213).normal_(0, STD, generator=torch.Generator().manual_seed(0)).bfloat16()
    for place, parameter in enumerate(model.parameters()):
        flat, start = parameter.data.view(-1), place * 7919
        if parameter.dim() == 1:
            flat.fill_(1)
            continue
        for begin in range(0, len(flat), len(buffer)):
            piece = flat[begin : begin + len(buffer)]
            piece.copy_(buffer.roll(start)[: len(piece)])
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def memory(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def peak_of(work: Any) -> tuple[int, float, Any]:
    """Bytes beyond what is resident now, seconds of all cores together, result."""
    give_back_memory()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    start = time.process_time()
    result = work()
    return memory("VmHWM") - before, time.process_time() - start, result


def side(name: str, size: str, blocks: int | None, tokens: int, steps: int) -> Row:
    """Some steps of one side, in this process."""
    model = model_of(size, blocks)
    matrices, target = find_matrices(model), NM(2, 4)
    windows = torch.randint(0, VOCABULARY, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    settings = MirrorDescent(batch_tokens=tokens)
    recipe = Recipe(sparsity="2:4", controller=settings)
    needed = needs(Work(model, matrices, recipe, torch.bfloat16, torch.bfloat16, LENGTH))
    calibration = Calibration(model, matrices, windows, recompute=name == "recomputed")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        passes = open_passes(calibration, run)
        with passes.network:
            few, store = replace(calibration, windows=windows[:1]), Store(run, "descent")
            position = Position(settings, few, [target], run, store)
            moving = loop.opened(settings, passes, few, Wanda(), position, TeacherCache(passes, Stash(run.aside())))
            found = [peak_of(lambda: moving.step(windows, target, 1.0)) for _ in range(steps)]
        digest, cut = sha256(), target.prepare({})
        for matrix in matrices:
            digest.update(cut(matrix, position.states.dual(matrix)).numpy().data)
    return {
        "peak_bytes": max(peak for peak, _, _ in found),
        "seconds": statistics.median(seconds for _, seconds, _ in found[1:] or found),
        "resident_bytes": memory("VmHWM"),
        "forecast_bytes": needed[name].memory,
        "weights": sum(matrix.size for matrix in matrices.values()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "masks": digest.hexdigest(),
    }


def compare(size: str, chosen: argparse.Namespace) -> Row:
    """Both sides, round by round."""
    found: dict[str, list[Row]] = {name: [] for name in SIDES}
    words = ["--tokens", str(chosen.tokens), "--steps", str(chosen.steps), "--size", size]
    words += ["--blocks", str(chosen.blocks)] if chosen.blocks else []
    for turn in range(chosen.rounds):
        for name in SIDES[:: -1 if turn % 2 else 1]:
            done = subprocess.run(
                [sys.executable, __file__, *words, "--side", name], stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout))
            print(name, done.stdout.strip(), file=sys.stderr, flush=True)
    kept, again = (found[name] for name in SIDES)
    first = kept[0]
    return {
        "size": size,
        "tokens": chosen.tokens,
        "blocks": chosen.blocks or SIZES[size]["blocks"],
        "parameters": first["parameters"],
        "weights": first["weights"],
        **{
            name: {
                "peak_bytes": max(row["peak_bytes"] for row in found[name]),
                "seconds": statistics.median(row["seconds"] for row in found[name]),
                "resident_bytes": max(row["resident_bytes"] for row in found[name]),
                "forecast_bytes": found[name][0]["forecast_bytes"],
            }
            for name in SIDES
        },
        "memory_ratio": max(row["peak_bytes"] for row in again) / max(row["peak_bytes"] for row in kept),
        "time_ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in zip(kept, again, strict=True)),
        "same_masks": len({row["masks"] for rows in found.values() for row in rows}) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["width"])
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        print(json.dumps(side(chosen.side, chosen.size[0], chosen.blocks, chosen.tokens, chosen.steps)))
        return
    for size in chosen.size:
        row = compare(size, chosen)
        print(json.dumps(row), flush=True)
        if chosen.record:
            keys = ("size", "tokens", "blocks")
            rows = [other for other in load("recompute").get("rows", []) if any(other[key] != row[key] for key in keys)]
            save("recompute", {"rows": [*rows, row]})


if __name__ == "__main__":
    main()
