"""The results page: what pruning costs where people look, SmolLM2-135M, every method on the same rows in the same process.

    uniprune calibrate MODEL --text c4_demo.jsonl --windows 240 --budget-tokens 131072 -o scores.safetensors
    python benchmarks/page.py [--scores scores.safetensors] [--windows N] [--limit N] [--methods wanda,ours] [--patterns 0.6]

Perplexity of WikiText-2's test text and of C4 (other documents than calibration draws from), windows of 2048; accuracy on four
tasks, with McNemar's test against the dense model; KL to the dense model. float32. --windows, --limit: fewer windows of a text
and questions of a task than all. Rows accumulate in results/page.json, whose protocol must stay the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import CALIBRATION, DATA, EVALUATION, load, relative, save
from quality import Bench
from uniprune.artefacts.scores import ScoresFile
from uniprune.checkpoints.configuration import context
from uniprune.comparison.sparsegpt import sparsegpt
from uniprune.data.windows import Windows, load_windows
from uniprune.evaluation import reproduce
from uniprune.evaluation.answers import Answers, answer, tokenise
from uniprune.evaluation.divergence import Recording, closeness
from uniprune.evaluation.perplexity import perplexity
from uniprune.models.masking import applied
from uniprune.saliency import metrics
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.protocol import Masks, Pattern
from uniprune.tasks.loading import load_task

PATTERNS = ("0.5", "0.6", "2:4")
METHODS = ("wanda", "ria", "sparsegpt", "ours")
TASKS = ("piqa", "arc_easy", "winogrande", "openbookqa")
OTHER_C4 = DATA / "c4" / "c4_short.jsonl"


class Page:
    """What is measured of each model, and what the dense one had."""

    def __init__(self, windows: int | None, limit: int | None) -> None:
        self.bench = Bench(seed=0)
        tokenizer, config = self.bench.loaded.tokenizer, self.bench.model.config
        self.texts: dict[str, Windows] = {
            name: load_windows(path, tokenizer, use="evaluation", length=2048, count=windows)
            for name, path in (("wikitext2", EVALUATION), ("c4", OTHER_C4))
        }
        self.tasks = [load_task(str(DATA / "zeroshot" / f"{name}.jsonl"), limit) for name in TASKS]
        self.tokens = [tokenise(task, tokenizer, context(config)) for task in self.tasks]
        self.protocol = {
            "calibration": relative(CALIBRATION),
            "texts": {
                name: text.describe().model_dump() | {"text": relative(text.source)} for name, text in self.texts.items()
            },
            "tasks": {name: len(task.questions) for name, task in zip(TASKS, self.tasks, strict=True)},
            "dtype": "float32",
            "machine": reproduce.machine(self.bench.model).model_dump(),
        }
        self.dense = self.measure()

    def measure(self) -> tuple[dict[str, Any], Recording, list[Answers]]:
        """Of the model as it is now: the row's figures, its predictions, its answers."""
        model, row = self.bench.model, {}
        with Recording(model, self.texts["wikitext2"]) as recording:
            row["wikitext2"] = perplexity(model, self.texts["wikitext2"]).perplexity
        row["c4"] = perplexity(model, self.texts["c4"]).perplexity
        answers = answer(model, self.tasks, self.tokens)
        row["tasks"] = {name: given.result().model_dump(exclude_unset=True) for name, given in zip(TASKS, answers, strict=True)}
        return row, recording, answers

    def row(self) -> dict[str, Any]:
        """The same, compared with the dense model."""
        row, recording, answers = self.measure()
        _, dense, reference = self.dense
        found = closeness(recording, dense, self.texts["wikitext2"])
        row["closeness"] = found.model_dump(include={"kl", "kl_stderr", "agreement", "agreement_stderr"})
        for name, ours, theirs in zip(TASKS, answers, reference, strict=True):
            row["tasks"][name] = ours.result(theirs).model_dump(exclude_unset=True)
        return row

    def rows(self, method: str, specs: list[str], scores: Path | None) -> Iterator[dict[str, Any]]:
        for spec in specs:
            if method == "sparsegpt":  # it changes weights
                self.bench.reload()
                pattern = spelling.parse(spec)
                sparsegpt(self.bench.model, self.bench.matrices, self.bench.text(), pattern)
                yield {"method": method, "pattern": spec, **self.row()}
                self.bench.reload()
            else:
                with applied(self.bench.matrices, self.cut(method, spec, scores)):
                    yield {"method": method, "pattern": spec, **self.row()}

    def cut(self, method: str, spec: str, scores: Path | None) -> Masks:
        pattern: Pattern = spelling.parse(spec, default="model" if method == "ours" else "row")
        if method == "ours":
            assert scores is not None, "--scores: what uniprune calibrate wrote"
            return dict(pattern(ScoresFile(scores)))
        model, matrices = self.bench.model, self.bench.matrices
        return dict(pattern(one_shot(Calibration(model, matrices, self.bench.text()), metrics.parse(method))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    options = parser.parse_args()
    torch.manual_seed(0)
    page = Page(options.windows, options.limit)
    keep(page, {"method": "dense", "pattern": "0", **page.dense[0]})
    for method in options.methods.split(","):
        for row in page.rows(method, options.patterns.split(","), options.scores):
            keep(page, row)


def keep(page: Page, row: dict[str, Any]) -> None:
    there = load("page")
    same = not there or not reproduce.differences(there["protocol"], page.protocol)
    rows = [one for one in there.get("rows", []) if same and (one["method"], one["pattern"]) != (row["method"], row["pattern"])]
    save("page", {"protocol": page.protocol, "rows": [*rows, row]})
    print(row, flush=True)


if __name__ == "__main__":
    main()
