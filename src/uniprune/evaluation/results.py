"""What ``evaluate``, its check and ``sweep`` found, as data: the schemas of their files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal
from typing import Protocol as Structural

from pydantic import Field

from uniprune.data.text import TextFacts
from uniprune.evaluation.request import EvaluationRequest
from uniprune.sparsity.structure import Structure
from uniprune.storage.record import Count, Facts, Fraction, Record

# --------------------------------------------------------------------------------------------------------- evaluate


class Compared(Facts):
    """Another model on the same questions: its accuracy, answers gained and lost against it, the p of McNemar's test."""

    reference: float
    gained: Count
    lost: Count
    p: float


class Accuracy(Facts):
    """The fraction of ``n`` truths, with its standard error."""

    value: float
    stderr: float | None = None
    n: Count | None = None


class TaskResult(Facts):
    """Accuracies on a task, with standard errors; ``perplexity``: of the answers of a cloze task. ``sha256``: of the questions.

    ``questions_cut``: how many are longer than the model's context, and lost their beginning. ``num_fewshot``: solved examples
    before each. ``capability``: what the task asks for.
    ``acc`` takes the choice with the highest log-likelihood, ``acc_norm`` the one with the highest per character. Of answers
    that are written, ``acc`` is what ``metric`` names, and ``others`` has what else they are judged by.
    ``parts``: acc by subject, after the groups of subjects. ``against``: by metric, the model that this one is compared with.
    """

    format: str | None = None
    questions: Count
    questions_cut: Count | None = None
    num_fewshot: Count | None = None
    capability: str | None = None
    sha256: str | None = None
    acc: float
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    perplexity: float | None = None
    metric: str | None = None
    others: dict[str, Accuracy] = {}
    parts: dict[str, Accuracy] = {}
    against: dict[str, Compared] = {}


class Capability(Facts):
    """The mean accuracy of the tasks that ask for one thing, all of which stand in ``tasks``; reference: the other model's.

    stderr: of the mean, the tasks' errors being independent.
    """

    tasks: list[str]
    acc: float
    stderr: float | None = None
    reference: float | None = None


class TextPerplexity(Facts):
    """The perplexity on one of several texts; nats_stderr as in :class:`PerplexityFacts`."""

    perplexity: float
    nats_stderr: float | None = None
    tokens: Count | None = None
    windows: Count | None = None


class Closeness(Facts):
    """How close a model's predictions are to a reference's on the same text.

    kl: mean KL(reference || model) of the next-token distributions, in nats per token. agreement: fraction of tokens at
    which both find the same next token likeliest. Errors are standard errors over windows: tokens of one window go together.
    by_text: the same on each of several texts.
    """

    kl: float
    kl_stderr: float | None = None
    agreement: float
    agreement_stderr: float | None = None
    tokens: Count | None = None
    windows: Count | None = None
    length: Count | None = None
    text: TextFacts | None = None
    reference_perplexity: float | None = None
    by_text: dict[str, Closeness] | None = None


class Generation(Facts):
    """Greedy continuations of a prompt by a model and by the one it is compared with; their first ``same_tokens`` agree."""

    prompt: str
    model: str
    against: str
    same_tokens: Count | None = None
    tokens: Count | None = None


class Machine(Facts):
    """What decides in which order numbers are added: on the same kind of machine results are the same to the last bit."""

    device: str | None = None
    kind: str | None = None
    threads: Count | None = None


class Protocol(Facts):
    """How a result was measured: what was asked, of which weights, on which machine.

    A request of another version, with settings that this one does not know, is kept as it is. masks_sha256: of the masks that
    the model's folder said it was pruned by.
    """

    request: Annotated[EvaluationRequest | dict[str, Any] | None, Field(union_mode="left_to_right")] = None
    weights_sha256: str | None = None
    machine: Machine | None = None
    against_sha256: str | None = None
    masks_sha256: str | None = None


class FollowedProtocol(Facts):
    """A published protocol that a result follows. ``metric``: which of its perplexities; ``dense``: published of its model."""

    protocol: str
    metric: str
    dense: float | None = None


class PerplexityFacts(Facts):
    """A perplexity, and everything that is needed to get the number again; None where it was not measured, or is not known.

    model: its name. quantised: how its files store weights as codes, if they do; they were dequantised to ``dtype``.
    perplexity = exp(nats / tokens), of ``windows`` of ``length`` tokens, one every ``stride``, fewer than ``length`` if they
    overlap. nats_stderr: standard error of the mean nats per token, by how windows (or documents) differ: what others of such
    text would have changed. It is about the relative error of the perplexity; two models read on the same windows differ by
    less. word_perplexity, byte_perplexity: exp(nats / words), / bytes, of the text that is predicted, as lm-evaluation-harness
    counts them. by_position: by how many tokens of its window a prediction saw. by_text: on each of several texts.
    """

    model: str = ""
    dtype: str | None = None
    quantised: str | None = None
    perplexity: float | None = None
    nats: float | None = None
    nats_stderr: float | None = None
    tokens: Count | None = None
    windows: Count | None = None
    length: Count | None = None
    stride: Count | None = None
    text: TextFacts | None = None
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    words: Count | None = None
    bytes: Count | None = None
    by_position: dict[str, float] | None = None
    by_text: dict[str, TextPerplexity] | None = None


