"""Where what a run makes goes: a pruned checkpoint, a scores file, rows of a table, or the model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from uniprune.artefacts import writer
from uniprune.checkpoints.origin import Origin
from uniprune.data.sources import files_of
from uniprune.errors import InputError
from uniprune.job.forecast.prospect import Prospect
from uniprune.job.options import RunOptions
from uniprune.job.recipe import Recipe
from uniprune.models.checks import check_uncompiled, check_writable
from uniprune.models.loading import Loaded, parse_dtype
from uniprune.storage import files, runs


@dataclass(frozen=True)
class Destination:
    """Nothing is written, unless a subclass says what.

    path: what is written, beside which the run keeps its progress; None: it keeps none. compared: whether masks are measured
    there, one after the other.
    """

    path: Path | None
    compared: ClassVar[bool] = False

    def check_loaded(self, loaded: Loaded) -> None:
        """Raises InputError for a model in memory of which it cannot be made."""

    def check(self, recipe: Recipe, origin: Origin | None, options: RunOptions) -> None:
        """Raises InputError if a file or folder that the run writes may not be written, or is one that it reads."""
        self._check(files_of(recipe.text), origin.path if origin else None, options)

    def _check(self, texts: Sequence[Path], model: Path | None, options: RunOptions) -> None:
        if options.save_tokens is not None:  # that of an interrupted run is compared later on
            files.check_output_file(options.save_tokens, options.overwrite or options.resume, *_inputs(texts, model))

    def size_of(self, prospect: Prospect) -> int:
        """The disk space that it takes in the end."""
        return 0

    def check_space(self, needed: int) -> None:
        """Raises InputError if the disk has less than ``needed`` bytes free, or held by an interrupted run."""
        if self.path is not None:
            files.check_disk_space(self.path, needed, runs.held(self.path))


IN_PLACE = Destination(None)


@dataclass(frozen=True)
class ToTable(Destination):
    """``path``: the folder of a table, which ``compare`` writes."""

    compared: ClassVar[bool] = True


@dataclass(frozen=True)
class ToScores(Destination):
    """``path``: a scores file, whose name its writer checks."""

    path: Path

    def check_loaded(self, loaded: Loaded) -> None:
        check_uncompiled(loaded.model)

    def _check(self, texts: Sequence[Path], model: Path | None, options: RunOptions) -> None:
        if options.save_tokens is not None and options.save_tokens.resolve() == self.path.resolve():
            raise InputError(f"output {self.path} cannot hold both scores and tokens; give --save-tokens another name")
        super()._check(texts, model, options)
        files.check_output_file(self.path, True, *_inputs(texts, model))

    def size_of(self, prospect: Prospect) -> int:
        return 4 * sum(matrix.size for matrix in prospect.matrices.values())


@dataclass(frozen=True)
class ToCheckpoint(Destination):
    """``path``: an output folder. masks: whether it has those of the checkpoint as well."""

    path: Path
    masks: bool = True

    def check_loaded(self, loaded: Loaded) -> None:
        check_uncompiled(loaded.model)
        if loaded.origin is None or not loaded.origin.files:
            check_writable(loaded.model)

    def _check(self, texts: Sequence[Path], model: Path | None, options: RunOptions) -> None:
        tokens = options.save_tokens
        if tokens is not None and tokens.resolve().is_relative_to(self.path.resolve()):
            raise InputError(
                f"--save-tokens {tokens} lies in the output folder, which is replaced as a whole; give it another place"
            )
        super()._check(texts, model, options)
        instead = files.OTHER if options.resume else files.INSTEAD
        files.check_output_folder(self.path, options.overwrite, model, texts, instead=instead)

    def size_of(self, prospect: Prospect) -> int:
        parameters = list(prospect.model.parameters())
        masks = sum(matrix.size for matrix in prospect.matrices.values()) // 8 if self.masks else 0
        weights = sum(parameter.nbytes for parameter in parameters)
        if not isinstance(prospect.given, Loaded):
            dtype = parse_dtype(prospect.recipe.dtype) or torch.float32
            weights = sum(parameter.numel() for parameter in parameters) * dtype.itemsize
        origin = prospect.given.origin
        return masks + (writer.checkpoint_bytes(origin, weights) if origin else weights)


def _inputs(texts: Sequence[Path], model: Path | None) -> list[Path]:
    return [*texts, *([model] if model else [])]
