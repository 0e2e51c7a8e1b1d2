"""Every method on a model: C4 calibration, WikiText-2 raw test, float32, 24 windows of 512 spread over the test text.

    python benchmarks/quality.py METHOD [PATTERN ...] [--model qwen] [--seed N] [--tokens N [--fresh N]] [--full]
        [--scratch FOLDER]

METHOD: dense, a local metric (magnitude, wanda, ria, stochria), fisher, fwanda (`--controller fisher`), owl, sparsegpt,
sequential (Wanda's, block after block), refine (the same and --refine), paper, feedback (the controller, calibrated for each
pattern alone), any (one calibration of the controller, all patterns cut from it). A sparsity such as 0.5 is cut with the
method's own kind of budget: by row, but for fisher, fwanda and the controllers, which have one for the model.

Local methods see 64 windows of 512 tokens, the controllers 131,072 tokens in all, counted with repeats, start and judging
included; with --tokens another number, whose rows are kept apart (the curve). Above 131,072 windows come from both files of
C4, which have 1,111; when those are used up, or --fresh tokens of them, they come again. With --scratch a controller's
progress is kept there, and the same command goes on where it was interrupted; its seconds are then those of the last go.
Controllers descend in bfloat16, or in float32 on a CPU that only emulates it; a row's dtype says which. Rows accumulate in
results/quality.json, those of another model than SmolLM2-135M in a file of its own, keyed by method, pattern and seed. At 2:4
and 50 % there are other domains: encyclopedia articles, and questions with their right answers. With --full, rows have the
whole test text in windows of 2048, too, in that type (half an hour each on a slow core); they are kept apart: they may come
from another machine than the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import baselines
import uniprune
from common import CALIBRATION, DATA, EVALUATION, FAST, load, peak_memory, processor, qwen, relative, save, smollm2
from uniprune.comparison.sparsegpt import sparsegpt
from uniprune.controller import controllers
from uniprune.controller.descent import loop
from uniprune.controller.fisher import Fisher
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.unipruning import UniPruning
from uniprune.data.windows import load_windows
from uniprune.evaluation import perplexity as perplexity_module
from uniprune.models import masking
from uniprune.models.loading import dtype_name
from uniprune.models.matrices import find_matrices
from uniprune.saliency import metrics
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.sequential import refined, sequential
from uniprune.sparsity.choices import Scope
from uniprune.sparsity.patterns import spelling
from uniprune.sparsity.patterns.protocol import Masks, Pattern, Saliency
from uniprune.storage.runs import Run, open_run

MODELS = {"smollm2": smollm2, "qwen": qwen}
PATTERNS = ("2:4", "0.5", "0.6", "0.7", "4:8")
MAIN = ("2:4", "0.5")
BUDGET = 131_072
WINDOWS, LENGTH, SAMPLES = 64, 512, 24
Cut = Iterator[tuple[str, Pattern, Masks, int]]  # spelling, pattern, masks, calibration tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=BUDGET, help="of the controllers")
    parser.add_argument("--fresh", type=int, help="of these tokens, how many differ; the others are the same again")
    parser.add_argument("--scratch", type=Path, help="keeps the progress of controllers here")
    parser.add_argument("--full", action="store_true")
    chosen = parser.parse_args()
    bench = Bench(chosen.seed, chosen.model, chosen.tokens, chosen.fresh, chosen.scratch)
    table = "whole" if chosen.full else "rows" if (chosen.tokens, chosen.fresh) == (BUDGET, None) else "curve"
    method = {"dense": bench.dense, "fisher": bench.fisher, "owl": bench.owl, "sparsegpt": bench.sparsegpt}
    method |= {
        "fwanda": bench.fwanda,
        "sequential": bench.sequential,
        "refine": bench.refine,
        "paper": bench.paper,
        "feedback": bench.feedback,
        "any": bench.any,
    }
    run = method.get(chosen.method, lambda specs: bench.local(chosen.method, specs))
    start = time.perf_counter()
    for spec, pattern, cut, tokens in run(chosen.patterns or (MAIN if chosen.full else PATTERNS)):
        row = {"method": chosen.method, "pattern": spec, "scope": getattr(pattern, "scope", None), "seed": chosen.seed}
        row |= {"dtype": dtype_name(bench.model.dtype), "cpu": processor()["name"], "tokens": tokens}
        row |= {"fresh": bench.distinct} if table == "curve" else {}
        row |= {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory()}
        removed = sum(int((~mask).sum()) for mask in cut.values())
        row["sparsity"] = removed / sum(matrix.size for matrix in bench.matrices.values())
        row |= bench.evaluate(cut, transfer=spec in ("0", *MAIN))
        keep(chosen.model, row | (bench.whole(cut) if chosen.full else {}), table)
        start = time.perf_counter()


class Bench:
    """The model, the text, and each method's way from them to masks."""

    def __init__(
        self,
        seed: int = 0,
        model: str = "smollm2",
        budget: int = BUDGET,
        fresh: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.source, self.seed, self.budget, self.fresh, self.scratch = MODELS[model](), seed, budget, fresh, scratch
        self.distinct: int | None = None  # tokens that a controller descended on, if they came again
        self.reload()

    def reload(self, dtype: torch.dtype = torch.float32) -> None:
        self.loaded = uniprune.load(self.source, dtype=dtype_name(dtype), device="cpu")
        self.model, self.matrices = self.loaded.model, find_matrices(self.loaded.model)

    def text(self, windows: int = WINDOWS, length: int = LENGTH) -> torch.Tensor:
        """As many windows as asked, or as there are in C4's larger sample."""
        text = partial(load_windows, tokenizer=self.loaded.tokenizer, use="calibration", length=length, seed=self.seed)
        if windows * length <= BUDGET:
            return text(CALIBRATION, count=windows).tokens
        return text(CALIBRATION.parent, count=min(windows, text(CALIBRATION.parent).available)).tokens

    def evaluate(self, cut: Masks, transfer: bool) -> dict[str, float]:
        """Perplexity of the model that is loaded, under masks, in float32; ``transfer``: on the other domains, too."""
        if self.model.dtype != torch.float32:
            self.reload()
        with tempfile.TemporaryDirectory() as scratch, masking.applied(self.matrices, cut):
            answers = Path(scratch) / "answers.txt"
            answers.write_text("\n\n".join(right_answers()))
            texts = {"perplexity": (EVALUATION, SAMPLES)}
            if transfer:
                texts |= {"articles": (DATA / "wiki_demo" / "wiki_demo.txt", 8), "answers": (answers, 8)}
            return {name: self.perplexity(*text) for name, text in texts.items()}

    def whole(self, cut: Masks) -> dict[str, float]:
        """Perplexity over the whole test text in windows of 2048."""
        self.reload(FAST)
        windows = load_windows(EVALUATION, self.loaded.tokenizer, use="evaluation", length=2048)
        with masking.applied(self.matrices, cut):
            return {"full": perplexity_module.perplexity(self.model, windows).perplexity}

    def perplexity(self, path: Path, count: int) -> float:
        return perplexity_of(self.loaded, path, count)

    def calibration(self, tokens: torch.Tensor) -> Calibration:
        return Calibration(self.model, self.matrices, tokens)

    def dense(self, specs: list[str]) -> Cut:
        yield "0", spelling.parse("0"), {}, 0

    def local(self, method: str, specs: list[str]) -> Cut:
        tokens = self.text()
        saliency = one_shot(self.calibration(tokens), metrics.parse(method, self.seed))
        return cut_from(saliency, specs, tokens.numel(), "row")

    def fisher(self, specs: list[str]) -> Cut:
        tokens = self.text()
        saliency = baselines.fisher(self.model, self.matrices, tokens)
        return cut_from(saliency, specs, tokens.numel(), "model")

    def fwanda(self, specs: list[str]) -> Cut:
        tokens = self.text()
        saliency, _ = Fisher().calibrate(self.calibration(tokens), metrics.Wanda(), [])
        return cut_from(saliency, specs, tokens.numel(), "model")

    def owl(self, specs: list[str]) -> Cut:
        tokens = self.text()
        saliency = one_shot(self.calibration(tokens), metrics.Wanda())
        for spec in (spec for spec in specs if ":" not in spec):
            cut = baselines.owl_masks(self.matrices, saliency, float(spec))
            yield spec, spelling.parse(spec), cut, tokens.numel()

    def sparsegpt(self, specs: list[str]) -> Cut:
        for spec in specs:
            tokens, pattern = self.text(), spelling.parse(spec)
            yield spec, pattern, sparsegpt(self.model, self.matrices, tokens, pattern), tokens.numel()
            self.reload()  # it changed the weights

    def sequential(self, specs: list[str]) -> Cut:
        return self.by_block(sequential, specs)

    def refine(self, specs: list[str]) -> Cut:
        return self.by_block(refined, specs)

    def by_block(self, create: Any, specs: list[str]) -> Cut:
        for spec in specs:
            tokens, pattern = self.text(), spelling.parse(spec)
            masks, _ = create(self.calibration(tokens), metrics.Wanda(), pattern)
            yield spec, pattern, masks, tokens.numel()

    def paper(self, specs: list[str]) -> Cut:
        """128 windows, each seen once by the local metric and once by a step. stochRIA is the paper's own metric."""
        tokens = self.text(self.budget // LENGTH // 2)
        for spec in specs:
            self.reload(FAST)
            pattern = spelling.parse(spec)
            metric = metrics.StochRIA(seed=self.seed)
            saliency, _ = UniPruning().calibrate(self.calibration(tokens), metric, [pattern], seed=self.seed)
            yield spec, pattern, dict(pattern(saliency)), self.budget

    def feedback(self, specs: list[str]) -> Cut:
        for spec in specs:
            pattern = spelling.parse(spec, default="model")
            saliency, tokens = self.descend([pattern])
            yield spec, pattern, dict(pattern(saliency)), tokens

    def any(self, specs: list[str]) -> Cut:
        saliency, tokens = self.descend(controllers.any_sparsity())
        return cut_from(saliency, specs, tokens, "model")

    def descend(self, targets: Any, budget: int | None = None, **settings: Any) -> tuple[dict[str, torch.Tensor], int]:
        """As many steps as the budget leaves after the start and the judging."""
        self.reload(FAST)
        tuned = MirrorDescent(**settings)
        held_out = max(tuned.held_out, len(targets))
        judged = held_out * LENGTH * (tuned.checks + 1)
        steps = ((budget or self.budget) - loop.START_TOKENS - judged) // tuned.batch_tokens
        wanted = steps * tuned.batch_tokens // LENGTH
        windows = self.text(min(wanted, (self.fresh or wanted * LENGTH) // LENGTH) + held_out)
        distinct = len(windows) - held_out
        self.distinct = distinct * LENGTH if distinct < wanted else None
        with self.kept(targets, windows, settings) as run:
            calibration = replace(self.calibration(windows), run=run)
            found, record = tuned.calibrate(calibration, metrics.Wanda(), targets, steps, self.seed)
            saliency = {name: dual.clone() for name, dual in found.items()}
        print(record, flush=True)
        return saliency, record.tokens + loop.START_TOKENS + judged

    @contextmanager
    def kept(self, targets: Any, windows: torch.Tensor, settings: dict[str, Any]) -> Iterator[Run | None]:
        """The run of a descent, in a folder of its own, if its progress is to be kept."""
        if self.scratch is None:
            yield None
            return
        what = {"model": Path(self.source).name, "targets": list(map(str, targets)), "seed": self.seed, "settings": settings}
        what |= {"budget": self.budget, "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest()}
        self.scratch.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        with open_run(self.scratch / name, what, resume=True) as run:
            yield run


def perplexity_of(loaded: uniprune.Loaded, path: Path = EVALUATION, count: int = SAMPLES) -> float:
    """The short protocol: samples of LENGTH, spread over a text."""
    windows = load_windows(path, loaded.tokenizer, use="evaluation", length=LENGTH, count=count)
    return perplexity_module.perplexity(loaded.model, windows).perplexity


def cut_from(saliency: Saliency, specs: list[str], tokens: int, scope: Scope) -> Cut:
    """All patterns from one saliency; scope: of sparsities."""
    for spec in specs:
        pattern = spelling.parse(spec, default=scope)
        yield spec, pattern, dict(pattern(saliency)), tokens


def right_answers() -> Iterator[str]:
    """Questions of ARC-Easy and PIQA, each with its right answer."""
    for line in (DATA / "zeroshot" / "arc_easy.jsonl").read_text().splitlines():
        row = json.loads(line)
        right = row["choices"]["label"].index(row["answerKey"])
        yield f"Question: {row['question']}\nAnswer: {row['choices']['text'][right]}"
    for line in (DATA / "zeroshot" / "piqa.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield f"Question: {row['goal']}\nAnswer: {row['sol2' if row['label'] else 'sol1']}"


def keep(model: str, row: dict[str, Any], table: str) -> None:
    file = "quality" if model == "smollm2" else f"quality_{model}"
    results = load(file)
    tables = {name: results.get(name, []) for name in ("rows", "whole", "curve")}
    key = ("method", "pattern", "scope", "seed", *(["tokens", "fresh"] if table == "curve" else []))
    tables[table] = [other for other in tables[table] if [other[k] for k in key] != [row[k] for k in key]] + [row]
    save(file, {"calibration": relative(CALIBRATION), "evaluation": relative(EVALUATION), **tables})
    print(row, flush=True)


if __name__ == "__main__":
    main()
