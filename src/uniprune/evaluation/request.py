"""What ``evaluate`` is asked, described once: its arguments, its options on the command line, the protocol in its results."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from uniprune.common.options import Commas, Flag, Options, Several

NEW_TOKENS = 40


class Reading(Options):
    """The text that perplexity is measured on."""

    heading: ClassVar[str] = "Evaluation samples"

    text_source: Annotated[str | None, Flag(("--dataset",), name="--text", default="builtin")] = Field(
        default=None,
        description="Evaluation data: builtin, wikitext2, c4, a .txt, .jsonl or .parquet file, a folder, or a token file.",
    )
    windows: Annotated[int | None, Flag(("--num-samples",), default="all")] = Field(
        default=None, description="Number of evaluation samples, evenly spaced over the text."
    )
    length: Annotated[int | None, Flag(("--seq-len",), default="2048, or the model's context if that is shorter")] = Field(
        default=None, description="Sequence length: tokens per evaluation sample."
    )


class EvaluationRequest(Reading):
    """What ``evaluate`` was asked, apart from the models: its arguments."""

    heading: ClassVar[str] = "What to measure"

    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK,..."), Commas] = Field(
        default=(), description="Zero-shot accuracy on piqa, arc_easy, ... or on .jsonl files, whose fields tell the format."
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
    dtype: Annotated[str | None, Flag(default="auto, the model's if that is fast here")] = Field(
        default=None, description="Type to compute in: auto, float32, bfloat16 or float16."
    )
