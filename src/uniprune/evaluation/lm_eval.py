"""lm-evaluation-harness on a model in memory: any of its tasks, for what the native scorer does not have."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from uniprune.checkpoints.configuration import UNBOUNDED, context
from uniprune.errors import InputError, first_line
from uniprune.evaluation.perplexity import NOT_FINITE
from uniprune.evaluation.request import EvaluationRequest
from uniprune.models.blocks import device_of, text_alone
from uniprune.models.loading import Loaded

BATCH, PROBE = 8, 16  # rows at a time; tokens on which a model is tried
SECOND_BOS = (
    "its rolling log-likelihood begins every document with BOS, and so does the tokenizer: the second one is scored, too, "
    "which a model never sees (uniprune evaluate --rolling --bos each leaves it out)"
)


Marks = dict[str, dict[str, dict[int, bool]]]
"""Task -> metric -> question, by its place in the data set -> whether it was answered rightly."""


class HarnessRun(NamedTuple):
    """values: task -> metric -> value, standard errors as ``<metric>_stderr``. notes: what is to be known beside them."""

    values: dict[str, dict[str, float]]
    right: Marks
    notes: list[str]


class Harness:
    """Tasks of lm-evaluation-harness, by name or as .yaml files, found and fetched before any weight is loaded.

    Raises InputError if the harness is not installed, or a task cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError("--lm-eval needs lm-evaluation-harness; pip install lm_eval") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._names, self._manager = list(names), TaskManager()
        try:
            loaded = self._manager.load(self._names)
        except Exception as error:  # its own kinds, those of YAML and those of datasets
            raise InputError(f"--lm-eval {','.join(names)}: a task cannot be loaded: {first_line(error)}") from error

        self._refuse_code(loaded["tasks"])

    def _refuse_code(self, tasks: dict[str, Any]) -> None:
        found = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
        if found and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            run = "runs programs that the model writes; where they can do no harm, allow it with HF_ALLOW_CODE_EVAL=1"
            raise InputError(f"--lm-eval {', '.join(found)} {run}")

    @property
    def version(self) -> str:
        return importlib.metadata.version("lm_eval")

    def run(self, loaded: Loaded, request: EvaluationRequest) -> HarnessRun:
        """Asks a model the first ``limit`` rows of each task.

        Raises InputError for a model whose logits are not finite: the harness counts its first choices as right.
        """
        from lm_eval import simple_evaluate

        with text_alone(loaded.model), torch.no_grad():
            logits = loaded.model(input_ids=torch.arange(PROBE, device=device_of(loaded.model))[None], use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise InputError(NOT_FINITE)
        model = _watched(loaded)
        asked: dict[str, Any] = {"limit": request.limit, "num_fewshot": request.num_fewshot, "log_samples": True}
        asked["confirm_run_unsafe_code"] = True  # _refuse_code has asked
        found = simple_evaluate(model, tasks=self._names, task_manager=self._manager, **asked)
        values = {task: _numbers(by_metric) for task, by_metric in found["results"].items()}
        return HarnessRun(values, _marks(found["samples"]), model.notes())


def _watched(loaded: Loaded) -> Any:
    """The harness's own model around one in memory, which tells what it did to the requests: ``notes()``."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        cut, requests, second_bos = 0, 0, False

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            self.requests += len(requests)
            self.cut += sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
            return super()._loglikelihood_tokens(requests, **options)

        def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **options: Any) -> Any:
            self.requests += len(strings)
            if left_truncate_len:
                self.cut += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
            return super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **options)

        def loglikelihood_rolling(self, requests: Any, **options: Any) -> Any:
            self.second_bos |= self.tok_encode("a")[:1] == [self.prefix_token_id]
            return super().loglikelihood_rolling(requests, **options)

        def notes(self) -> list[str]:
            found = [SECOND_BOS] if self.second_bos else []
            if self.cut:
                cut = f"{self.cut} of {self.requests} requests were cut at their beginning"
                found.append(f"{cut} to the context of {self.max_length} tokens")
            return found

    limit = context(loaded.model.config)
    # Versions before 0.4.12 do not look into the configuration of the text model that a multi-modal one has inside.
    options = {"max_length": limit} if limit < UNBOUNDED else {}
    return Watched(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH, **options)


def _marks(samples: dict[str, list[dict[str, Any]]]) -> Marks:
    """What its logged samples say, of metrics that are right or wrong for each question."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for task, logged in samples.items():
        for sample in logged:
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                found.setdefault(task, {}).setdefault(key, {})[sample["doc_id"]] = sample[metric]
    return {
        task: {
            metric: {question: bool(value) for question, value in values.items()}
            for metric, values in metrics.items()
            if all(isinstance(value, bool | int | float) and value in (0, 1) for value in values.values())
        }
        for task, metrics in found.items()
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Its keys are ``metric,filter``; the filter ``none`` is left out, and so is what is no number."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)  # a standard error that it does not compute is text
    }
