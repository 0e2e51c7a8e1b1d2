"""Every setting of a run, described once: recipes, the command line, docs/cli.md and the README's table are made from here.

How settings go together, and what they are turned into, is ``recipe``'s. This module loads no PyTorch, so ``--help`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from uniprune.common.options import Alone, Flag, Name, Number, Options, Several
from uniprune.sparsity.choices import Scope, Unsupported

if TYPE_CHECKING:
    from uniprune.controller.protocol import Controller
    from uniprune.saliency.metrics import Metric
    from uniprune.sparsity.patterns.protocol import Pattern
else:  # objects are checked by ``recipe``, which may load PyTorch
    Controller = Metric = Pattern = Any
WINDOWS, LENGTH = 128, 512


class Sparsity(Options):
    """How many weights are removed, and how they are spread over the model."""

    heading: ClassVar[str] = "Sparsity"

    sparsity: Annotated[str | Pattern | None, Flag(("-s",), once=True), Number] = Field(
        default=None,
        description="Fraction of the weights to remove (0.6; 0.8@16x16 in tiles), or N:M: N of every M consecutive inputs "
        "are kept (2:4).",
    )
    sparsity_type: Annotated[str | None, Flag(metavar="TYPE")] = Field(
        default=None,
        exclude=True,  # folded into sparsity
        description="unstructured or N:M next to a fraction, as in Wanda's scripts: --sparsity 0.5 --sparsity-type 2:4.",
    )
    size: Annotated[str | None, Flag(metavar="SIZE"), Number] = Field(
        default=None, description="Target size of the packed archive instead of a sparsity, e.g. 120MB; see uniprune pack."
    )
    experts: Annotated[float | None, Flag(metavar="FRACTION")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="Instead of a sparsity: fraction of the experts of a mixture (MoE) to remove whole, as many in each layer; "
        "see docs/experts.md.",
    )
    scope: Annotated[Scope | None, Flag(default="model with feedback and fisher, else row")] = Field(
        default=None, description="Granularity of the sparsity target: per row, matrix, decoder block, or global (model)."
    )
    allow: Annotated[tuple[str, ...], Flag(metavar="N:M,..."), Several] = Field(
        default=(),
        description="N:M patterns (and dense) to choose from for each linear layer, to reach the sparsity in all.",
    )
    rules: Annotated[tuple[str, ...], Flag(name="--rule", metavar="REGEX=WHAT"), Several] = Field(
        default=(),
        description="For linear layers whose name matches: dense, a pattern (2:4), a sparsity (0.5) or a range of sparsities "
        "(0.3..0.7). The first match counts.",
    )
    hardware: str = Field(
        default="any", description="Kernels that every pruned layer must suit: any, nvidia-semi-structured or block."
    )
    unsupported: Annotated[Unsupported, Flag(("--misfits",))] = Field(
        default="refuse",
        description="Linear layers whose shape does not support the pattern: fail, keep dense, or prune unstructured.",
    )


class Method(Options):
    """How weights are chosen."""

    heading: ClassVar[str] = "Method"

    metric: Annotated[str | Metric, Flag(once=True)] = Field(
        default="wanda",
        description="Saliency metric: magnitude, wanda, ria:a=0.5 or stochria:a=0.5,beta=0.1; of whole experts also reap.",
    )
    controller: Annotated[
        str | Controller | None, Flag(metavar="NAME", default="feedback; none with --sequential or reap", once=True)
    ] = Field(
        default=None,
        description="Corrects the metric's scores by the loss of the whole pruned model: feedback (mirror descent), "
        "fisher (each output weighted by its loss gradient: one backward pass, no descent), unipruning (the published "
        "objective, for comparison) or none (the metric alone).",
    )
    budget_tokens: Annotated[int | None, Flag(default="each calibration sample once")] = Field(
        default=None, ge=1024, description="Tokens for the controller, repeats included: more time, better masks."
    )
    steps: Annotated[int | None, Flag(default="as many as --budget-tokens allows")] = Field(
        default=None, ge=1, description="Steps of the controller, at most."
    )
    tuning: Annotated[dict[str, bool | int | float | str], Flag(name="--set", metavar="NAME=VALUE")] = Field(
        default={}, description="A setting of the controller, e.g. step_size=0.006 or even_tokens=false."
    )
    sequential: bool = Field(
        default=False,
        description="Calibrate each block on the outputs of the already pruned blocks before it, as Wanda's own code does.",
    )
    refine: bool = Field(
        default=False,
        description="--sequential, then swap kept and pruned weights where this lowers the layer's reconstruction error.",
    )


class CalibrationSettings(Options):
    """The text that weights are scored on."""

    heading: ClassVar[str] = "Calibration samples"

    text: Annotated[tuple[str, ...] | str, Flag(("--dataset",)), Alone, Name] = Field(
        default="builtin",
        description="Calibration data: builtin (Python's language reference, which every Python has), wikitext2, c4, a file or "
        "folder of text, JSON, CSV, Parquet, ..., a Hub dataset (owner/name, owner/name:config), a token file, or self (what "
        "the model writes); several with shares of the tokens, e.g. --dataset c4 --dataset code=file.txt:0.25; see "
        "docs/text.md.",
    )
    field: Annotated[str | None, Flag(metavar="NAME", default="text, or a conversation's fields")] = Field(
        default=None, description="Field of a row that is its text."
    )
    split: Annotated[str | None, Flag(metavar="NAME", default="train")] = Field(
        default=None, description="Split of a Hub dataset."
    )
    bos: Annotated[
        Literal["each", "first", "none"] | None, Flag(default="each for Gemma; else first if the tokenizer adds it")
    ] = Field(default=None, description="Which calibration samples begin with the BOS token.")
    windows: Annotated[int | None, Flag(("--num-samples",), default=f"{WINDOWS}; all of a token file")] = Field(
        default=None, ge=1, description="Number of calibration samples."
    )
    length: Annotated[int | None, Flag(("--seq-len",), default=f"{LENGTH}; as it is in a token file")] = Field(
        default=None, ge=2, description="Sequence length: tokens per calibration sample."
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Random seed for calibration sampling and stochastic metrics.")


class Layers(Options):
    """What is pruned, and what it is computed in."""

    heading: ClassVar[str] = "Layers"

    include: Annotated[tuple[str, ...], Flag(metavar="REGEX"), Several] = Field(
        default=(), description="Prune only linear layers whose name matches."
    )
    exclude: Annotated[tuple[str, ...], Flag(metavar="REGEX"), Several] = Field(
        default=(), description="Keep linear layers whose name matches dense, e.g. 'layers\\.0\\.'."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type to compute in (auto: the checkpoint's, but float32 on a CPU that only emulates it). The output keeps "
        "the checkpoint's type; from a GGUF file it has this one.",
    )


class Settings(Layers, CalibrationSettings, Method, Sparsity):
    """All settings of a pruning run, of which a recipe is made."""
