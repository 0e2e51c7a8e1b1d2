"""What pruning keeps by what it is calibrated on: each calibration text beside each evaluated text, SmolLM2-135M, 2:4.

    python benchmarks/sources.py [METHOD ...] [--source NAME]

Texts: C4; encyclopedia articles; code, a third of the top of the standard library of the Python that runs this; instructions,
questions and their right answers through the model's chat template; self, what the dense model writes (from BOS); and two
mixtures: a fifth of the tokens of each (`mixture`), and all that each has alone, five times as many tokens (`all`). What is
evaluated is other documents of the same texts, and what the model writes with another seed: 8 windows of 512 tokens of each.
METHOD: wanda (32 windows of 512) or feedback (the controller, 64 windows, each once), calibrated for 2:4; both by default. One
seed, bfloat16 or float32 on a CPU that only emulates it. Rows accumulate in results/sources.json.
About an hour and a half of one quiet core for both methods; rows are kept as they come, so parts can be run (`--source code`).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uniprune
from common import CALIBRATION, DATA, FAST, load, save, smollm2
from quality import right_answers
from uniprune import Loaded, Recipe
from uniprune.data.windows import Windows, save_windows
from uniprune.evaluation.divergence import Recording, closeness
from uniprune.evaluation.model import EvaluatedModel
from uniprune.evaluation.perplexity import perplexity
from uniprune.evaluation.request import EvaluationRequest
from uniprune.job.samples import calibration_windows, generated
from uniprune.models import masking
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import find_matrices

METHODS = {"wanda": ("none", 32), "feedback": ("feedback", 64)}  # controller, windows
LENGTH, EVALUATED = 512, 8
TEXTS = ("c4", "articles", "code", "instructions", "self")
MIXTURES = {"mixture": 1, "all": len(TEXTS)}  # times as many tokens as a text alone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--source", action="append", choices=[*TEXTS, *MIXTURES])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        if not load("sources").get("dense"):
            keep({"dense": bench.dense})
        for source in chosen.source or (*TEXTS, *MIXTURES):
            tokens = bench.tokens(source)
            for method in chosen.methods:
                add(bench.row(method, source, tokens))


@dataclass(frozen=True)
class Texts:
    """The files of a text: to calibrate on, and to evaluate."""

    calibration: Path
    evaluation: Path


class Bench:
    """The model, the texts, and what the dense model makes of those that are evaluated."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.loaded = uniprune.load(smollm2(), dtype=dtype_name(FAST), device="cpu")
        self.texts = dict(write_texts(scratch))
        save_windows(self.windows("self", EVALUATED, seed=1), scratch / "own.safetensors")
        named = {name: text.evaluation for name, text in self.texts.items()} | {"self": scratch / "own.safetensors"}
        asked = EvaluationRequest.of(windows=EVALUATED, length=LENGTH)
        self.evaluated = EvaluatedModel(self.loaded).windows([f"{name}={path}" for name, path in named.items()], asked)
        self.recording = Recording(self.loaded.model, self.evaluated)
        with self.recording:
            found = perplexity(self.loaded.model, self.evaluated)
        self.dense = {name: {"perplexity": one.perplexity} for name, one in (found.by_text or {}).items()}

    def windows(self, source: str, count: int, seed: int = 0) -> Windows:
        names = TEXTS if source in MIXTURES else (source,)
        text = tuple(name if name == "self" else f"{name}={self.texts[name].calibration}" for name in names)
        recipe = Recipe(text=text, windows=count, length=LENGTH, seed=seed)
        found = calibration_windows(recipe, self.loaded.tokenizer, self.loaded.model)
        return found if found.prompts is None else generated(found, self.loaded, seed)

    def tokens(self, source: str) -> Path:
        """A token file that all methods calibrate on, or on the beginning of."""
        path = self.scratch / f"{source}.safetensors"
        save_windows(self.windows(source, max(count for _, count in METHODS.values()) * MIXTURES.get(source, 1)), path)
        return path

    def row(self, method: str, source: str, tokens: Path) -> dict[str, Any]:
        controller, count = METHODS[method]
        count *= MIXTURES.get(source, 1)
        recipe = Recipe(text=str(tokens), windows=count, sparsity="2:4", controller=controller, dtype=dtype_name(FAST))
        matrices, start = find_matrices(self.loaded.model), time.perf_counter()
        with masking.preserved(matrices, matrices):
            uniprune.prune_in_place(Loaded(self.loaded.model, self.loaded.tokenizer), recipe)
            seconds = time.perf_counter() - start
            found = self.measured()
        return {"method": method, "calibration": source, "tokens": count * LENGTH, "seconds": seconds, "texts": found}

    def measured(self) -> dict[str, dict[str, float]]:
        """Perplexity, and KL from the dense model, of each text, of the model as it is now."""
        with Recording(self.loaded.model, self.evaluated) as here:
            found = perplexity(self.loaded.model, self.evaluated).by_text or {}
        near = closeness(here, self.recording, self.evaluated).by_text or {}
        return {name: {"perplexity": one.perplexity, "kl": near[name].kl} for name, one in found.items()}


def write_texts(folder: Path) -> Iterator[tuple[str, Texts]]:
    """Files of each text that the model does not write; every fourth document of one that is not parted yet is evaluated."""
    yield "c4", Texts(CALIBRATION, DATA / "c4" / "c4_short.jsonl")
    articles = (DATA / "wiki_demo" / "wiki_demo.txt").read_text().splitlines()
    yield "articles", parted(folder, "articles", articles)
    library = Path(sysconfig.get_paths()["stdlib"])
    yield "code", parted(folder, "code", [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))[::3]])
    pairs = [pair.split("\nAnswer: ") for pair in right_answers()]
    rows = [{"instruction": question.removeprefix("Question: "), "output": answer} for question, answer in pairs]
    yield "instructions", parted(folder, "instructions", rows)


def parted(folder: Path, name: str, documents: list[Any]) -> Texts:
    found = Texts(folder / f"{name}.jsonl", folder / f"{name}-evaluation.jsonl")
    for path, part in ((found.calibration, False), (found.evaluation, True)):
        some = (one for index, one in enumerate(documents) if (index % 4 == 3) == part)
        path.write_text("".join(json.dumps(one if isinstance(one, dict) else {"text": one}) + "\n" for one in some))
    return found


def add(row: dict[str, Any]) -> None:
    key = row["method"], row["calibration"]
    rows = [other for other in load("sources").get("rows", []) if (other["method"], other["calibration"]) != key]
    keep({"rows": [*rows, row]})
    print(row, flush=True)


def keep(part: dict[str, Any]) -> None:
    facts = {name: value for name, value in load("sources").items() if name in ("dense", "rows")}
    save("sources", {"dtype": dtype_name(FAST), "length": LENGTH, "windows": EVALUATED, **facts, **part})


if __name__ == "__main__":
    main()
