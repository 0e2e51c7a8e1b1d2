"""lm-evaluation-harness on a model in memory: any of its tasks, for what the native scorer does not have."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

import torch

from uniprune.errors import InputError, first_line
from uniprune.evaluation.perplexity import NOT_FINITE
from uniprune.models.blocks import device_of
from uniprune.models.loading import Loaded

BATCH, PROBE = 8, 16  # rows at a time; tokens on which a model is tried


class Harness:
    """Tasks of lm-evaluation-harness, by name or as .yaml files, found and fetched before any weight is loaded.

    Raises InputError if the harness is not installed, or a task cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError("--lm-eval needs lm-evaluation-harness; pip install 'uniprune[lm-eval]'") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._names, self._manager = list(names), TaskManager()
        try:
            self._manager.load(self._names)
        except Exception as error:  # its own kinds, those of YAML and those of datasets
            raise InputError(f"--lm-eval {','.join(names)}: a task cannot be loaded: {first_line(error)}") from error

    @property
    def version(self) -> str:
        return importlib.metadata.version("lm_eval")

    def run(self, loaded: Loaded, limit: int | None = None) -> dict[str, dict[str, float]]:
        """Task -> metric -> value, standard errors as ``<metric>_stderr``; the first ``limit`` rows of each task.

        Raises InputError for a model whose logits are not finite: the harness counts its first choices as right.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with torch.no_grad():
            logits = loaded.model(input_ids=torch.arange(PROBE, device=device_of(loaded.model))[None], use_cache=False).logits
        if not bool(torch.isfinite(logits).all()):
            raise InputError(NOT_FINITE)
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH)
        found = simple_evaluate(model, tasks=self._names, limit=limit, task_manager=self._manager, log_samples=False)
        return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Its keys are ``metric,filter``; the filter ``none`` is left out, and so is what is no number."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)  # a standard error that it does not compute is text
    }
