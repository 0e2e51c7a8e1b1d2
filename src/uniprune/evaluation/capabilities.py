"""What tasks ask for, as rows: knowledge, reasoning, language, code. Pruning takes them unevenly, and one mean hides it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import NamedTuple

from uniprune.evaluation.results import Capability, Compared, TaskResult
from uniprune.tasks.catalogue import CAPABILITIES, FIELDS, capability_of

_SUBJECTS = {f"mmlu_{subject}" for subject in FIELDS}
_GROUPS = {f"mmlu_{name.lower().replace(' ', '_')}" for name in FIELDS.values()}
_PREFERRED = ("acc", "exact_match,strict-match", "exact_match", "prompt_level_strict_acc", "pass@1", "pass_at_1")


class _Part(NamedTuple):
    task: str
    value: float
    stderr: float | None
    reference: float | None


def capabilities(
    tasks: Mapping[str, TaskResult],
    harness: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Compared]],
) -> dict[str, Capability]:
    """The mean of the tasks of each capability, of those that are asked: ours, and those of lm-evaluation-harness.

    harness: task -> metric -> value. compared: the same beside another model.
    """
    parts: dict[str, list[_Part]] = {}
    for name, task in tasks.items():
        if task.capability:
            reference = task.against["acc"].reference if "acc" in task.against else None
            parts.setdefault(task.capability, []).append(_Part(name, task.acc, task.acc_stderr, reference))
    inside = _inside(tasks.keys() | harness.keys())
    for name, metrics in harness.items():
        capability, metric = capability_of(name), next((one for one in _PREFERRED if one in metrics), None)
        if capability and metric and name not in tasks and name not in inside:
            other = compared.get(name, {}).get(metric)
            part = _Part(name, metrics[metric], metrics.get(_error(metric)), other.reference if other else None)
            parts.setdefault(capability, []).append(part)
    return {name: _mean(parts[name]) for name in CAPABILITIES if name in parts}


def _inside(names: Set[str]) -> Set[str]:
    """Rows that others are the mean of: beside MMLU the harness lists its groups and subjects, too."""
    if "mmlu" in names:
        return _GROUPS | _SUBJECTS
    return _GROUPS if names & _SUBJECTS else set()


def _error(metric: str) -> str:
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _mean(parts: list[_Part]) -> Capability:
    errors = [part.stderr for part in parts if part.stderr is not None]
    references = [part.reference for part in parts if part.reference is not None]
    count = len(parts)
    return Capability(
        tasks=[part.task for part in parts],
        acc=sum(part.value for part in parts) / count,
        stderr=math.hypot(*errors) / count if len(errors) == count else None,
        reference=sum(references) / count if len(references) == count else None,
    )
