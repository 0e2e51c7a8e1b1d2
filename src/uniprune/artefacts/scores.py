"""Scores files: a saliency on disk, from which masks of any sparsity are created."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.data.text import TextFacts
from uniprune.saliency.record import ControllerRecord, Starved
from uniprune.sparsity.patterns.protocol import Pattern
from uniprune.sparsity.views import Scores
from uniprune.storage import safetensors_index
from uniprune.storage.tensor_file import Metadata, open_tensors, stream_tensors

logger = logging.getLogger(__name__)


class ScoresFacts(Binding, Metadata):
    """The metadata of a scores file; docs/masks.md specifies it.

    matrices: their names in the order of the model, by which equal scores are ranked. comparable: whether the scores of all
    matrices are on one scale. recipe: the settings of the run. starved: as in a pruning report.
    """

    kind: Literal["scores"] = "scores"
    matrices: list[str]
    comparable: bool
    recipe: dict[str, Any] = {}
    calibration: TextFacts | None = None
    versions: dict[str, str] = {}
    controller: ControllerRecord | None = None
    starved: Starved | None = None


class ScoresFile(Scores):
    """A saliency on disk, read one matrix at a time; InputError when it is opened, unless it agrees with itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path, ScoresFacts) as (_, self.facts):
            found = safetensors_index.entries([path])
        try:
            _check(self.facts, found)
        except ValueError as error:
            raise ScoresFacts.damaged(path, error) from None
        self.comparable = self.facts.comparable
        self.shapes = {name: (found[name].shape[0], found[name].shape[1]) for name in self.facts.matrices}

    def warn_unless_for(self, patterns: Iterable[Pattern]) -> None:
        """Warns of patterns that the scores were not made for, if a controller made them for one alone."""
        record = self.facts.controller
        if record is None or not record.loss or len(set(record.targets)) != 1:
            return
        target, _, _ = record.targets[0].partition(";")  # rules aside
        if others := [str(pattern) for pattern in patterns if str(pattern).partition(";")[0] != target]:
            logger.warning(
                "%s was calibrated for %s alone; masks of %s would be better from scores for any sparsity, calibrated without "
                "--sparsity",
                *(self._path, target, ", ".join(others)),
            )

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            scores = file.get_tensor(name)
        assert isinstance(scores, Tensor)
        return scores

    def size(self, name: str) -> int:
        rows, columns = self.shapes[name]
        return rows * columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check(facts: ScoresFacts, entries: Mapping[str, safetensors_index.Entry]) -> None:
    """Raises ValueError unless the facts are of the file's tensors, and these are scores."""
    if not facts.matrices or sorted(facts.matrices) != sorted(entries) or facts.digests.keys() != entries.keys():
        raise ValueError("its scores, matrices and digests are not of the same names")
    if facts.base != fingerprint(facts.digests):
        raise ValueError("its base is not the fingerprint that its digests make")
    for name, entry in entries.items():
        if entry.dtype != "F32" or len(entry.shape) != 2 or 0 in entry.shape:
            raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, which are no scores")
        if not facts.digests[name]:
            raise ValueError(f"{name} has no digest")


def write_scores(
    path: Path, scores: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, int]], facts: ScoresFacts
) -> None:
    """Writes scores as they come, in the order of ``shapes``, which is that of ``facts.matrices``."""
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    stream_tensors(path, specs, scores, facts)
