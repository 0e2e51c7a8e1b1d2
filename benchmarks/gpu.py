"""What only a card can tell, written to results/gpu.json: `make gpu`, about ten minutes.

    python benchmarks/gpu.py [masks] [kernels] [products] [steps] [--device DEVICE] [--size {8b,1b,tiny}]

- masks: in float32 against the CPU's, of a local metric and after a few steps of the controller; and of two runs on the card.
- kernels: what is written in Triton (common/fused.py), whether it is used here, and its time beside the plain function's.
- products: `uniprune bench`, sparse products of an 8B's shapes against dense ones.
- steps: seconds of a step of the controller, peak memory, and its forecast, of each way to run a model that fits.

Where there is no card it says so and ends well. Rows are those of the card that it ran on; others stay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import load, save
from recompute import model_of
from uniprune import Recipe
from uniprune.common import fused
from uniprune.common.fused import Fused, agree
from uniprune.controller.descent.token_weighting import weighted
from uniprune.controller.descent.update import Step, updated
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.job.forecast import machine, memory
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.top import _among_few

PARTS = ("masks", "kernels", "products", "steps")
TARGETS: tuple[Pattern, ...] = (NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "matrix"), Unstructured(0.5, "model"))
LARGEST = {"8b": (14336, 4096), "1b": (5632, 2048), "tiny": (64, 128)}  # matrix of such a model
TOKENS = {"8b": 4096, "1b": 4096, "tiny": 64}  # of a step
LENGTH = {"8b": 512, "1b": 512, "tiny": 32}
ROUNDS = 5

Row = dict[str, Any]


class Card:
    """The device, its clock and its memory. Another device than CUDA's has the host's clock, and its memory is not known."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.cuda else name

    def seconds(self, work: Callable[[], Any]) -> float:
        """The median of a few rounds, after one that does not count."""
        times = []
        for _ in range(ROUNDS + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], Any]) -> int:
        """The most bytes that were taken while it worked."""
        if not self.cuda:
            work()
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_reserved(self.device)


def masks(card: Card, size: str) -> list[Row]:
    """A small model: this is about bits."""
    model = model_of("tiny", None).float()
    windows = torch.randint(0, 32_000, (12, 64), generator=torch.Generator().manual_seed(0))
    sides: list[dict[str, Any]] = []
    for device in (torch.device("cpu"), card.device, card.device):
        model = model.to(device)
        calibration = Calibration(model, find_matrices(model), windows)
        found: dict[str, Any] = {}
        for target in TARGETS:
            found[f"wanda, {target}"] = dict(target(one_shot(calibration, Wanda())))
            duals, _ = MirrorDescent(batch_tokens=256).calibrate(calibration, Wanda(), [target], 4)
            found[f"controller, {target}"] = dict(target(duals))
        sides.append({run: {name: mask.cpu() for name, mask in made.items()} for run, made in found.items()})
    cpu, once, again = sides
    pairs = {run: (differing(cpu[run], once[run]), differing(once[run], again[run])) for run in cpu}
    return [{"run": run, "differing": other, "repeated": same} for run, (other, same) in pairs.items()]


