"""The native scorer against lm-evaluation-harness: answers row by row, and time, on the same rows in one process.

    pip install '.[lm-eval]'
    python benchmarks/zeroshot.py [--limit 200] [--batch 8]

Timed is what each does from the texts of a task to its log-likelihoods, tokenisation included; not reading data, prompts and
metrics. The harness's own time is that of its ``loglikelihood``. Both the processor's seconds, which other programs on a shared
machine hardly change, and those of the wall clock, with one thread.
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
from uniprune.checkpoints.configuration import context
from uniprune.evaluation.answers import Answers, answer, tokenise
from uniprune.tasks.loading import load_task

CONFIGS = {  # our files -> the harness's own tasks
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


class Timed(HFLM):  # type: ignore[misc]
    """The harness's model, with the seconds that it took for log-likelihoods, of the processor and of the wall clock."""

    seconds = wall = 0.0

    def loglikelihood(self, *arguments: Any, **options: Any) -> Any:
        start, began = time.process_time(), time.perf_counter()
        found = super().loglikelihood(*arguments, **options)
        self.seconds += time.process_time() - start
        self.wall += time.perf_counter() - began
        return found


def harness(model: Timed, name: str, limit: int, folder: Path) -> list[dict[str, Any]]:
    """The harness's samples of one task, one per row, in order: its own task, reading our file."""
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name]),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(DATA / "zeroshot" / f"{name}.jsonl")}, "cache_dir": str(folder)},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    manager = TaskManager(include_defaults=False)
    asked = {"limit": limit, "task_manager": manager, "log_samples": True}
    found = lm_eval.simple_evaluate(model, tasks=[str(folder / f"{name}.yaml")], **asked)
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def compare(ours: Answers, samples: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = [
        (mine.nats, float(theirs[0]))
        for scores, sample in zip(ours.scores, samples, strict=True)
        for mine, theirs in zip(scores, sample["filtered_resps"], strict=True)
    ]
    return {
        "rows": len(samples),
        **{metric: sum(right) / len(right) for metric, right in ours.right.items()},
        "rows_that_differ": {
            metric: sum(mine != bool(sample[metric]) for mine, sample in zip(right, samples, strict=True))
            for metric, right in ours.right.items()
        },
        "largest_difference_nats": max(abs(mine - theirs) for mine, theirs in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="the harness's batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = uniprune.load(smollm2(), dtype="float32", device="cpu")
    model = Timed(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=options.batch)
    rows, seconds, wall = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:  # in turns, so that what else the machine does befalls both
            task = load_task(str(DATA / "zeroshot" / f"{name}.jsonl"), options.limit)
            start, began = time.process_time(), time.perf_counter()
            (ours,) = answer(loaded.model, [task], [tokenise(task, loaded.tokenizer, context(loaded.model.config))])
            seconds, wall = seconds + time.process_time() - start, wall + time.perf_counter() - began
            print(f"{seconds:.1f} s, wall {wall:.1f} s", flush=True)
            rows.append({"task": name, **compare(ours, harness(model, name, options.limit, Path(folder)))})
            print(f"harness {model.seconds:.1f} s, wall {model.wall:.1f} s", flush=True)
    facts = {"lm_eval": lm_eval.__version__, "batch": options.batch, "seconds": seconds, "harness_seconds": model.seconds}
    facts |= {"wall": wall, "harness_wall": model.wall}
    print(facts, *rows, sep="\n")
    save("zeroshot", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
