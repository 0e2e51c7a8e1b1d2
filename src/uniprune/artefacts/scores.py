"""Scores files: a saliency on disk, from which masks of any sparsity are created."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from uniprune.sparsity.views import Scores
from uniprune.storage import safetensors_index, strict_json
from uniprune.storage.tensor_file import damaged, open_tensors, stream_tensors


class ScoresFile(Scores):
    """A saliency on disk, read one matrix at a time; InputError when it is opened, unless it agrees with itself."""

    KINDS: ClassVar[Mapping[str, type]] = {
        "matrices": list,
        "comparable": bool,
        "digests": dict,
        "transposed": list,
        "base": str,
        "base_name": str,
    }

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_tensors(path, "scores") as (_, self.facts):
            found = safetensors_index.entries([path])
        try:
            strict_json.check(self.facts, self.KINDS)
            names = self.facts["matrices"]
            if not names or sorted(map(str, names)) != sorted(found) or self.facts["digests"].keys() != found.keys():
                raise ValueError("its scores, matrices and digests are not of the same names")
            for name, entry in found.items():
                if entry.dtype != "F32" or len(entry.shape) != 2 or 0 in entry.shape:
                    raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, which are no scores")
                if not isinstance(self.facts["digests"][name], str) or not self.facts["digests"][name]:
                    raise ValueError(f"{name} has no digest")
        except ValueError as error:
            raise damaged("scores", path, error) from None
        self.comparable = self.facts["comparable"]
        self.shapes = {name: (found[name].shape[0], found[name].shape[1]) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            scores = file.get_tensor(name)
        assert isinstance(scores, Tensor)
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_scores(
    path: Path, scores: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, int]], facts: Mapping[str, Any]
) -> None:
    """Writes scores as they come, in the order of ``shapes``."""
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    stream_tensors(path, specs, scores, {"kind": "scores", "matrices": list(shapes), **facts})