def differing(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The fraction of bits."""
    return sum(int((mask != others[name]).sum()) for name, mask in some.items()) / sum(mask.numel() for mask in some.values())


def kernels(card: Card, size: str) -> list[Row]:
    rows, columns = LARGEST[size]

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(card.device)

    first = MirrorDescent().init(some(rows, columns), some(rows))
    state = (some(rows, columns), *MirrorDescent().step(first, some(rows, columns), 0.01)[:4])
    step = Step(decays=(0.9, 0.95), rescale=1.0, noise=0.05, unit=1.0, size=0.01, turn=2)
    tokens = (some(1024, columns, dtype=torch.bfloat16), some(1024, rows, dtype=torch.bfloat16), some(columns), some(rows))
    cases: list[tuple[Fused[Any], tuple[Any, ...], Row]] = [
        (_among_few, (state[1].reshape(-1, 4),), {"keep": 2}),
        (updated, state, {"step": step}),
        (weighted, tokens, {}),
    ]
    found = [_kernel(card, *case) for case in cases]
    for target in TARGETS[1:3]:
        cut = target.prepare({})
        found.append({"kernel": f"cut {target}", "seconds": card.seconds(lambda cut=cut: cut("a", state[1]))})  # type: ignore[misc]
    return found


def _kernel(card: Card, function: Fused[Any], tensors: tuple[Any, ...], settings: Row) -> Row:
    plain = card.seconds(lambda: function.plain(*tensors, **settings))
    row: Row = {"kernel": function.__name__, "plain_seconds": plain}
    try:
        row["agrees"] = agree(function.launcher(*tensors, **settings), function.plain(*tensors, **settings))
        row["seconds"] = card.seconds(lambda: function.launcher(*tensors, **settings))
        row["ratio"] = plain / row["seconds"]
    except Exception as error:  # that there is none is a result
        row["missing"] = f"{type(error).__name__}: {error}"[:300]
    return row


def products(card: Card, size: str) -> list[Row]:
    from uniprune.speed.timing import Conditions, measure

    if not card.cuda:
        return []
    shapes = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
    at = Conditions(card.device, [torch.bfloat16], [1, 128, 2048], [0.5, 0.9])
    results, missing = measure(shapes, at)
    return [one.model_dump() for one in (*results, *missing)]


def steps(card: Card, size: str) -> list[Row]:
    """Each way to run the model; what does not fit is left out, with the numbers."""
    found = []
    for execution in ("resident", "recomputed", "offloaded"):
        model, tokens = model_of(size, None), TOKENS[size]
        recipe = Recipe(sparsity="2:4", tuning={"batch_tokens": tokens, "checks": 1})
        work = memory.Work(model, find_matrices(model), recipe, torch.bfloat16, torch.bfloat16, LENGTH[size], card.device)
        forecast = memory.needs(work)[execution].memory - memory.PROCESS  # type: ignore[index]
        row: Row = {"execution": execution, "size": size, "tokens": tokens, "forecast": forecast}
        if card.cuda and forecast > machine.free_memory(card.device):
            found.append(row | {"left_out": "it does not fit"})
        else:
            found.append(row | _step(card, model.to(card.device), execution, recipe, LENGTH[size]))
    return found


def _step(card: Card, model: Any, execution: str, recipe: Recipe, length: int) -> Row:
    """The median of a few steps, the first of which does not count, and the most memory that the descent took."""
    clock, settings = Steps(card), recipe.parsed_controller()
    assert settings is not None
    windows = torch.randint(0, 32_000, (4 * settings.step_tokens(length) // length + 4, length))
    keeps = {"recompute": execution != "resident", "offload": execution == "offloaded"}
    calibration = Calibration(model, find_matrices(model), windows, progress=clock, **keeps)  # type: ignore[arg-type]
    peak = card.peak(lambda: settings.calibrate(calibration, Wanda(), [NM(2, 4)], 4))
    return {"peak": peak, "seconds": statistics.median(clock.taken[1:])}


class Steps:
    """Progress that takes the time of each step."""

    def __init__(self, card: Card) -> None:
        self.card, self.taken = card, list[float]()

    def __call__(self, items: Any, label: str, total: int) -> Any:
        for item in items:
            self.card.wait()
            self.start = time.perf_counter()
            yield item

    def note(self, text: str, tokens: int = 0) -> None:
        self.card.wait()
        self.taken.append(time.perf_counter() - self.start)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=list(LARGEST), default="1b")
    chosen = parser.parse_args(words)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"skipped: no card here (torch {torch.__version__} finds no CUDA device)")
        return
    card, results = Card(chosen.device), load("gpu").get("cards", {}) if chosen.device.startswith("cuda") else {}
    here: Row = results.setdefault(card.name, {}) | {"triton": fused.available()}
    for part in chosen.parts or PARTS:
        began = time.perf_counter()
        here[part] = globals()[part](card, chosen.size)
        print(f"{part}: {time.perf_counter() - began:.0f} s", *here[part], sep="\n  ", flush=True)
    if card.cuda:
        save("gpu", {"cards": results | {card.name: here}})


if __name__ == "__main__":
    main()
