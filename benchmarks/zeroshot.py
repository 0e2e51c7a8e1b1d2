"""The native scorer against lm-evaluation-harness: answers row by row, and time, on the same rows in one process.

    pip install 'uniprune[lm-eval]'
    python benchmarks/zeroshot.py [--limit 200] [--batch 8]

Timed is what each does from the texts of a task to its log-likelihoods, tokenisation included; not reading data, prompts and
metrics. The harness's own time is that of its ``loglikelihood``. Seconds are the processor's, because machines are shared: with
one thread they are what the wall clock would show on an idle one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import uniprune
from common import DATA, save, smollm2
from uniprune.job import context
from uniprune.tasks import load_task
from uniprune.zeroshot import answer, tokenise

CONFIGS = {  # our files -> the harness's own tasks
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


class Timed(HFLM):  # type: ignore[misc]
    """The harness's model, with the seconds that it took for log-likelihoods."""

    seconds = 0.0

    def loglikelihood(self, *arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        found = super().loglikelihood(*arguments, **options)
        self.seconds = time.process_time() - start
        return found


def harness(model: Timed, name: str, limit: int, folder: Path) -> list[dict[str, Any]]:
    """The harness's samples, one per row, in order: its own task, reading our file."""
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name]),
        "task": f"local_{name}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(DATA / "zeroshot" / f"{name}.jsonl")}, "cache_dir": str(folder)},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[str(config)], limit=limit, task_manager=manager, log_samples=True)
    (samples,) = found["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


def compare(loaded: uniprune.Loaded, model: Timed, name: str, limit: int, folder: Path) -> dict[str, Any]:
    task = load_task(str(DATA / "zeroshot" / f"{name}.jsonl"), limit)
    start = time.process_time()
    ours = answer(loaded.model, task, tokenise(task, loaded.tokenizer, context(loaded.model.config)))
    seconds = time.process_time() - start
    samples = harness(model, name, limit, folder)
    pairs = [
        (mine.nats, float(theirs[0]))
        for scores, sample in zip(ours.scores, samples, strict=True)
        for mine, theirs in zip(scores, sample["filtered_resps"], strict=True)
    ]
    return {
        "task": name,
        "rows": len(samples),
        **{metric: sum(right) / len(right) for metric, right in ours.right.items()},
        "rows_that_differ": {
            metric: sum(mine != bool(sample[metric]) for mine, sample in zip(right, samples, strict=True))
            for metric, right in ours.right.items()
        },
        "largest_difference_nats": max(abs(mine - theirs) for mine, theirs in pairs),
        "seconds": seconds,
        "harness_seconds": model.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="the harness's batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = uniprune.load(smollm2(), dtype="float32", device="cpu")
    model = Timed(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=options.batch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            rows.append(compare(loaded, model, name, options.limit, Path(folder)))
            print(rows[-1], flush=True)
    save("zeroshot", {"lm_eval": lm_eval.__version__, "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
