"""The commands on masks files: ``uniprune masks verify | diff | intersect | union | stats | import | export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from uniprune.cli.groups import Overwrite, Printed, Target
from uniprune.cli.terminal import quiet, show
from uniprune.common.formatting import percent
from uniprune.common.options import Options, Positional
from uniprune.errors import InputError

DETAILS = {"blocks", "matrices"}  # have lines of their own, or are for --json alone


class Masks(Options):
    masks: Annotated[Path, Positional()] = Field(description="Masks file.")


class Several(Options):
    masks: Annotated[tuple[Path, ...], Positional()] = Field(description="Masks files, two or more.")


class Two(Options):
    first: Annotated[Path, Positional()] = Field(description="Masks file.")
    second: Annotated[Path, Positional()] = Field(description="Masks file to compare it with.")
    force: bool = Field(default=False, description="Compare masks of different models.")


class Dense(Options):
    model: str | None = Field(default=None, description="The dense model: a folder, a .gguf file, or a Hub name.")
    dtype: str | None = Field(default=None, description="Type that a model from a GGUF file was pruned in.")


class Pruned(Options):
    pruned: str | None = Field(default=None, description="A checkpoint, or a GGUF file, that these masks were applied to.")


class Foreign(Options):
    source: Annotated[str, Positional()] = Field(
        description="Masks of another tool (.npz, .safetensors, .pt, a folder), or pruned model (as MODEL): docs/masks.md."
    )
    check_bits: bool = Field(default=True, description="Refuse a checkpoint whose kept weights changed.")


class Export(Options):
    format: str = Field(
        default="boolean",
        description="What reads them: boolean, maskllm, patch, torch-prune, compressed-tensors, modelopt.",
    )


def verify(file: Masks, dense: Dense, checkpoint: Pruned, printed: Printed) -> None:
    quiet()
    from uniprune.artefacts.mask_tools import verify

    _tell(verify(file.masks, dense.model, checkpoint.pruned, dtype=dense.dtype), printed)


def diff(files: Two, printed: Printed) -> None:
    from uniprune.artefacts.mask_tools import diff

    _tell(diff(files.first, files.second, force=files.force), printed)


def intersect(files: Several, target: Target, over: Overwrite, printed: Printed) -> None:
    from uniprune.artefacts.mask_tools import intersect

    _tell(intersect(files.masks, target.output, **over.given()), printed)


def union(files: Several, target: Target, over: Overwrite, printed: Printed) -> None:
    from uniprune.artefacts.mask_tools import union

    _tell(union(files.masks, target.output, **over.given()), printed)


def stats(file: Masks, printed: Printed) -> None:
    from uniprune.artefacts.mask_tools import stats

    facts = stats(file.masks)
    lines = [
        f"{block}: {percent(part['sparsity'])}, {part['empty_rows']} empty rows, {part['empty_columns']} empty columns"
        for block, part in facts["blocks"].items()
    ]
    show(facts, printed.as_json, "\n".join([*_lines(facts), *lines]))


def import_(foreign: Foreign, dense: Dense, target: Target, over: Overwrite, printed: Printed) -> None:
    quiet()
    from uniprune.artefacts.mask_conversion import import_masks

    if dense.model is None:
        raise InputError("masks belong to a dense model; give it with --model")
    given = {"check_bits": foreign.check_bits, "dtype": dense.dtype, **over.given()}
    _tell(import_masks(foreign.source, dense.model, target.output, **given), printed)


def export(file: Masks, wanted: Export, dense: Dense, target: Target, over: Overwrite, printed: Printed) -> None:
    quiet()
    from uniprune.artefacts.mask_conversion import export_masks

    given = {"dtype": dense.dtype, **over.given()}
    _tell(export_masks(file.masks, target.output, wanted.format, dense.model, **given), printed)


def _tell(result: dict[str, Any], printed: Printed) -> None:
    """The facts of the whole in lines; those of each matrix are for --json."""
    show(result, printed.as_json, "\n".join(_lines(result)))


def _lines(facts: Mapping[str, Any], before: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if not isinstance(value, Mapping):
            lines.append(f"{before}{key}: {value}")
        elif key not in DETAILS:
            lines += _lines(value, f"{before}{key}.")
    return lines
