"""Rows as lm-evaluation-harness would have written them, for what reads its files: leaderboards, W&B, Trackio.

As its version 0.4.13: a folder for each model, in it ``results_<date>.json``. The numbers are this package's, and the files say
so (``model_source``, the version of each task).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from uniprune.common.formatting import apart, short
from uniprune.comparison.results import Comparison, ComparisonRow
from uniprune.evaluation.results import TaskResult
from uniprune.storage import strict_json

SOURCE = "uniprune"
METRICS = {"acc": True, "acc_norm": True, "perplexity": False, "word_perplexity": False, "byte_perplexity": False}
"""Whether higher is better."""


def files(found: Comparison) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each row the path of its file and what stands in it."""
    for row in found.rows:
        content, date = results(found, row), datetime.fromisoformat(row.measured).isoformat().replace(":", "-")
        yield f"{content['model_name_sanitized']}/results_{date}.json", content


def is_ours(path: Path) -> bool:
    """Whether a file is one of these, and none of lm-evaluation-harness itself."""
    try:
        return bool(strict_json.parse(path.read_bytes()).get("model_source") == SOURCE)
    except (OSError, ValueError):
        return False


def results(found: Comparison, row: ComparisonRow) -> dict[str, Any]:
    """A row as the harness has the results of a model."""
    labels = apart(row.tasks)
    tasks = dict(_tasks(found, row, labels))
    names = {name: list(values) for name, (values, _) in tasks.items()}
    shots = {_name(labels[name]): task.num_fewshot or 0 for name, task in row.tasks.items()}
    device = found.protocol.machine.device if found.protocol.machine else None
    versions = found.protocol.versions
    model = "-".join([short(found.model), *([] if row.pattern is None else [found.labels[row.method], row.pattern])])
    return {
        "results": {name: _result(name, values, count) for name, (values, count) in tasks.items()},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {name: _config(name, metrics, shots.get(name, 0)) for name, metrics in names.items()},
        "versions": dict.fromkeys(tasks, f"uniprune {versions.get('uniprune', 'unknown')}"),
        "n-shot": {name: shots.get(name, 0) for name in tasks},
        "higher_is_better": {name: {metric: METRICS[metric] for metric in metrics} for name, metrics in names.items()},
        "n-samples": {name: {"original": count, "effective": count} for name, (_, count) in tasks.items()},
        "config": {
            "model": "uniprune",
            "model_args": {"pretrained": found.model, "method": row.method, "sparsity": row.pattern},
            "model_dtype": found.protocol.dtype,
            "model_sha": found.protocol.weights_sha256,
            "batch_size": None,
            "device": device,
            "limit": found.protocol.settings.get("limit"),
        },
        "git_hash": None,
        "date": datetime.fromisoformat(row.measured).timestamp(),
        "transformers_version": versions.get("transformers"),
        "lm_eval_version": None,
        "task_hashes": {name: digest for name, digest in found.protocol.tasks.items() if digest},
        "model_source": SOURCE,
        "model_name": model,
        "model_name_sanitized": _folder(model),
        "total_evaluation_time_seconds": str(row.seconds.get("evaluate", 0.0)),
    }


def _tasks(
    found: Comparison, row: ComparisonRow, labels: Mapping[str, str]
) -> Iterator[tuple[str, tuple[dict[str, tuple[float, float | None]], int]]]:
    """By task, metric -> value and standard error, and the number of examples. A text is a task, too."""
    text = found.protocol.text.text if found.protocol.text else "text"
    error = None if row.nats_stderr is None else row.perplexity * row.nats_stderr
    read: dict[str, tuple[float, float | None]] = {"perplexity": (row.perplexity, error)}
    for name in ("word_perplexity", "byte_perplexity"):
        if (value := getattr(row, name)) is not None:
            read[name] = value, None
    yield f"{_name(text)}_perplexity", (read, found.protocol.windows or 0)
    for name, task in row.tasks.items():
        yield _name(labels[name]), (dict(_metrics(task)), task.questions)


def _metrics(task: TaskResult) -> Iterator[tuple[str, tuple[float, float | None]]]:
    for metric in ("acc", "acc_norm", "perplexity"):
        if (value := getattr(task, metric)) is not None:
            yield metric, (value, getattr(task, f"{metric}_stderr", None))


def _result(name: str, values: dict[str, tuple[float, float | None]], count: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": name, "alias": name, "sample_len": count}
    for metric, (value, error) in values.items():
        facts |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
    return facts


def _config(name: str, metrics: list[str], fewshot: int) -> dict[str, Any]:
    kind = "multiple_choice" if "acc" in metrics else "loglikelihood_rolling"
    listed = [{"metric": metric, "aggregation": "mean", "higher_is_better": METRICS[metric]} for metric in metrics]
    return {"task": name, "output_type": kind, "num_fewshot": fewshot, "metric_list": listed}


def _folder(model: str) -> str:
    """As the harness makes one of a model's name; a short one, below the folder it is in, whatever the name."""
    name = re.sub(r"[\"<>:/|\\?*\[\]\s\0]+", "__", model)[-150:]
    return name if name.strip(".") else f"model{name}"


def _name(text: str) -> str:
    """A name without what parts metrics and paths."""
    return re.sub(r"[^\w.-]+", "_", short(text))
