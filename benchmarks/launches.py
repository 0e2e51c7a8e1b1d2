"""What one step of the controller has a GPU do: kernels launched, waits of the host, bytes copied. No GPU is needed.

    python benchmarks/launches.py [--size {8b,tiny}] [--blocks N] [--other SRC] [--record]

The model is on the pretend device of tests/pretend.py, which counts and computes on the CPU: a Llama with an 8B's shapes, 4 of
its blocks and a small vocabulary, bfloat16, random weights, one step of 2 samples. --other: another version's src folder, which
is counted beside this one, in a process of its own. --record adds rows to results/launches.json. An 8B's shapes take 14 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pretend

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
}
TARGETS = ("2:4", "0.5 by row", "0.5 by model")
LENGTH, WINDOWS, STEP = 64, 8, 4  # the step that is counted: the third and later ones weigh rows and columns
OLD = ("descent", "matrices", "metrics", "mirror_descent", "patterns", "selection")  # modules of older versions
SRC = Path(__file__).parents[1] / "src"

Row = dict[str, Any]


def model_of(size: str, blocks: int) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[size], num_hidden_layers=blocks, vocab_size=1024, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


class Counter:
    """Progress that notes what each step of a descent has had the device do."""

    def __init__(self, counts: pretend.Counts) -> None:
        self.counts, self.steps = counts, list[Row]()

    def __call__(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        for item in items:
            self.before = self.counts.snapshot()
            self.kernels, self.waits = self.counts.kernels.copy(), self.counts.waits.copy()
            yield item

    def note(self, text: str, tokens: int = 0) -> None:
        kernels = dict((self.counts.kernels - self.kernels).most_common())
        self.steps.append(self.counts.since(self.before) | {"kernels": kernels, "waits": dict(self.counts.waits - self.waits)})


def count(size: str, blocks: int, target: str, execution: str) -> Row:
    """One step, of the version that is imported."""
    windows = torch.randint(0, 1024, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with pretend.device() as counts:
        model = model_of(size, blocks).to(pretend.DEVICE)
        progress = Counter(counts)
        settings = {"batch_tokens": 2 * LENGTH, "checks": 1}
        weights, matrices = _descend(model, windows, target, settings, progress, execution)
    return {"weights": weights, "matrices": matrices, **progress.steps[STEP - 1]}


def _descend(
    model: Any, windows: torch.Tensor, target: str, settings: Row, progress: Counter, execution: str
) -> tuple[int, int]:
    """Weights and matrices that were descended on. Older versions have other modules, and threads that know no device."""
    calibrate: Callable[..., Any]
    try:
        from uniprune.controller.mirror_descent import MirrorDescent
        from uniprune.models.matrices import find_matrices
        from uniprune.saliency.calibration import Calibration
        from uniprune.saliency.metrics import Wanda

        try:
            from uniprune.sparsity.patterns.nm import NM
            from uniprune.sparsity.patterns.unstructured import Unstructured
        except ImportError:  # they were one module
            patterns = import_module("uniprune.sparsity.patterns")
            NM, Unstructured = patterns.NM, patterns.Unstructured
    except ImportError:
        old = {name: import_module(f"uniprune.{name}") for name in OLD}
        old["selection"].ThreadPoolExecutor = _InLine
        pretend.Pretend.is_cuda = property(lambda self: True)  # they ask for a GPU by that name
        NM, Unstructured = old["patterns"].NM, old["patterns"].Unstructured
        matrices = old["matrices"].find_matrices(model)

        def calibrate(pattern: Any) -> Any:
            metric, descent = old["metrics"].Wanda(), old["mirror_descent"].MirrorDescent(**settings)
            return old["descent"].descend(model, matrices, windows, metric, [pattern], STEP, descent, progress=progress)

    else:
        matrices = find_matrices(model)
        kept = {} if execution == "resident" else {"recompute": True, "offload": execution == "offloaded"}
        calibration = Calibration(model, matrices, windows, progress=progress, **kept)

        def calibrate(pattern: Any) -> Any:
            return MirrorDescent(**settings).calibrate(calibration, Wanda(), [pattern], STEP)

    fraction, _, scope = target.partition(" by ")
    calibrate(Unstructured(float(fraction), scope) if scope else NM(*map(int, target.split(":"))))
    return sum(matrix.size for matrix in matrices.values()), len(matrices)


class _InLine:
    """A pool of no threads."""

    def __init__(self, *sizes: Any) -> None: ...

    def __enter__(self) -> _InLine:
        return self

    def __exit__(self, *error: object) -> None: ...

    def map(self, work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
        return map(work, *items)


def counted(src: Path, chosen: argparse.Namespace, target: str, execution: str) -> Row:
    """The same in a process of its own."""
    words = ["--size", chosen.size, "--blocks", str(chosen.blocks), "--side", f"{target},{execution}"]
    environment = os.environ | {"PYTHONPATH": str(src)}
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SHAPES), default="tiny")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=TARGETS)
    parser.add_argument("--execution", nargs="+", default=["resident"])
    parser.add_argument("--other", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        print(json.dumps(count(chosen.size, chosen.blocks, *chosen.side.split(","))))
        return
    for target in chosen.target:
        for execution in chosen.execution:
            row = {"size": chosen.size, "blocks": chosen.blocks, "target": target, "execution": execution}
            row |= counted(SRC, chosen, target, execution)
            row["syncs_a_matrix"] = row["syncs"] / row["matrices"]
            if chosen.other and execution == "resident":
                row["other"] = counted(chosen.other, chosen, target, execution)
            print(json.dumps(row), flush=True)
            if chosen.record:
                keep(row)


def keep(row: Row) -> None:
    """Puts a row in the place of the one before it, if there is one; what another version did, it still did."""
    from common import load, save

    def key(of: Row) -> tuple[Any, ...]:
        return tuple(of[name] for name in ("size", "blocks", "target", "execution"))

    rows = {key(other): other for other in load("launches").get("rows", [])}
    other = row.get("other") or rows.get(key(row), {}).get("other")
    rows[key(row)] = row | ({"other": other, "ratio": row["launches"] / other["launches"]} if other else {})
    save("launches", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
