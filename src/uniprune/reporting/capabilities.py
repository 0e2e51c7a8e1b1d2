"""Tables of what tasks ask for: capabilities, each with the tasks that it is the mean of, and the parts of a task."""

from __future__ import annotations

from collections.abc import Sequence

from uniprune.common.formatting import NONE, points, short
from uniprune.evaluation.results import TaskResult
from uniprune.reporting.summary import ReportedModel
from uniprune.reporting.tables import Cell, Grid, asked, fraction
from uniprune.tasks.catalogue import FIELDS


def capabilities(subjects: Sequence[ReportedModel]) -> Grid | None:
    """One row for each model and capability."""
    rows: list[list[Cell]] = []
    for subject in subjects:
        for evaluation in subject.evaluations:
            for name, found in evaluation.capabilities.items():
                other: list[Cell] = [NONE, NONE]
                if found.reference is not None:
                    change = found.acc - found.reference
                    other = [fraction(found.reference), (points(change), 100 * change)]
                value = fraction(found.acc), fraction(found.stderr)
                rows.append([name, subject.label, *value, *other, ", ".join(map(short, found.tasks))])
    columns = ["capability:", "model:", "mean accuracy", "±", "other", "change, points", "of the tasks:"]
    return Grid("Capabilities: the mean of the tasks that ask for each", columns, rows) if rows else None


def parts(subjects: Sequence[ReportedModel], every: bool = False) -> Grid | None:
    """Accuracy by part of a task: the groups of subjects that it has, or ``every`` subject."""
    rows: list[list[Cell]] = []
    for subject, name, task in asked(subjects):
        for part in _shown(task, every):
            found = task.parts[part]
            value = fraction(found.value), fraction(found.stderr)
            rows.append([short(name), subject.label, part.replace("_", " "), str(found.n), *value])
    columns = ["task:", "model:", "part:", "n", "accuracy", "±"]
    return Grid("Parts of tasks", columns, rows, sortable=every) if rows else None


def _shown(task: TaskResult, every: bool) -> list[str]:
    groups = [part for part in task.parts if part in set(FIELDS.values())]
    return [part for part in task.parts if part not in groups] if every or not groups else groups
