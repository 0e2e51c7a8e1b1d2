"""The command ``evaluate``: how good a model is, by perplexity, by zero-shot accuracy, and beside another model."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uniprune.artefacts.reports import Pruning, report_of
from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import sparsity, versions
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation import reproduce
from uniprune.evaluation.answers import compared
from uniprune.evaluation.capabilities import capabilities
from uniprune.evaluation.divergence import check_same_tokens, closeness
from uniprune.evaluation.generation import check_same_prompts, prompts_of, side_by_side
from uniprune.evaluation.lm_eval import Harness, Marks
from uniprune.evaluation.model import EvaluatedModel, Measured, Questions
from uniprune.evaluation.perplexity import Documents, Perplexity
from uniprune.evaluation.protocols import followed_protocols
from uniprune.evaluation.request import NEW_TOKENS, EvaluationRequest
from uniprune.evaluation.results import Check, Closeness, Compared, Evaluation, Protocol, Versions
from uniprune.job.inference import inferring
from uniprune.models import masking
from uniprune.models.blocks import dtype_of
from uniprune.models.loading import Loaded, Source, dtype_name
from uniprune.models.matrices import find_matrices
from uniprune.storage.files import path_of
from uniprune.tasks.loading import load_task

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from uniprune.evaluation.request import EvaluationKeywords


@inferring
def evaluate(
    source: Source,
    *,
    against: Source | None = None,
    device: str | None = None,
    progress: Progress = silent,
    **asked: Unpack[EvaluationKeywords],
) -> Evaluation:
    """Token perplexity or accuracy on tasks of a model or an output folder, and the zeros it really has.

    asked: ``text_source`` (by default ``builtin`` if nothing else is asked), ``field``, ``split``, ``windows``, ``length``,
    ``stride``, ``bos``, ``rolling``; ``tasks``, ``suite``, ``num_fewshot``, ``limit``; ``prompts``, ``new_tokens``;
    ``lm_eval``; ``masks``; ``dtype``: the fields of :class:`uniprune.evaluation.request.EvaluationRequest`.
    against: another model, the dense one say. It answers the same questions: what is gained and lost comes with McNemar's p. It
    reads the same text: the divergence of their predictions, and greedy continuations of prompts.
    The result's ``protocol`` says how it was measured; :func:`check` reproduces it.
    Raises InputError before any weight is loaded if something asked for cannot be done.
    """
    request = EvaluationRequest.of(**asked)
    request.check(compared=against is not None)
    subject, other = EvaluatedModel(source, request.masks), None if against is None else EvaluatedModel(against)
    questions = _questions(request, subject, other)
    asked_of = [each.ask(questions) for each in (subject, other) if each]
    if other and request.prompts:
        check_same_prompts(questions.prompts, subject.tokenizer, other.tokenizer, str(other))
    if request.lm_eval:
        subject.check_tokenizer()
    harness = Harness(request.lm_eval) if request.lm_eval else None

    loaded = subject.load(request.dtype, device)
    with subject.pruned(loaded):
        ours = subject.measure(loaded, asked_of[0], progress, record=other is not None)
        computed = dtype_name(dtype_of(loaded.model))
        facts: dict[str, Any] = dict(ours.perplexity) if ours.perplexity else {}
        facts |= {"model": str(loaded), "dtype": computed, "quantised": loaded.quantised, "masks": request.masks}
        if ours.perplexity:
            facts["comparable"] = followed_protocols(facts["model"], ours.perplexity)
        facts |= {"sparsity": _zeros(loaded.model), "versions": versions()}
        if harness:
            by_harness = harness.run(loaded, request)
            facts["lm_eval"] = by_harness.values
            facts["versions"]["lm_eval"] = harness.version
            facts |= {"lm_eval_notes": by_harness.notes} if by_harness.notes else {}
        how: dict[str, Any] = {
            "request": _recorded(request, questions, computed, compared=other is not None),
            "weights_sha256": reproduce.weights_sha256(loaded.model),
            "machine": reproduce.machine(loaded.model),
            "masks_sha256": _masks_of(loaded),
        }
    theirs = Measured()
    if other:
        del loaded  # its memory is the other's
        loaded = other.load(request.dtype, device)
        theirs = other.measure(loaded, asked_of[1], progress, record=True)
        how["against_sha256"] = reproduce.weights_sha256(loaded.model)
        facts |= {"against": str(other), **_compared(ours, theirs, questions, subject.tokenizer)}
        if harness:
            reference = harness.run(loaded, request)
            facts["lm_eval_reference"] = reference.values
            facts["lm_eval_against"] = _compared_marks(by_harness.right, reference.right)
    if questions.tasks:
        pairs = zip_longest(ours.answers, theirs.answers)
        facts |= {"suite": request.suite, "tasks": {mine.task.name: mine.result(reference) for mine, reference in pairs}}
    parts = [facts.get(name, {}) for name in ("tasks", "lm_eval", "lm_eval_against")]
    facts["capabilities"] = capabilities(*parts)
    return Evaluation(**facts, protocol=Protocol(**how))


def check(
    path: str | Path,
    source: Source | None = None,
    *,
    against: Source | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Check:
    """Measures a result of :func:`evaluate` again and compares what was measured, value by value.

    path: its JSON file. source, against: the models, if they are not where they were. ``reproduced`` in what is returned:
    whether every value is the same; on a machine of another kind than the recorded one, whether all differ by under 1 %.
    Raises InputError if the file is no such result.
    """
    path = path_of(path)
    recorded, request = reproduce.read(path)
    if source is None and not recorded.model:
        raise InputError(f"result {path} names no model; give it: uniprune evaluate MODEL --check {path}")
    before, threads = recorded.protocol.machine, torch.get_num_threads()
    if before and before.threads and before.threads <= 1024:
        torch.set_num_threads(before.threads)  # sums depend on how they are split
    try:
        found = evaluate(
            source or recorded.model,
            against=against or recorded.against,
            device=device,
            progress=progress,
            **request.model_dump(),
        )
    finally:
        torch.set_num_threads(threads)
    differing = reproduce.differences(recorded.record(), found.record())
    same_machine = before == found.protocol.machine
    return Check(
        result=str(path),
        reproduced=not differing if same_machine else all(difference.within for difference in differing),
        same_machine=same_machine,
        differences=differing,
        versions=Versions(recorded=recorded.versions, now=found.versions),
    )


# ------------------------------------------------------------------------------------------------------------- parts


def _questions(request: EvaluationRequest, subject: EvaluatedModel, other: EvaluatedModel | None) -> Questions:
    """What both models are measured on. Raises InputError if they do not read the text alike, or it cannot be read."""
    prompts, new_tokens = request.prompts, request.new_tokens
    context = min(each.context for each in (subject, other) if each)
    windows: Windows | Documents | None = None
    if new_tokens is None:
        room = NEW_TOKENS if prompts else min(NEW_TOKENS, context // 2)
        new_tokens = room if other is not None and subject.tokenizer is not None else 0
    if request.text is not None:
        if request.rolling:
            windows = subject.documents(request.text, request)
        else:
            windows = subject.windows(request.text, request)
            if other is not None:
                check_same_tokens(windows, other.windows(request.text, request), str(other))
                if new_tokens and not prompts and windows.pictures is None:
                    prompts = tuple(prompts_of(windows, subject.tokenizer, context))
    tasks = [load_task(name, request.limit, fewshot) for name, fewshot in request.asked.items()]
    return Questions(windows, tasks, prompts if new_tokens else (), new_tokens)


def _recorded(request: EvaluationRequest, questions: Questions, dtype: str, compared: bool) -> EvaluationRequest:
    """The request with what its defaults became."""
    settings = request.model_dump() | {
        "text_source": request.text,
        "prompts": request.prompts or questions.prompts,
        "new_tokens": questions.new_tokens if compared else None,
        "dtype": dtype,
    }
    return EvaluationRequest(**settings)


def _compared(ours: Measured, theirs: Measured, questions: Questions, tokenizer: Any) -> dict[str, Any]:
    """What the two models' predictions have in common."""
    found: dict[str, Any] = {}
    if isinstance(questions.windows, Windows) and ours.recording and theirs.recording and theirs.perplexity:
        near = closeness(ours.recording, theirs.recording, questions.windows)
        found["closeness"] = _with_reference(near, theirs.perplexity)
    if theirs.written:
        found["generations"] = side_by_side(questions.prompts, ours.written, theirs.written, tokenizer)
    return found


