"""The verb ``evaluate``: how good a model is, by perplexity, by zero-shot accuracy, and beside another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from uniprune.common.progress import Progress, silent
from uniprune.common.provenance import sparsity, versions
from uniprune.data.tasks import load_task
from uniprune.data.text import Windows
from uniprune.errors import InputError
from uniprune.evaluation import reproduce
from uniprune.evaluation.divergence import check_same_tokens, closeness
from uniprune.evaluation.generation import prompts_of, side_by_side
from uniprune.evaluation.lm_eval import Harness
from uniprune.evaluation.model import Measured, Subject
from uniprune.evaluation.request import NEW_TOKENS, EvaluationRequest
from uniprune.models import masking
from uniprune.models.loading import Source, dtype_name
from uniprune.models.matrices import find_matrices


def evaluate(
    source: Source,
    *,
    text_source: str | Path | None = None,
    windows: int | None = None,
    length: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    against: Source | None = None,
    prompts: Sequence[str] = (),
    new_tokens: int | None = None,
    lm_eval: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Token perplexity or zero-shot accuracy of a model or an output folder, and the zeros it really has.

    text_source: as in data.text; a name stands for its evaluation part; by default ``builtin`` if nothing else is asked.
    windows: so many, spread evenly over the text; None takes all. length: tokens per window, by default 2048, or the model's
    context if that is shorter.
    tasks: names or .jsonl files, as in uniprune.data.tasks. limit: the first so many questions of each.
    against: another model, the dense one say. It answers the same questions: what is gained and lost comes with McNemar's p. It
    reads the same text: the divergence of their predictions, and greedy continuations, ``new_tokens`` long (by default 40; 0:
    none), of ``prompts`` or of three places of the text.
    lm_eval: tasks of lm-evaluation-harness, which must be installed.
    The result's ``protocol`` says how it was had; :func:`check` has it again.
    Raises InputError before any weight is loaded if something asked for cannot be done.
    """
    if limit is not None and not (tasks or lm_eval):
        raise InputError("--limit is a number of questions; give --tasks or --lm-eval")
    if against is None and (prompts or new_tokens is not None):
        raise InputError("--prompt and --new-tokens are for two models side by side; give --against")
    if text_source is None and not (tasks or lm_eval or prompts):
        text_source = "builtin"
    subject, other = Subject(source), None if against is None else Subject(against)
    if new_tokens is None:
        new_tokens = NEW_TOKENS if other is not None and subject.tokenizer is not None else 0
    chosen = None if text_source is None else subject.windows(text_source, windows, length)
    if other is not None and chosen is not None:
        check_same_tokens(chosen, other.windows(text_source, windows, length), str(other))  # type: ignore[arg-type]
        if new_tokens and not prompts:
            prompts = prompts_of(chosen, subject.tokenizer)
    asked = [load_task(name, limit) for name in tasks]
    for each in (subject, other) if other else (subject,):
        each.ask(chosen, asked, prompts if new_tokens else (), new_tokens)
    if lm_eval:
        subject.check_tokenizer()
    harness = Harness(lm_eval) if lm_eval else None

    loaded = subject.load(dtype, device)
    computed, place = dtype_name(next(loaded.model.parameters()).dtype), reproduce.machine(loaded.model)
    ours = subject.measure(loaded, progress, record=other is not None)
    request = EvaluationRequest(
        text_source=None if text_source is None else str(text_source),
        windows=windows,
        length=length,
        tasks=tuple(tasks),
        limit=limit,
        prompts=tuple(prompts),
        new_tokens=new_tokens if other else None,
        lm_eval=tuple(lm_eval),
        dtype=computed,
    )
    result: dict[str, Any] = {"model": str(loaded), "dtype": computed}
    result |= asdict(ours.perplexity) if ours.perplexity else {}
    result |= {"sparsity": _zeros(loaded.model), "versions": versions()}
    if asked:
        result["tasks"] = {given.task.name: given.record() for given in ours.answers}
    if harness:
        result["lm_eval"] = harness.run(loaded, limit)
        result["versions"]["lm_eval"] = harness.version
    how = {"request": request.model_dump(), "weights_sha256": reproduce.weights_sha256(loaded.model), "machine": place}
    del loaded  # its memory is the other's

    if other:
        result["against"] = str(other)
        loaded = other.load(dtype, device)
        theirs = other.measure(loaded, progress, record=True)
        how["against_sha256"] = reproduce.weights_sha256(loaded.model)
        result |= _beside(ours, theirs, chosen, prompts, subject.tokenizer)
        for mine, reference in zip(ours.answers, theirs.answers, strict=True):
            result["tasks"][mine.task.name]["against"] = mine.against(reference)
    return result | {"protocol": how}


def check(
    path: Path,
    source: Source | None = None,
    *,
    against: Source | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Has a result of :func:`evaluate` again and compares what was measured, value by value.

    path: its JSON file. source, against: the models, if they are not where they were. ``reproduced`` in what is returned:
    whether every value is the same; on a machine of another kind than the recorded one, whether all differ by under 1 %.
    Raises InputError if the file is no such result.
    """
    recorded, request = reproduce.read(path)
    if source is None and not isinstance(recorded.get("model"), str):
        raise InputError(f"result {path} names no model; give it: uniprune evaluate MODEL --check {path}")
    before, threads = recorded["protocol"].get("machine"), torch.get_num_threads()
    if isinstance(before, dict) and isinstance(count := before.get("threads"), int) and 0 < count <= 1024:
        torch.set_num_threads(count)  # sums depend on how they are split
    try:
        found = evaluate(
            source or recorded["model"],
            against=against or recorded.get("against"),
            device=device,
            progress=progress,
            **request.model_dump(),
        )
    finally:
        torch.set_num_threads(threads)
    differing = reproduce.differences(recorded, found)
    same_machine = before == found["protocol"]["machine"]
    return {
        "result": str(path),
        "reproduced": not differing if same_machine else all(difference.within for difference in differing),
        "same_machine": same_machine,
        "differences": [difference._asdict() for difference in differing],
        "versions": {"recorded": recorded.get("versions"), "now": found["versions"]},
    }


def _beside(
    ours: Measured, theirs: Measured, windows: Windows | None, prompts: Sequence[str], tokenizer: Any
) -> dict[str, Any]:
    """What the two models' predictions have in common."""
    found: dict[str, Any] = {}
    if windows is not None and ours.recording and theirs.recording and theirs.perplexity:
        found["closeness"] = asdict(closeness(ours.recording, theirs.recording, windows))
        found["closeness"]["reference_perplexity"] = theirs.perplexity.perplexity
    if theirs.written:
        found["generations"] = side_by_side(prompts, ours.written, theirs.written, tokenizer)
    return found


def _zeros(model: torch.nn.Module) -> float | None:
    """Fraction of exact zeros among the prunable weights; None for a model that can be evaluated, but not pruned."""
    try:
        matrices = find_matrices(model)
    except InputError:
        return None
    return sparsity(masking.zeros(matrices), {name: matrix.shape for name, matrix in matrices.items()})