class Evaluation(PerplexityFacts, Record):
    """What ``evaluate`` returns; what was not asked for is None, or empty.

    comparable: published protocols that the perplexity follows.
    masks: the file that the model was pruned by, in memory. sparsity: zeros among the prunable weights; None of a model that
    cannot be pruned. against: the model that this one is compared with. capabilities: what tasks ask for -> their mean.
    lm_eval: task -> metric -> value, by lm-evaluation-harness; lm_eval_notes: what is to be known beside them;
    lm_eval_reference: the same of the other model; lm_eval_against: both, by task and metric of right and wrong.
    """

    kind: Literal["evaluation"] = "evaluation"
    comparable: list[FollowedProtocol] = []
    masks: str | None = None
    sparsity: float | None = None
    versions: dict[str, str] = {}
    suite: str | None = None
    tasks: dict[str, TaskResult] = {}
    capabilities: dict[str, Capability] = {}
    lm_eval: dict[str, dict[str, float]] = {}
    lm_eval_notes: list[str] = []
    lm_eval_reference: dict[str, dict[str, float]] = {}
    lm_eval_against: dict[str, dict[str, Compared]] = {}
    against: str | None = None
    closeness: Closeness | None = None
    generations: list[Generation] = []
    protocol: Protocol = Protocol()

    @property
    def name(self) -> str:
        """What was measured."""
        return self.model if self.masks is None else f"{self.model} with {PurePath(self.masks).name}"


# ----------------------------------------------------------------------------------------------------- evaluate --check


class Difference(Facts):
    """A value that is not what was recorded; None where there is none. ``within``: by less than machines differ."""

    what: str
    recorded: Any
    found: Any
    within: bool


class Versions(Facts):
    """Software by name: the recorded result's and today's."""

    recorded: dict[str, str]
    now: dict[str, str]


class Check(Record):
    """What ``check`` returns. result: the file that was measured again."""

    kind: Literal["check"] = "check"
    result: str
    reproduced: bool
    same_machine: bool
    differences: list[Difference]
    versions: Versions


# ------------------------------------------------------------------------------------------------------------- sweep


class TextCosts(Facts):
    """What a pattern costs on one of several texts. kl: mean KL(dense || pruned) in nats per token."""

    perplexity: float
    kl: float


class Costs(Facts):
    """What a pattern costs in perplexity, and its packed model in bytes (estimated; None without the zstandard package).

    by_text: on each of several texts.
    """

    perplexity: float
    bytes: Count | None = None
    by_text: dict[str, TextCosts] | None = None


class Row(Costs):
    """One pattern of a sweep, as it was asked for. pareto: no other row beats it (:func:`unbeaten`)."""

    pattern: str
    structure: Structure | None = None
    scope: str | None = None
    sparsity: Fraction
    pareto: bool = False


class SweepProtocol(Facts):
    """How all rows were measured: on ``windows`` of ``length`` tokens, one every ``stride``."""

    text: TextFacts | None = None
    windows: Count | None = None
    length: Count | None = None
    stride: Count | None = None
    dtype: str | None = None
    scope: str | None = None
    weights_sha256: str | None = None
    machine: Machine | None = None
    versions: dict[str, str] = {}


class ScoresName(Facts):
    name: str
    sha256: str


class Sweep(Record):
    """Perplexities of many patterns, cut from the same scores and read on the same text. dense: of the dense model."""

    kind: Literal["sweep"] = "sweep"
    model: str
    scores: ScoresName | None = None
    protocol: SweepProtocol = SweepProtocol()
    dense: Costs | None = None
    rows: list[Row]


class Pruned(Structural):
    """A pruned model, by what it costs."""

    @property
    def perplexity(self) -> float: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def bytes(self) -> int | None: ...


def unbeaten(models: Sequence[Pruned]) -> list[bool]:
    """Of several pruned models of one dense model the Pareto front: whether no other beats it, for each.

    To beat is to be at least as good both in perplexity and in size, and better in one. Size is the packed model's where both
    have it, else what is removed. A perplexity that is not finite is on no front.
    """
    return [math.isfinite(one.perplexity) and not any(_beats(other, one) for other in models) for one in models]


def _beats(one: Pruned, other: Pruned) -> bool:
    packed = one.bytes is not None and other.bytes is not None
    mine, theirs = ((each.perplexity, float(each.bytes or 0) if packed else -each.sparsity) for each in (one, other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows of a sweep, those marked that no other beats."""
    return [row.model_copy(update={"pareto": best}) for row, best in zip(rows, unbeaten(rows), strict=True)]


class Sampled(Structural):
    """A result that says how its text was cut."""

    @property
    def text(self) -> TextFacts | None: ...
    @property
    def windows(self) -> int | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def stride(self) -> int | None: ...


def samples(facts: Sampled) -> str:
    """How a text was cut, in words: results that are not cut alike do not compare."""
    if facts.text and facts.text.rolling:
        return f"documents one by one, in pieces of {facts.length} tokens"
    stride = f", stride {facts.stride}" if facts.stride not in (None, facts.length) else ""
    return f"{facts.windows} samples of {facts.length} tokens{stride}"
