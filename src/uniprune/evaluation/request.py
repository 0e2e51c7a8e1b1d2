"""What ``evaluate`` is asked, described once: its arguments, its options on the command line, the protocol in its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypedDict

from pydantic import Field

from uniprune.common.options import Alone, Commas, Flag, Name, Options, Several
from uniprune.errors import InputError
from uniprune.sparsity.choices import Scope
from uniprune.tasks.catalogue import SUITES, Suite

NEW_TOKENS = 40


class Reading(Options):
    """The text that perplexity is measured on."""

    heading: ClassVar[str] = "Evaluation samples"

    text_source: Annotated[
        tuple[str, ...] | str | None, Flag(("--dataset",), name="--text", default="builtin"), Alone, Name
    ] = Field(
        default=None,
        description="Evaluation data: builtin, wikitext2, c4, a file or folder of text, JSON, CSV, Parquet, ..., a Hub dataset "
        "(owner/name, owner/name:config), or a token file; several, each by itself as well, e.g. --dataset c4 --dataset "
        "code=file.txt; see docs/text.md.",
    )
    field: Annotated[str | None, Flag(metavar="NAME", default="text, or a conversation's fields")] = Field(
        default=None, description="Field of a row that is its text."
    )
    split: Annotated[str | None, Flag(metavar="NAME", default="test or validation")] = Field(
        default=None, description="Split of a Hub dataset."
    )
    windows: Annotated[int | None, Flag(("--num-samples",), default="all")] = Field(
        default=None, ge=1, description="Number of evaluation samples, evenly spaced over the text; of each of several texts."
    )
    length: Annotated[int | None, Flag(("--seq-len",), default="2048, or the model's context if that is shorter")] = Field(
        default=None, ge=2, description="Sequence length: tokens per evaluation sample."
    )
    stride: Annotated[int | None, Flag(default="as --length")] = Field(
        default=None, ge=1, description="Tokens from one evaluation sample to the next, for samples that overlap."
    )
    bos: Annotated[
        Literal["each", "first", "none"] | None, Flag(default="each for Gemma; else first if the tokenizer adds it")
    ] = Field(default=None, description="Which evaluation samples begin with the BOS token.")


READS = tuple(name for name in Reading.model_fields if name != "text_source")  # how a text is read, if one is


class EvaluationRequest(Reading):
    """What ``evaluate`` was asked, apart from the models: its arguments."""

    heading: ClassVar[str] = "What to measure"

    rolling: bool = Field(
        default=False,
        description="Perplexity of every document by itself, all of its tokens predicted, as lm-evaluation-harness does; "
        "--windows is then the number of documents.",
    )
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK,..."), Commas, Name] = Field(
        default=(),
        description="Accuracy on piqa, mmlu, gsm8k, ..., or on files or folders of rows, whose fields tell the format.",
    )
    suite: str | None = Field(
        default=None, description=f"Also the tasks of a published table: {', '.join(SUITES)}; see docs/tasks.md."
    )
    num_fewshot: Annotated[int | None, Flag(default="0, gsm8k 5, a suite's own")] = Field(
        default=None, description="Solved examples before each question of --tasks, --suite and --lm-eval."
    )
    limit: Annotated[int | None, Flag(default="all")] = Field(
        default=None, description="Use only the first N examples of each task."
    )
    lm_eval: Annotated[tuple[str, ...], Flag(metavar="TASK,..."), Commas] = Field(
        default=(), description="Run these tasks through lm-evaluation-harness, which must be installed."
    )
    prompts: Annotated[tuple[str, ...], Flag(name="--prompt", default="three places of the text"), Several] = Field(
        default=(), description="With --against: prompt for greedy generation by both models."
    )
    new_tokens: Annotated[int | None, Flag(default=f"{NEW_TOKENS}")] = Field(
        default=None, description="With --against: new tokens per prompt, at most; 0 for no generation."
    )
    masks: Annotated[str | None, Flag(metavar="FILE"), Name] = Field(
        default=None, description="Measure the model pruned by this masks file, in memory; e.g. one that masks import made."
    )
    dtype: Annotated[str | None, Flag(default="auto, the model's if that is fast here")] = Field(
        default=None, description="Type to compute in: auto, float32, bfloat16 or float16."
    )

    def check(self, compared: bool) -> None:
        """Raises InputError for settings that do not go together. compared: whether there is another model."""
        asked = self.tasks or self.suite or self.lm_eval
        for flag, value in (("--limit is a number of questions", self.limit), ("--num-fewshot is for tasks", self.num_fewshot)):
            if value is not None and not asked:
                raise InputError(f"{flag}; give --tasks, --suite or --lm-eval")
        if self.suite is not None and self.suite not in SUITES:
            raise InputError(f"suite {self.suite!r} is none of {', '.join(SUITES)}; --tasks takes any list of tasks")
        for name in READS:
            if getattr(self, name) is not None and self.text is None:
                raise InputError(f"--{name} is for a text, and only tasks or prompts were asked for; give --text, too")
        if not compared and (self.prompts or self.new_tokens is not None):
            raise InputError("--prompt and --new-tokens are for two models side by side; give --against")
        if self.prompts and self.new_tokens == 0 and self.text is None and not asked:
            raise InputError("--new-tokens 0 writes nothing after a prompt, and nothing else was asked for; leave it out")
        if self.rolling and (compared or self.stride is not None or self.text is None):
            raise InputError("--rolling reads documents one by one; it goes with --text, and not with --against or --stride")
        if isinstance(self.text, tuple) and self.rolling:
            raise InputError("--rolling is for one text; give one --text at a time")

    @property
    def text(self) -> str | tuple[str, ...] | None:
        """The text to read, or several, if any is: by default ``builtin``, unless something else is asked for."""
        nothing_else = not (self.tasks or self.suite or self.lm_eval or self.prompts)
        return self.text_source if self.text_source not in (None, ()) else "builtin" if nothing_else else None

    @property
    def asked(self) -> dict[str, int | None]:
        """Every task by name, with the number of examples before its questions; None: as it is by default."""
        suite = SUITES[self.suite] if self.suite else Suite((), "")
        names = dict.fromkeys((*self.tasks, *suite.tasks))
        return {name: suite.fewshot.get(name) if self.num_fewshot is None else self.num_fewshot for name in names}


class SweepRequest(Reading):
    """What ``sweep`` measures each sparsity on. scope: the budget group of sparsities; dtype: to compute in."""

    scope: Scope | None = None
    dtype: str | None = None


class ReadingKeywords(TypedDict, total=False):
    """The fields of :class:`Reading` as keywords of a function, for editors and type checkers; so are the others."""

    text_source: str | Path | Sequence[str | Path] | None
    field: str | None
    split: str | None
    windows: int | None
    length: int | None
    stride: int | None
    bos: Literal["each", "first", "none"] | None


class EvaluationKeywords(ReadingKeywords, total=False):
    rolling: bool
    tasks: Sequence[str | Path] | str | Path
    suite: str | None
    num_fewshot: int | None
    limit: int | None
    lm_eval: Sequence[str]
    prompts: Sequence[str]
    new_tokens: int | None
    masks: str | Path | None
    dtype: str | None


class SweepKeywords(ReadingKeywords, total=False):
    scope: Scope | None
    dtype: str | None
