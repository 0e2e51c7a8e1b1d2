"""What ``compare`` found, as data: the schema of its ``comparison.json``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from uniprune.common.formatting import apart
from uniprune.data.text import TextFacts
from uniprune.evaluation.results import Evaluation, FollowedProtocol, Machine, TaskResult
from uniprune.saliency.record import ControllerRecord, Starved
from uniprune.sparsity.structure import Structure
from uniprune.storage.record import Count, Facts, Fraction, Record

COMPARISON = "comparison.json"  # in an output folder
DENSE = "dense"  # the method of the first row
UNIFORM = 0.005  # a smaller difference between matrices is rounding


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


class ComparisonRow(Facts):
    """A method at a sparsity, measured as every row is.

    method, pattern: as they were asked for; of a masks file the pattern is its own, spelled alike, of the dense model there is
    none.
    structure: what the pattern is. scope: the budget group of a fraction. updates_weights: whether kept weights were changed.
    recipe: what ``uniprune prune`` needs for the same masks, ``calibrate`` where it has no sparsity; empty where neither makes
    them. masks_digest: of the masks alone (``artefacts.masks.digest``). file_sha256: of a scores or masks file.
    by_position: perplexity by how many tokens of its sample a prediction saw. right: task -> metric -> which questions are
    answered rightly, a bit for each as a hexadecimal number, the last question the lowest. matrices: sparsity of each, where
    they differ by more than rounding. written: greedy continuations of the protocol's prompts.
    seconds: by stage; rows of one calibration all have its time. resumed: whether it is the time since an interruption.
    measured: when, ISO 8601.
    """

    method: str
    pattern: str | None = None
    structure: Structure | None = None
    scope: str | None = None
    sparsity: Fraction
    updates_weights: bool = False
    perplexity: float
    nats_stderr: float | None = None
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    by_position: dict[str, float] | None = None
    tasks: dict[str, TaskResult] = {}
    right: dict[str, dict[str, Annotated[str, Field(pattern="^[0-9a-f]+$")]]] = {}
    matrices: dict[str, Fraction] = {}
    written: list[str] = []
    seconds: dict[str, float] = {}
    resumed: bool = False
    recipe: dict[str, Any] = {}
    controller: ControllerRecord | None = None
    starved: Starved | None = None
    masks_digest: str | None = None
    file_sha256: str | None = None
    measured: Annotated[str, AfterValidator(_moment)]

    @property
    def key(self) -> tuple[str, str | None]:
        """What no other row of the table has."""
        return self.method, self.pattern

    def flips(self, other: ComparisonRow, task: str, metric: str) -> tuple[int, int] | None:
        """Answers gained and lost against another row; None where one of them has not said which are right."""
        found = [row.right.get(task, {}).get(metric) for row in (self, other)]
        if None in found:
            return None
        mine, theirs = (int(bits or "0", 16) for bits in found)
        return (mine & ~theirs).bit_count(), (theirs & ~mine).bit_count()


class ComparisonProtocol(Facts):
    """How all rows were made and measured. settings: those of the request that are not a row's own.

    calibration, text: what was read for either. windows, length, stride: of the evaluation. tasks: hashes of the questions.
    """

    settings: dict[str, Any] = {}
    calibration: TextFacts | None = None
    text: TextFacts | None = None
    windows: Count | None = None
    length: Count | None = None
    stride: Count | None = None
    tasks: dict[str, str | None] = {}
    prompts: list[str] = []
    dtype: str | None = None
    weights_sha256: str | None = None
    machine: Machine | None = None
    versions: dict[str, str] = {}


class Comparison(Record):
    """A table of methods, the dense model first.

    methods, sparsities: all that were asked for, also those without a row yet. comparable: published protocols that the
    perplexities follow.
    """

    kind: Literal["comparison"] = "comparison"
    model: str
    methods: list[str] = []
    sparsities: list[str] = []
    protocol: ComparisonProtocol = ComparisonProtocol()
    comparable: list[FollowedProtocol] = []
    rows: list[ComparisonRow]

    @property
    def reading(self) -> Evaluation:
        """What of an evaluation all rows have in common."""
        how = self.protocol
        return Evaluation(
            model=self.model,
            comparable=self.comparable,
            text=how.text,
            windows=how.windows,
            length=how.length,
            stride=how.stride,
        )

    @property
    def labels(self) -> dict[str, str]:
        """What to call methods: files without the folders that they are in, as far as that tells them apart."""
        return apart([*self.methods, *(row.method for row in self.rows)])

    @property
    def scopes(self) -> list[str]:
        """The budget groups of fractions, the commonest first: one if all methods have the same."""
        found = [row.scope for row in self.rows if row.scope]
        return sorted(dict.fromkeys(found), key=lambda scope: -found.count(scope))
