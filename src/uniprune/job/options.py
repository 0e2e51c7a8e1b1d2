"""Where and how a run computes, and what it does about earlier output, described once: all that is no part of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, TypedDict

from pydantic import BeforeValidator, Field

from uniprune.common.formatting import parse_size
from uniprune.common.options import Flag, Options

Execution = Literal["resident", "recomputed", "offloaded", "sharded", "streamed"]


class Traits(NamedTuple):
    """How an execution runs a model.

    in_memory: whether the whole model is in the memory of the device that computes, else blocks come and go. recompute: whether
    a step of the controller computes a block's activations again. states: where what the controller keeps of each weight lies:
    in that memory, in the host's beside a GPU's, or on disk.
    """

    in_memory: bool
    recompute: bool
    states: Literal["device", "host", "disk"]


EXECUTIONS: dict[Execution, Traits] = {
    "resident": Traits(in_memory=True, recompute=False, states="device"),
    "recomputed": Traits(in_memory=True, recompute=True, states="device"),
    "offloaded": Traits(in_memory=True, recompute=True, states="host"),
    "sharded": Traits(in_memory=False, recompute=True, states="disk"),
    "streamed": Traits(in_memory=False, recompute=True, states="disk"),
}
"""From the fastest to the slowest."""


def saved_as(execution: Execution) -> Execution:
    """The name in an interrupted run: where the model is in memory progress is the same, so that each goes on with it."""
    return "resident" if EXECUTIONS[execution].in_memory else execution


Size = BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)


class RunOptions(Options):
    """Where and how to run. It changes the masks by rounding at most: where blocks are streamed, where several processes share
    the run, and on a GPU, sums are taken in another order."""

    heading: ClassVar[str] = "Run"

    device: Annotated[str | None, Flag(default="cuda where there is one")] = Field(
        default=None, description="Where to compute: cpu, cuda or cuda:N."
    )
    max_memory: Annotated[int | None, Flag(metavar="SIZE", default="what is free"), Size] = Field(
        default=None,
        ge=1,
        description="Memory to use, e.g. 24GB; a model that needs more is run block by block from its files.",
    )
    execution: Annotated[Execution | None, Flag(default="the fastest that fits")] = Field(
        default=None,
        description="How the model is run: resident (in memory), recomputed (so, but each block's activations are computed "
        "again), offloaded (so, with the controller's state in host memory), sharded (over the processes) or streamed (from "
        "its files).",
    )
    save_tokens: Path | None = Field(
        default=None,
        description="Also write the calibration samples as a token file, to calibrate on the very same tokens again.",
    )
    resume: bool = Field(
        default=False, description="Resume an interrupted run, on a CPU to bit-identical masks; a no-op if there is none."
    )
    overwrite: bool = Field(default=False, description="Replace an existing output.")


class TableRunOptions(RunOptions):
    """The same for tables, which are written row by row."""

    resume: bool = Field(default=False, description="Keep the rows of an existing table and make those that it lacks.")


class RunKeywords(TypedDict, total=False):
    """The same as keywords of a function, for editors and type checkers."""

    device: str | None
    max_memory: int | str | None
    execution: Execution | None
    save_tokens: Path | None
    resume: bool
    overwrite: bool
