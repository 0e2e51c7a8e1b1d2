"""The verb ``evaluate``: how good a model is, by perplexity, by zero-shot accuracy, and against another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from uniprune import masks as masking
from uniprune.errors import InputError
from uniprune.evaluation import perplexity
from uniprune.harness import Harness
from uniprune.job import Source, check_context, check_vocabulary, context, window_length
from uniprune.matrices import find_matrices
from uniprune.models import Loaded, dtype_name, load_tokenizer, load_weights, parse_device, parse_dtype, resolve, skeleton
from uniprune.progress import Progress, silent
from uniprune.record import sparsity, versions
from uniprune.scoring import Tokens
from uniprune.tasks import Task, load_task
from uniprune.text import Windows, load_windows
from uniprune.zeroshot import answer, tokenise


def evaluate(
    source: Source,
    *,
    text_source: str | Path | None = None,
    windows: int | None = None,
    length: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    against: Source | None = None,
    lm_eval: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Token perplexity or zero-shot accuracy of a model or an output folder, and the zeros it really has.

    text_source: as in uniprune.text; a name stands for its evaluation part; by default ``builtin`` if no tasks are given.
    windows: so many, spread evenly over the text; None takes all. length: tokens per window, by default 2048, or the model's
    context if that is shorter.
    tasks: names or .jsonl files, as in uniprune.tasks. limit: the first so many questions of each. against: a model that
    answers the same questions, the dense one say; what is gained and lost comes with McNemar's p.
    lm_eval: tasks of lm-evaluation-harness, which must be installed.
    Raises InputError before any weight is loaded if something asked for cannot be done.
    """
    if limit is not None and not (tasks or lm_eval):
        raise InputError("--limit is a number of questions; give --tasks or --lm-eval")
    if against is not None and not tasks:
        raise InputError("--against compares answers to questions; give --tasks")
    if text_source is None and not (tasks or lm_eval):
        text_source = "builtin"
    subject = _Subject(source)
    if tasks or lm_eval:
        subject.check_tokenizer()
    reference = None if against is None else _Subject(against)
    if reference:
        reference.check_tokenizer()
    chosen = None if text_source is None else subject.windows(text_source, windows, length)
    asked = [load_task(name, limit) for name in tasks]
    ours, theirs = subject.tokenised(asked), reference.tokenised(asked) if reference else []
    harness = Harness(lm_eval) if lm_eval else None

    loaded = subject.load(dtype, device)
    computed = dtype_name(next(loaded.model.parameters()).dtype)
    result: dict[str, Any] = {"model": str(loaded), "dtype": computed}
    result |= asdict(perplexity(loaded.model, chosen, progress)) if chosen else {}
    result |= {"sparsity": _zeros(loaded.model), "versions": versions()}
    if asked:
        answers = answer(loaded.model, asked, ours, progress)
        result["tasks"] = {given.task.name: given.record() for given in answers}
    if harness:
        result["lm_eval"] = harness.run(loaded, limit)
        result["versions"]["lm_eval"] = harness.version
    del loaded  # its memory is the reference's

    if reference:
        result["against"] = str(reference)
        others = answer(reference.load(dtype, device).model, asked, theirs, progress)
        for mine, other in zip(answers, others, strict=True):
            result["tasks"][mine.task.name]["against"] = mine.against(other)
    return result


class _Subject:
    """A model whose weights are loaded when everything that is asked of it was checked."""

    def __init__(self, source: Source) -> None:
        self._source = source if isinstance(source, Loaded) else resolve(source)
        if isinstance(self._source, Loaded):
            self._config, self._tokenizer = self._source.model.config, self._source.tokenizer
        else:
            self._config, self._tokenizer = skeleton(self._source).config, load_tokenizer(self._source)

    def __str__(self) -> str:
        return str(self._source)

    def check_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise InputError(
                f"model {self} has no tokenizer, so tasks cannot be asked; put its tokenizer's files into the folder"
            )

    def windows(self, text: str | Path, count: int | None, length: int | None) -> Windows:
        length = window_length(text, length, min(2048, context(self._config)))
        check_context(self._config, length)
        found = load_windows(text, self._tokenizer, use="evaluation", length=length, count=count)
        check_vocabulary(self._config, int(found.tokens.max()), text)
        return found

    def tokenised(self, tasks: Sequence[Task]) -> list[list[list[Tokens]]]:
        found = [tokenise(task, self._tokenizer, context(self._config)) for task in tasks]
        for task, questions in zip(tasks, found, strict=True):
            highest = max(max(choice.ids) for question in questions for choice in question)
            check_vocabulary(self._config, highest, f"task {task.name}")
        return found

    def load(self, dtype: str | None, device: str | None) -> Loaded:
        if isinstance(self._source, Loaded):
            return self._source
        return Loaded(load_weights(self._source, parse_dtype(dtype), parse_device(device)), self._tokenizer, self._source)


def _zeros(model: torch.nn.Module) -> float | None:
    """Fraction of exact zeros among the prunable weights; None for a model that can be evaluated, but not pruned."""
    try:
        matrices = find_matrices(model)
    except InputError:
        return None
    return sparsity(masking.zeros(matrices), {name: matrix.shape for name, matrix in matrices.items()})
