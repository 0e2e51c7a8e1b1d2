"""What each part of the controller does: one change at a time, 2:4 (or as named), SmolLM2-135M, one seed.

    python benchmarks/ablations.py [NAME ...]

A small budget, 32,768 tokens in all, so that many rows fit; compare rows of this table with each other only. Settings are
chosen by such rows, so they look at the *validation* part of WikiText-2 and at held-out calibration text, never at the test
part: 24 windows of 512; bfloat16, or float32 on a CPU that only emulates it. Rows accumulate in results/ablations.json.
Those of variants that are no more stay there; tables.py writes them last.
"""

from __future__ import annotations

import sys
from typing import Any

from common import DATA, FAST, load, save
from quality import Bench
from uniprune.controller.controllers import any_sparsity
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.data.windows import load_windows
from uniprune.evaluation import perplexity as perplexity_module
from uniprune.models import masking
from uniprune.models.loading import dtype_name
from uniprune.saliency import metrics
from uniprune.saliency.calibration import Calibration
from uniprune.sparsity.patterns import spelling

TOKENS = 32_768
# name: settings, metric of the start, patterns descended on, pattern evaluated, budget
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no controller: its start alone": {"steps": 0},
    "cross-entropy instead of KL": {"settings": {"labels": 1.0}},
    "half cross-entropy, half KL": {"settings": {"labels": 0.5}},
    "tokens not evened in the loss": {"settings": {"evenness": 0.0}},
    "tokens not evened in the gradients": {"settings": {"even_tokens": False}},
    "rows and columns move alike": {"settings": {"focus": False}},
    "nothing against noise": {"settings": {"evenness": 0.0, "even_tokens": False, "focus": False}},
    "step size halved": {"settings": {"step_size": 0.00225}},
    "step size doubled": {"settings": {"step_size": 0.009}},
    "power 0.1 (nearly a logarithm)": {"settings": {"power": 0.1, "step_size": 0.001}},
    "power 1": {"settings": {"power": 1.0, "step_size": 0.009}},
    "start: magnitude": {"metric": "magnitude"},
    "start: RIA": {"metric": "ria"},
    "start: stochRIA": {"metric": "stochria"},
    "512 tokens a step": {"settings": {"batch_tokens": 512}},
    "2048 tokens a step": {"settings": {"batch_tokens": 2048}},
    "windows of 1024 tokens": {"length": 1024},
    "twice the tokens": {"tokens": 2 * TOKENS},
    "calibrated for any": {"targets": "any"},
    "50 % by row": {"pattern": "0.5", "scope": "row"},
    "50 % by matrix": {"pattern": "0.5", "scope": "matrix"},
    "50 % by model": {"pattern": "0.5", "scope": "model"},
    "50 % by model, step size halved": {"pattern": "0.5", "scope": "model", "settings": {"step_size": 0.00225}},
    "50 % by model, step size doubled": {"pattern": "0.5", "scope": "model", "settings": {"step_size": 0.009}},
    "50 % by model, 512 tokens a step": {"pattern": "0.5", "scope": "model", "settings": {"batch_tokens": 512}},
}


def main() -> None:
    bench = Bench(seed=0)
    for name in sys.argv[1:] or VARIANTS:
        row = {"name": name, **run(bench, **VARIANTS[name])}
        key = name, row["dtype"]
        rows = [other for other in load("ablations").get("rows", []) if (other["name"], other["dtype"]) != key]
        save("ablations", {"tokens": TOKENS, "rows": [*rows, row]})
        print(row, flush=True)


def run(
    bench: Bench,
    settings: dict[str, Any] | None = None,
    metric: str = "wanda",
    targets: str = "one",
    pattern: str = "2:4",
    scope: Any = None,
    tokens: int = TOKENS,
    steps: int | None = None,
    length: int = 512,
) -> dict[str, Any]:
    if bench.model.dtype != FAST:
        bench.reload(FAST)
    tuned, target = MirrorDescent(**{"checks": 1, **(settings or {})}), spelling.parse(pattern, scope)
    if steps is None:
        steps = (tokens - 8192 - 4096) // tuned.batch_tokens
    if steps:
        windows = bench.text(steps * tuned.batch_tokens // length + tuned.held_out * 512 // length, length)
    else:  # a step of size 0 leaves the start
        windows, steps, tuned = bench.text(24), 1, MirrorDescent(step_size=0.0)
    wanted = any_sparsity() if targets == "any" else [target]
    calibration = Calibration(bench.model, bench.matrices, windows)
    saliency, record = tuned.calibrate(calibration, metrics.parse(metric), wanted, steps)
    valid = load_windows(DATA / "wikitext2" / "wiki.valid.raw", bench.loaded.tokenizer, use="evaluation", length=512, count=24)
    with masking.applied(bench.matrices, dict(target(saliency))):
        perplexity = perplexity_module.perplexity(bench.model, valid).perplexity
    facts = {"perplexity": perplexity, "held_out_kl": record.best_held_out_loss, "pattern": str(target), "steps": steps}
    return facts | {"dtype": dtype_name(FAST)}


if __name__ == "__main__":
    main()