def _with_reference(near: Closeness, reference: Perplexity) -> Closeness:
    """How close a model is, with the reference's perplexity: on all texts, and on each."""
    more: dict[str, Any] = {"reference_perplexity": reference.perplexity}
    if near.by_text:
        dense = {name: {"reference_perplexity": one.perplexity} for name, one in (reference.by_text or {}).items()}
        more["by_text"] = {name: one.model_copy(update=dense[name]) for name, one in near.by_text.items()}
    return near.model_copy(update=more)


def _compared_marks(ours: Marks, theirs: Marks) -> dict[str, dict[str, Compared]]:
    """The answers of two models to the harness's tasks, by task and metric, where both answered the same questions."""
    found: dict[str, dict[str, Compared]] = {}
    for task, metrics in ours.items():
        for metric, right in metrics.items():
            other = theirs.get(task, {}).get(metric, {})
            if right.keys() == other.keys():
                found.setdefault(task, {})[metric] = compared(list(right.values()), [other[question] for question in right])
    return found


def _masks_of(loaded: Loaded) -> str | None:
    """The hash of the masks that a folder says its model was pruned by; None if it says nothing."""
    report = report_of(loaded.origin.folder) if loaded.origin else None
    return report.masks_sha256 if isinstance(report, Pruning) else None


def _zeros(model: torch.nn.Module) -> float | None:
    """Fraction of exact zeros among the prunable weights; None for a model that can be evaluated, but not pruned."""
    try:
        matrices = find_matrices(model)
    except InputError:
        return None
    return sparsity(masking.zeros(matrices), {name: matrix.shape for name, matrix in matrices.items()})
