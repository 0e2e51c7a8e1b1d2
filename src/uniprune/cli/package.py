"""The commands that hand checkpoints on: ``pack``, ``unpack`` and ``card``; and the upload to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from uniprune.cli.groups import Overwrite, Printed, Push, Target
from uniprune.cli.terminal import Bars, show
from uniprune.common.formatting import size
from uniprune.common.options import Options, Positional
from uniprune.errors import InputError
from uniprune.job.options import RunOptions


class Folder(Options):
    folder: Annotated[Path, Positional()] = Field(description="Checkpoint folder, as prune or apply writes it.")


class Level(Options):
    level: int = Field(default=3, description="Compression level of zstandard, for files that are no weights.")


class Runtime(Options):
    runtime: bool = Field(default=False, description="Write a folder to run, not an archive: uniprune.accelerate opens it.")


class Archive(Options):
    path: Annotated[Path, Positional("FILE")] = Field(description="Archive, as pack writes it.")


class Results(Options):
    results: Annotated[tuple[Path, ...], Positional("[RESULTS]...")] = Field(
        default=(), description="Results of evaluate for this checkpoint, to show in the card."
    )


def pack(source: Folder, target: Target, options: Level, layout: Runtime, over: Overwrite, printed: Printed) -> None:
    if layout.runtime:
        if options.given():
            raise InputError("--level compresses an archive; leave it out with --runtime, which compresses nothing")
        return pack_to_run(source, target, over, printed)
    from uniprune.artefacts.archive import pack

    with Bars() as progress:
        result = pack(source.folder, target.output, **over.given(), **options.given(), progress=progress)
    line = f"{target.output}: {size(result['archive_bytes'])}, {result['ratio']:.3f} of {source.folder}"
    show({"output": str(target.output), **result}, printed.as_json, line)


def pack_to_run(source: Folder, target: Target, over: Overwrite, printed: Printed) -> None:
    from uniprune.runtime.layout import pack

    with Bars() as progress:
        result = pack(source.folder, target.output, **over.given(), progress=progress)
    part = f"{size(result.bytes)}, {result.ratio:.3f} of {source.folder}"
    line = f"{target.output}: {part}; open it with uniprune.accelerate"
    show({"output": str(target.output), **result.record()}, printed.as_json, line)


def unpack(source: Archive, target: Target, over: Overwrite, printed: Printed) -> None:
    from uniprune.artefacts.archive import unpack

    with Bars() as progress:
        result = unpack(source.path, target.output, **over.given(), progress=progress)
    line = f"{target.output}: {result['files']} files, {size(result['bytes'])}, verified"
    show({"output": str(target.output), **result}, printed.as_json, line)


def card(source: Folder, more: Results, push: Push, over: Overwrite, printed: Printed) -> None:
    from uniprune.checkpoints.origin import CARD
    from uniprune.reporting import model_card

    upload = push_of(push, over)
    text = model_card.rewrite(source.folder, more.results, **over.given())
    result = {"card": str(source.folder / CARD), "text": text, **upload(source.folder)}
    lines = [f"{result['card']}: written", *([f"uploaded to {result['uploaded']}"] if "uploaded" in result else [])]
    show(result, printed.as_json, *lines)


def push_of(push: Push, over: Overwrite | RunOptions) -> Callable[[Path], dict[str, str]]:
    """What uploads an output folder, if that was asked for; it is checked now whether that can succeed."""
    repository = push.push_to_hub
    if repository is None:
        return lambda folder: {}
    from uniprune.reporting import model_card

    model_card.check_push(repository)
    return lambda folder: {"uploaded": model_card.push(folder, repository, overwrite=over.overwrite)}
