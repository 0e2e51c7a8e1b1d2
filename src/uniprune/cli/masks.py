"""The verbs on masks files: ``uniprune masks verify | diff | intersect | union | stats | convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uniprune.cli.options import AsJson, Output, Overwrite
from uniprune.cli.terminal import quiet, show
from uniprune.errors import InputError

app = typer.Typer(help="Verify, compare, combine, count and convert masks files.", no_args_is_help=True, rich_markup_mode=None)

Masks = Annotated[Path, typer.Argument(help="Masks file.")]
Several = Annotated[list[Path], typer.Argument(help="Masks files, two or more.")]
Model = Annotated[str | None, typer.Option(help="The dense model: a folder, a .gguf file, or a hub name.")]
Dtype = Annotated[str | None, typer.Option(help="Type that a GGUF model was pruned in.")]


@app.command()
def verify(
    masks: Masks,
    model: Model = None,
    pruned: Annotated[str | None, typer.Option(help="A checkpoint that these masks were applied to.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Check that a file is complete, that its pattern holds, and that it belongs to a model."""
    quiet()
    from uniprune.artefacts import mask_tools

    _tell(mask_tools.verify(masks, model, pruned, dtype=dtype), as_json)


@app.command()
def diff(
    first: Masks,
    second: Masks,
    force: Annotated[bool, typer.Option("--force", help="Compare masks of different models.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what two files keep in common, and what only one of them keeps."""
    from uniprune.artefacts import mask_tools

    _tell(mask_tools.diff(first, second, force=force), as_json)


@app.command()
def intersect(masks: Several, output: Output, overwrite: Overwrite = False, as_json: AsJson = False) -> None:
    """Keep what all files keep."""
    from uniprune.artefacts import mask_tools

    _tell(mask_tools.intersect(masks, output, overwrite=overwrite), as_json)


@app.command()
def union(masks: Several, output: Output, overwrite: Overwrite = False, as_json: AsJson = False) -> None:
    """Keep what any file keeps."""
    from uniprune.artefacts import mask_tools

    _tell(mask_tools.union(masks, output, overwrite=overwrite), as_json)


@app.command()
def stats(masks: Masks, as_json: AsJson = False) -> None:
    """Count sparsity by matrix and by block, dead rows and columns, and whether 2:4 holds."""
    from uniprune.artefacts import mask_tools

    _tell(mask_tools.stats(masks), as_json)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A pruned checkpoint, a masks file, or plain masks (.safetensors, .npz).")],
    output: Output,
    model: Model = None,
    to_plain: Annotated[bool, typer.Option("--to-plain", help="Write one boolean tensor for each checkpoint key.")] = False,
    check_bits: Annotated[
        bool, typer.Option("--check-bits/--no-check-bits", help="Refuse a checkpoint whose kept weights changed.")
    ] = True,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a pruned checkpoint or another tool's masks into a masks file, or a masks file into plain tensors."""
    quiet()
    from uniprune.artefacts import mask_tools

    if to_plain:
        result = mask_tools.to_plain(source, output, model, dtype=dtype, overwrite=overwrite)
    elif model is None:
        raise InputError("masks belong to a dense model; give it with --model, or --to-plain for the other direction")
    elif source.is_dir():
        result = mask_tools.from_checkpoint(source, model, output, check_bits=check_bits, dtype=dtype, overwrite=overwrite)
    else:
        result = mask_tools.from_plain(source, model, output, dtype=dtype, overwrite=overwrite)
    _tell(result, as_json)


def _tell(result: dict[str, Any], as_json: bool) -> None:
    """The facts of the whole in lines; those of each matrix are for --json."""
    lines = [f"{key}: {value}" for key, value in result.items() if not isinstance(value, dict) or len(value) < 8]
    show(result, as_json, "\n".join(lines))
