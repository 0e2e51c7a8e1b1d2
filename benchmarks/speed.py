"""What calibration, a step of the controller and a second pattern cost; each against the bare model in the same run.

    python benchmarks/speed.py [local] [step] [again] [state]

- local: Wanda's statistics, scores and masks against forward passes over the same tokens.
- step: one step of the controller, masks cut and duals moved, against a forward and a backward pass with gradients for every
  prunable weight plus the teacher's forward pass, over the same tokens; float32, and bfloat16 where the CPU has it (elsewhere
  the earlier row stays).
- again: masks of another pattern from a scores file, without the model, in seconds.
- state: bytes per weight that the controller keeps between steps.

The sides of a ratio alternate, because the machine's speed drifts; the median ratio counts. Parts that are not named
stay as they were.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import uniprune
from common import CALIBRATION, FAST, load, relative, save, smollm2
from uniprune.artefacts import scores as scores_file
from uniprune.artefacts.binding import Binding
from uniprune.controller import mirror_descent
from uniprune.data.windows import load_windows
from uniprune.models.blocks import batches
from uniprune.models.matrices import find_matrices
from uniprune.saliency import metrics
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.protocol import Pattern

ROUNDS = 2
PATTERNS = ("0.5", "2:4")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    def __init__(self, dtype: str) -> None:
        loaded = uniprune.load(smollm2(), dtype=dtype, device="cpu")
        self.model, self.matrices = loaded.model, find_matrices(loaded.model)
        tokens = load_windows(CALIBRATION, loaded.tokenizer, use="calibration", length=512, count=32)
        self.tokens = tokens.tokens

    def forwards(self) -> None:
        with torch.no_grad():
            for batch in batches(self.tokens):
                self.model(input_ids=batch, use_cache=False)

    def local(self) -> dict[str, float]:
        rows = []
        for _ in range(ROUNDS):
            bare, start = timed(self.forwards), time.perf_counter()
            saliency = one_shot(Calibration(self.model, self.matrices, self.tokens), metrics.Wanda())
            calibrated = time.perf_counter() - start
            cut = {spec: timed(lambda spec=spec, of=saliency: list(spelling.parse(spec)(of))) for spec in PATTERNS}
            rows.append({spec: (calibrated + seconds) / bare for spec, seconds in cut.items()})
            print(rows[-1], flush=True)
        return {spec: statistics.median(row[spec] for row in rows) for spec in PATTERNS}

    def bare_step(self, batch: torch.Tensor) -> None:
        """What a trainer's step does before its optimiser, and the teacher's forward pass."""
        with torch.no_grad():
            self.model(input_ids=batch, use_cache=False)
        for matrix in self.matrices.values():
            matrix.parameter.requires_grad_(True).grad = None
        self.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        for matrix in self.matrices.values():
            matrix.parameter.requires_grad_(False).grad = None

    def steps(self, target: Pattern, count: int) -> float:
        settings = mirror_descent.MirrorDescent(checks=1, held_out=1)
        calibration = Calibration(self.model, self.matrices, self.tokens[:4])
        return timed(lambda: settings.calibrate(calibration, metrics.Wanda(), [target], count))

    def step(self) -> dict[str, float]:
        """The start and the judging cost the same whatever the number of steps, so the difference is that of steps."""
        ratios = {}
        for spec in PATTERNS:
            target = spelling.parse(spec, default="model")
            few = self.steps(target, 1)
            before = [timed(lambda: self.bare_step(self.tokens[:2])) for _ in range(3)]
            many = self.steps(target, 6)
            after = [timed(lambda: self.bare_step(self.tokens[:2])) for _ in range(3)]
            ratios[spec] = (many - few) / 5 / statistics.median(before + after)
            print(spec, ratios[spec], flush=True)
        return ratios

    def state(self) -> float:
        """Bytes per prunable weight that the controller keeps from step to step, beside the masks (1 byte)."""
        matrix = next(iter(self.matrices.values()))
        state = mirror_descent.MirrorDescent().init(torch.ones(matrix.shape), torch.ones(matrix.shape[0]))
        return sum(part.nbytes for part in state if isinstance(part, torch.Tensor)) / matrix.size

    def again(self) -> dict[str, float]:
        shapes = {name: matrix.shape for name, matrix in self.matrices.items()}
        saliency = one_shot(Calibration(self.model, self.matrices, self.tokens[:2]), metrics.Wanda())
        names = list(shapes)
        binding = Binding.of(self.matrices, dict.fromkeys(names, "F32"), "", 0)
        facts = scores_file.ScoresFacts(**binding.model_dump(), matrices=names, comparable=True)
        with tempfile.TemporaryDirectory() as scratch:
            scores, out = Path(scratch) / "scores.safetensors", Path(scratch) / "masks.safetensors"
            scores_file.write_scores(scores, saliency.items(), shapes, facts)
            return {spec: timed(lambda spec=spec: uniprune.mask(scores, spec, out, overwrite=True)) for spec in PATTERNS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["local", "step", "again", "state"])
    chosen = parser.parse_args().parts
    single, earlier = Bench("float32"), load("speed")
    results: dict[str, Any] = {"text": relative(CALIBRATION), "tokens": single.tokens.numel()}
    results |= {name: earlier[name] for name in ("local", "again_seconds", "state_bytes_per_weight", "step") if name in earlier}
    if "local" in chosen:
        results["local"] = single.local()
    if "again" in chosen:
        results["again_seconds"] = single.again()
    if "state" in chosen:
        results["state_bytes_per_weight"] = single.state()
    if "step" in chosen:
        results["step"] = results.get("step", {}) | {"float32": single.step()}
        if FAST is torch.bfloat16:
            results["step"]["bfloat16"] = Bench("bfloat16").step()
    save("speed", results)


if __name__ == "__main__":
    main()
