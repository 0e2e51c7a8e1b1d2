"""What the other verbs wrote, read back: output folders of ``prune`` and ``apply``, JSON of ``evaluate`` and of ``sweep``.

A file's kind is told by its fields. Only those that a report needs are checked; the others are kept as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uniprune.controller.protocol import ControllerRecord
from uniprune.errors import InputError

PRUNING = "pruning.json"
MEASURED = ("perplexity", "tasks", "lm_eval", "closeness", "generations")
OUTSIDE = "none"  # the block of a matrix whose name has no number

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A JSON object of which some fields are known; the others are in ``model_extra``."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Model(Record):
    name: str
    fingerprint: str | None = None


class Matrix(Record):
    """``shape`` is (out, in); ``sparsity`` the fraction of its weights that is removed."""

    shape: tuple[int, int]
    sparsity: Fraction

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class Pruning(Record):
    """``pruning.json``."""

    model: Model
    pattern: str
    sparsity: Fraction
    matrices: Annotated[dict[str, Matrix], Field(min_length=1)]
    controller: ControllerRecord | None = None

    @property
    def weights(self) -> int:
        """How many weights are prunable."""
        return sum(matrix.size for matrix in self.matrices.values())

    @property
    def grid(self) -> dict[tuple[str, str], float]:
        """Sparsity by (block, kind): the first number in a matrix's name, and what follows it. A block's experts are one."""
        totals: dict[tuple[str, str], list[float]] = {}
        for name, matrix in self.matrices.items():
            found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
            block, kind = found.groups() if found else (OUTSIDE, name)
            total = totals.setdefault((block, re.sub(r"(?<=\.)\d+(?=\.)", "*", kind)), [0.0, 0.0])
            total[0] += matrix.sparsity * matrix.size
            total[1] += matrix.size
        return {place: part / whole if whole else 0.0 for place, (part, whole) in totals.items()}


class Compared(Record):
    """Beside the same questions' answers by another model: its accuracy, answers gained and lost, McNemar's p."""

    reference: float
    gained: Count
    lost: Count
    p: float


class Task(Record):
    """Accuracies with standard errors; further metrics as extra fields."""

    questions: Count
    acc: float
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    against: dict[str, Compared] = {}


class Closeness(Record):
    """To the dense model on the same text: ``kl`` in nats per token, and how often both think the same token likeliest."""

    kl: float
    kl_stderr: float | None = None
    agreement: float
    agreement_stderr: float | None = None
    tokens: Count | None = None
    text: dict[str, Any] = {}
    reference_perplexity: float | None = None


class Generation(Record):
    """Greedy continuations of a prompt by a model and by the one it is compared with."""

    prompt: str
    model: str
    against: str
    same_tokens: Count | None = None
    tokens: Count | None = None


class Evaluation(Record):
    """What ``evaluate`` returns."""

    model: str
    sparsity: float | None = None
    perplexity: float | None = None
    windows: int | None = None
    length: int | None = None
    stride: int | None = None
    text: dict[str, Any] = {}
    tasks: dict[str, Task] = {}
    lm_eval: dict[str, dict[str, Any]] = {}
    against: str | None = None
    closeness: Closeness | None = None
    generations: list[Generation] = []
    protocol: dict[str, Any] = {}


class Row(Record):
    """One pattern of a sweep. ``bytes``: of the packed model."""

    pattern: str
    scope: str | None = None
    sparsity: Fraction
    perplexity: float
    bytes: Count | None = None


class Dense(Record):
    perplexity: float
    bytes: Count | None = None


class Sweep(Record):
    """Perplexities of many patterns, cut from the same scores and read on the same text."""

    model: str
    dense: Dense | None = None
    rows: Annotated[list[Row], Field(min_length=1)]
    protocol: dict[str, Any] = {}


Kind = TypeVar("Kind", Pruning, Evaluation, Sweep)


@dataclass(frozen=True)
class Source:
    """A file and what it says: ``data`` as it is written, ``result`` checked. ``path``: the folder, if it was one."""

    path: Path
    data: dict[str, Any]
    result: Pruning | Evaluation | Sweep

    @property
    def kind(self) -> str:
        return type(self.result).__name__.lower()


def read(path: Path) -> Source:
    """A source of a report: an output folder or a JSON file. Raises InputError that names the file if it is neither."""
    if path.name == PRUNING:
        path = path.parent
    if path.is_dir():
        file = path / PRUNING
        if not file.is_file():
            raise InputError(f"{path} has no {PRUNING}; give an output folder of prune or apply, or a JSON file of evaluate")
    else:
        file = path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not JSON; give what uniprune evaluate --json prints, or an output folder") from None
    try:
        return Source(path, data, _kind(file, data).model_validate(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{file} is damaged: {where}: {first['msg']}; make it anew") from None


def read_all(paths: Sequence[Path]) -> list[Source]:
    """Every source once, in the order given."""
    if not paths:
        raise InputError("a report needs sources; give output folders of prune or apply, or JSON files of evaluate")
    return list({source.path.resolve(): source for source in map(read, paths)}.values())


def _kind(file: Path, data: Any) -> type[Pruning] | type[Evaluation] | type[Sweep]:
    if isinstance(data, Mapping):
        if {"sweep", "rows"} <= data.keys():
            return Sweep
        if {"model", "pattern", "matrices"} <= data.keys():
            return Pruning
        if "model" in data and any(name in data for name in MEASURED):
            return Evaluation
    seen = f"an object with {', '.join(map(repr, list(data)[:4])) or 'nothing'}" if isinstance(data, Mapping) else "no object"
    raise InputError(f"{file} is no result of prune, apply, evaluate or sweep: it is {seen}")
