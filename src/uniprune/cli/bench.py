"""The verb that measures speed: ``uniprune bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from uniprune.cli.options import AsJson, Device
from uniprune.cli.terminal import Bars, quiet, show
from uniprune.errors import InputError

Number = TypeVar("Number", int, float)


def bench(
    model: Annotated[str, typer.Argument(help="Model: a folder, a .gguf file, or a hub name; its shapes alone are read.")],
    batch: Annotated[str, typer.Option(help="Tokens at a time.")] = "1,128",
    dtype: Annotated[str, typer.Option(help="Types to compute in.")] = "float32,bfloat16,float16",
    levels: Annotated[str, typer.Option(help="Fractions removed, where a kernel takes any.")] = "0.5,0.6,0.7,0.8,0.9,0.95",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether a model would be faster pruned, here: its matrix products, dense against every sparse kernel."""
    quiet()
    batches, fractions = _numbers(batch, int, "--batch"), _numbers(levels, float, "--levels")
    from uniprune.cli import tables
    from uniprune.entrypoints import bench as entry_bench

    with Bars() as progress:
        result = entry_bench.bench(
            model, dtypes=dtype.split(","), batches=batches, levels=fractions, device=device, progress=progress
        )
    show(result, as_json, tables.bench_table(result), *result["verdicts"], *result["notes"])


def _numbers(text: str, kind: Callable[[str], Number], flag: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        whole = "whole " if kind is int else ""
        raise InputError(f"{flag} {text!r} is no list; give {whole}numbers with commas between") from None
