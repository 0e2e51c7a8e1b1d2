"""What ``bench`` measures, described once: its arguments and its options on the command line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from uniprune.common.options import Commas, Flag, Options


class Measurement(Options):
    """The products to time: of these batches, types and sparsities."""

    batches: Annotated[tuple[int, ...], Flag(name="--batch", metavar="N,..."), Commas] = Field(
        default=(1, 128), description="Tokens at a time: 1 as in generation for one user, more as in reading a prompt."
    )
    dtypes: Annotated[tuple[str, ...], Flag(name="--dtype", metavar="TYPE,..."), Commas] = Field(
        default=("float32", "bfloat16", "float16"), description="Types to compute in."
    )
    sparsities: Annotated[tuple[float, ...], Flag(("-s", "--levels"), name="--sparsity", metavar="X,..."), Commas] = Field(
        default=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        description="Sparsities to measure, where a kernel takes any; 2:4 and tiles are measured anyway.",
    )
    device: Annotated[str | None, Flag(default="cuda where there is one")] = Field(
        default=None, description="Where to measure: cpu or cuda."
    )
