"""What ``compare`` is asked, described once: its arguments, its options on the command line, the keys of its recipe file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from uniprune.common.options import Commas, Flag, Name, Number, Options, Positional, Several, fault
from uniprune.errors import InputError
from uniprune.evaluation.request import NEW_TOKENS, EvaluationRequest
from uniprune.job.settings import CalibrationSettings, Layers
from uniprune.sparsity.choices import Scope, Unsupported
from uniprune.storage import recipe_file
from uniprune.tasks.catalogue import SUITES

if TYPE_CHECKING:
    from typing_extensions import Self

SUBJECT = ("model", "methods", "sparsities")  # what is compared; all other settings are the protocol that rows share


def _rejoined(names: Any) -> Any:
    """Methods as they were meant: a comma also parts the settings of one, ``stochria:a=0.5,beta=0.1``."""
    if not isinstance(names, tuple):
        return names
    found: list[Any] = []
    for name in names:
        if found and isinstance(name, str) and re.fullmatch(r"\w+=.*", name) and ":" in found[-1]:
            found[-1] += f",{name}"
        else:
            found.append(name)
    return tuple(found)


class Table(Options):
    """What has a row."""

    heading: ClassVar[str] = "Table"

    model: Annotated[str | None, Positional("[MODEL]"), Name] = Field(
        default=None, description="Model: a folder, a .gguf file, or a Hub name."
    )
    methods: Annotated[tuple[str, ...], Flag(("-m",), metavar="METHOD,..."), BeforeValidator(_rejoined), Commas, Number] = (
        Field(
            default=("magnitude", "wanda", "ria", "sparsegpt", "feedback"),
            description="Metrics (wanda, ria:a=0.5), controllers (feedback, fisher, unipruning; feedback:step_size=0.006), any "
            "(feedback, calibrated once for all sparsities), sequential, refine, sparsegpt (updates weights, in memory only), "
            "scores or masks files.",
        )
    )
    sparsities: Annotated[tuple[str, ...], Flag(("-s",), name="--sparsity", metavar="SPARSITY,..."), Commas, Number] = Field(
        default=("0.5", "2:4"), description="Sparsities and N:M patterns, separated by commas."
    )
    scope: Annotated[Scope | None, Flag(default="model for feedback, fisher and any, else row")] = Field(
        default=None,
        description="Granularity of fractions, the same for all methods: per row, matrix, decoder block, or global (model).",
    )
    rules: Annotated[tuple[str, ...], Flag(name="--rule", metavar="REGEX=WHAT"), Several] = Field(
        default=(), description="For linear layers whose name matches: dense, a pattern (2:4) or a sparsity (0.5)."
    )
    unsupported: Annotated[Unsupported, Flag(("--misfits",))] = Field(
        default="refuse",
        description="Linear layers whose shape does not support the pattern: fail, keep dense, or prune unstructured.",
    )


class CalibrationRequest(Options):
    """What methods that calibrate have in common."""

    heading: ClassVar[str] = "Methods"

    metric: str = Field(default="wanda", description="Saliency metric that controllers, sequential and refine start from.")
    budget_tokens: Annotated[int | None, Flag(default="each calibration sample once")] = Field(
        default=None, ge=1024, description="Tokens for a controller, repeats included: more time, better masks."
    )
    steps: Annotated[int | None, Flag(default="as many as --budget-tokens allows")] = Field(
        default=None, ge=1, description="Steps of a controller, at most."
    )


class Evaluated(Options):
    """What every row is measured on."""

    heading: ClassVar[str] = "Evaluation"

    eval_text: Annotated[str, Flag(("--eval-dataset",), once=True), Name] = Field(
        default="builtin", description="Evaluation data: one text, of the kinds that --text takes."
    )
    eval_field: Annotated[str | None, Flag(metavar="NAME", default="text, or a conversation's fields")] = Field(
        default=None, description="Field of a row that is its text."
    )
    eval_split: Annotated[str | None, Flag(metavar="NAME", default="test or validation")] = Field(
        default=None, description="Split of a Hub dataset."
    )
    eval_windows: Annotated[int | None, Flag(("--eval-num-samples",), default="all")] = Field(
        default=None, ge=1, description="Number of evaluation samples, evenly spaced over the text."
    )
    eval_length: Annotated[int | None, Flag(("--eval-seq-len",), default="2048, or the model's context if that is shorter")] = (
        Field(default=None, ge=2, description="Sequence length: tokens per evaluation sample.")
    )
    eval_stride: Annotated[int | None, Flag(default="as --eval-length")] = Field(
        default=None, ge=1, description="Tokens from one evaluation sample to the next, for samples that overlap."
    )
    eval_bos: Annotated[
        Literal["each", "first", "none"] | None, Flag(default="each for Gemma; else first if the tokenizer adds it")
    ] = Field(default=None, description="Which evaluation samples begin with the BOS token.")
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK,..."), Commas, Name] = Field(
        default=(), description="Also zero-shot accuracy on piqa, arc_easy, ... or on files of rows, as in evaluate."
    )
    suite: str | None = Field(default=None, description=f"Also the tasks of a published table: {', '.join(SUITES)}.")
    num_fewshot: Annotated[int | None, Flag(default="0, gsm8k 5, a suite's own")] = Field(
        default=None, description="Solved examples before each question of tasks."
    )
    limit: Annotated[int | None, Flag(default="all")] = Field(
        default=None, description="Use only the first N examples of each task."
    )
    prompts: Annotated[tuple[str, ...], Flag(name="--prompt"), Several] = Field(
        default=(), description="Also the greedy continuation of a prompt by every row's model."
    )
    new_tokens: Annotated[int | None, Flag(default=f"{NEW_TOKENS}")] = Field(
        default=None, description="With --prompt: new tokens per prompt, at most."
    )


class ComparisonRequest(Layers, Evaluated, CalibrationSettings, CalibrationRequest, Table):
    """All that ``compare`` is asked: ``SUBJECT``, and the protocol that all rows share."""

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Self:
        """A request from a recipe file, as ``compare`` writes it; ``overrides`` win over what the file says.

        Raises InputError that names the file, or the setting at fault.
        """
        try:
            return cls(**(cls.named(recipe_file.read(path)) | cls.named(overrides)))
        except ValidationError as error:
            raise InputError(f"recipe {path}: {fault(error, cls)}") from None

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that all rows share, as JSON data, defaults included."""
        return self.model_dump(mode="json", exclude=set(SUBJECT))

    @property
    def spelled(self) -> str:
        """A recipe file (YAML) that asks for the same, defaults included."""
        given = {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [])}
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=128)

    @property
    def reading(self) -> EvaluationRequest:
        """What of it ``evaluate`` would be asked."""
        names = ("field", "split", "windows", "length", "stride", "bos")
        text = {name: getattr(self, f"eval_{name}") for name in names}
        tasks = {name: getattr(self, name) for name in ("tasks", "suite", "num_fewshot", "limit")}
        return EvaluationRequest.of(text_source=self.eval_text, dtype=self.dtype, **tasks, **text)


class ComparisonKeywords(TypedDict, total=False):
    """The fields of :class:`ComparisonRequest` as keywords of a function, for editors and type checkers."""

    methods: Sequence[str]
    sparsities: Sequence[str]
    scope: Scope | None
    rules: Sequence[str]
    unsupported: Unsupported
    metric: str
    budget_tokens: int | None
    steps: int | None
    text: str | Sequence[str]
    field: str | None
    split: str | None
    bos: Literal["each", "first", "none"] | None
    windows: int | None
    length: int | None
    seed: int
    eval_text: str | Path
    eval_field: str | None
    eval_split: str | None
    eval_windows: int | None
    eval_length: int | None
    eval_stride: int | None
    eval_bos: Literal["each", "first", "none"] | None
    tasks: Sequence[str | Path] | str | Path
    suite: str | None
    num_fewshot: int | None
    limit: int | None
    prompts: Sequence[str]
    new_tokens: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
