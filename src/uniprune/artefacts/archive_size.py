"""A budget given as a size: the sparsity at which a pruned model's archive (``archive``) takes at most that many bytes.

Its bytes are estimated from samples of every tensor. Rows of the prunable matrices are cut with the very pattern that the run
will have, and the archive's own coder packs what is left of them. Before there are scores, magnitudes stand in for them: what
they keep has fewer exponents than what calibrated scores keep, so a run chooses its sparsity again when it has those.
"""

from __future__ import annotations

import math
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniprune.artefacts import archive, archive_codec
from uniprune.checkpoints.checkpoint import Files
from uniprune.checkpoints.companion_files import companions
from uniprune.checkpoints.origin import ModelSource, Origin
from uniprune.checkpoints.protocol import Stored
from uniprune.common.formatting import spell_size
from uniprune.common.matrix_names import kind_of
from uniprune.errors import InputError
from uniprune.models.loading import Loaded
from uniprune.models.matrices import Matrices, Matrix
from uniprune.sparsity.patterns.protocol import Pattern, Saliency, Shape
from uniprune.sparsity.patterns.ruled import reach
from uniprune.sparsity.views import ScaledToMeanOne
from uniprune.storage import dtypes

SAMPLE = 1 << 22  # weights to look at, of the prunable matrices and of the other tensors; more only if there are very many
RUN = 1 << 15  # consecutive weights of the other tensors
MARGIN = 0.01  # of the size: what samples do not show, and what magnitudes do not where masks are cut as scores come
GRID = 10_000  # a sparsity is a multiple of 1 / GRID
# Bytes beside the pieces: of a tensor its places in a header and in the archive's index, of a mask its digest, shape and
# sparsity, too, and of pruning.json and the card the rest. On SmolLM2 they are 70, 150 and 2000.
TENSOR, MASK, REPORT = 80, 170, 2500

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Budget:
    """A number of bytes, and what a sparsity must be to meet it.

    at: the pattern of a sparsity. Raises InputError if no sparsity within ``reach`` meets the size.
    """

    size: int
    estimate: Estimate
    at: Callable[[float], Pattern]
    reach: tuple[float, float]

    def __post_init__(self) -> None:
        most, least = (self.estimate(self.at(step / GRID)) / (1 - MARGIN) for step in (self._steps[0], self._steps[-1]))
        if not least <= self.size < most:
            raise InputError(
                f"size {spell_size(self.size)} is out of reach: the archive would have between {math.ceil(least):,} and "
                f"{math.floor(most):,} bytes; give a size from {spell_size(least, up=True)} to {spell_size(most)}"
            )

    @property
    def _steps(self) -> range:
        low, high = self.reach
        return range(math.ceil(low * GRID), math.floor(high * GRID) + 1)

    def sparsity(self, saliency: Saliency | None = None) -> float:
        """The lowest sparsity whose archive is small enough; saliency: what masks are cut from, by default magnitudes."""
        scores = None if saliency is None else self.estimate.rows(saliency)
        aim = self.size * (1 - MARGIN)
        found = bisect_left(self._steps, -aim, key=lambda step: -self.estimate(self.at(step / GRID), scores))
        return self._steps[min(found, len(self._steps) - 1)] / GRID


class Estimate:
    """How many bytes a model's archive would have, were the model pruned by one pattern or another.

    pattern: one of them; samples are of whole tiles for it. Raises InputError if the zstandard package is missing.
    """

    def __init__(self, source: Loaded | Origin, matrices: Matrices, pattern: Pattern) -> None:
        checkpoint = source.checkpoint
        assert checkpoint is not None
        if not estimable(source):
            raise InputError(
                f"model {source} is quantised: what its archive would take is not estimated; give --sparsity in place of --size"
            )
        self._zstd = archive_codec.Zstd()
        every = max(1, sum(matrix.size for matrix in matrices.values()) // SAMPLE)
        self._samples = {name: Sample(one, checkpoint.stored(name), every, pattern) for name, one in matrices.items()}
        self._runs = self._alike() if every > 1 else [[name] for name in matrices]
        self._magnitudes = dict(ScaledToMeanOne({name: sample.magnitudes() for name, sample in self._samples.items()}))
        others = checkpoint.rest(matrices)
        every = max(1, sum(_count(tensor) for tensor in others) // SAMPLE)
        self._rest = REPORT + TENSOR * (len(matrices) + len(others)) + MASK * len(matrices)
        self._rest += sum(map(self._file, _companions(source)))
        self._rest += sum(self._other(tensor, every) for tensor in others)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the samples ``[out, in]``."""
        return {name: (scores.shape[0], scores.shape[1]) for name, scores in self._magnitudes.items()}

    def rows(self, saliency: Saliency) -> dict[str, Tensor]:
        """The scores of the sampled rows."""
        return {name: saliency[name][sample.rows].cpu() for name, sample in self._samples.items()}

    def __call__(self, pattern: Pattern, scores: Saliency | None = None) -> int:
        """Bytes of the whole archive; scores: of the sampled rows, on the scale that ``pattern`` needs."""
        scores = self._magnitudes if scores is None else scores
        create = pattern.prepare_from_sample(scores)
        size = self._rest
        for names in self._runs:
            samples = [self._samples[name] for name in names]
            masks = [create(name, scores[name]).numpy() for name in names]
            kept = np.concatenate([sample.thinned(mask) for sample, mask in zip(samples, masks, strict=True)])
            packed = self._tensor(kept, samples[0].word) + self._masks(np.concatenate([m.ravel() for m in masks]), kept)
            size += round(packed * sum(sample.size for sample in samples) / len(kept))
        return size

    def _alike(self) -> list[list[str]]:
        """Matrices to pack one after another: the coder has a table for each 2^17 weights, and a sample of one has fewer."""
        found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for name, sample in self._samples.items():
            found[kind_of(name), sample.pattern, sample.word].append(name)
        return list(found.values())

    def _masks(self, mask: Array, kept: Array) -> int:
        """Packed masks: as such, or where that is shorter as what they differ in from the weights that are not zero."""
        bits = np.packbits(mask, bitorder="little")
        differ = bits ^ np.packbits(kept != 0, bitorder="little")
        return min(self._tensor(bits, "u8"), len(self._zstd.bytes(differ.tobytes())))

    def _tensor(self, words: Array, word: str) -> int:
        """Packed words ``[n]``."""
        step, size = archive.CHUNK // words.itemsize, 0
        for start in range(0, len(words), step):
            raw = words[start : start + step].tobytes()
            _, pieces = archive_codec.encode(archive_codec.Chunk("tensor", word, len(raw)), raw, self._zstd)
            size += sum(map(len, pieces))
        return size

    def _other(self, tensor: Stored, every: int) -> int:
        """A packed tensor that is not prunable; a long one is sampled at even distances."""
        bits, runs = _words(tensor), _count(tensor) // RUN
        if runs > 1 < every:
            bits = bits[: runs * RUN].reshape(runs, RUN)[min(every, runs) // 2 :: every].ravel()
        return round(self._tensor(bits, dtypes.word(tensor.dtype)) * _count(tensor) / max(len(bits), 1))

    def _file(self, content: bytes) -> int:
        """A packed file that is no weights, with its record in the index."""
        pieces = (content[start : start + archive.CHUNK] for start in range(0, len(content), archive.CHUNK))
        return sum(len(self._zstd.bytes(piece)) for piece in pieces) + 2 * TENSOR


def _width(tensor: Stored) -> int:
    return archive_codec.WORDS[dtypes.word(tensor.dtype)][0]


def _count(tensor: Stored) -> int:
    """The words of a stored tensor."""
    return tensor.size // _width(tensor)


def _words(tensor: Stored) -> Array:
    return tensor.read().view(f"<u{_width(tensor)}")


class Sample:
    """Rows ``[out]`` of a matrix at even distances, or bands of rows as high as the pattern's tiles, one at least.

    rows: which; size: weights of the whole matrix; pattern: what it gets, in words.
    """

    def __init__(self, matrix: Matrix, stored: Stored, every: int, pattern: Pattern) -> None:
        rows, columns = matrix.shape
        part = pattern.pattern_of(matrix.name)
        self.pattern = str(part)
        height = next(h for h in range(1, rows + 1) if rows % h == 0 and part.unsupported(h, columns) is None)
        bands = torch.arange(rows).reshape(-1, height)
        self.rows = bands[min(every, len(bands)) // 2 :: every].flatten()
        picked = self.rows.numpy()  # a tensor of one element would be taken for a number
        self._dtype, self._transposed = dtypes.BY_NAME[stored.dtype].dtype, matrix.stored_transposed
        bits = _words(stored).reshape((columns, rows) if self._transposed else (rows, columns))
        self._bits = np.ascontiguousarray(bits[:, picked] if self._transposed else bits[picked])
        self.word, self.size = dtypes.word(stored.dtype), matrix.size

    def magnitudes(self) -> Tensor:
        """Float32 ``[rows, in]``."""
        signed = torch.from_numpy(self._bits.view(f"i{self._bits.itemsize}"))  # unsigned words of torch have no view
        values = signed.view(self._dtype).float().abs()
        return values.T if self._transposed else values

    def thinned(self, mask: Array) -> Array:
        """The rows' words as stored, flat, zeros where the mask ``[rows, in]`` has them."""
        return np.where(mask.T if self._transposed else mask, self._bits, 0).ravel()


def estimable(source: ModelSource) -> bool:
    """Whether archives can be estimated: not of codes, several of which are a word, and whose scales samples do not have."""
    return source.origin is None or not source.origin.quantised


def _companions(source: Loaded | Origin) -> Iterator[bytes]:
    """The files beside the weights of the checkpoint that pruning a model writes."""
    if source.origin is not None and source.origin.files:
        yield from (file.read_bytes() for file in companions(source.origin.files))
        return
    assert isinstance(source, Loaded)
    with tempfile.TemporaryDirectory() as name:
        for part in (source.model.config, source.tokenizer):
            if part is not None:
                part.save_pretrained(name)  # type: ignore[operator, union-attr]
        yield from (file.read_bytes() for file in companions(Files(Path(name))))


def lowest(pattern: Pattern, shapes: Mapping[str, Shape]) -> float:
    """The lowest sparsity to choose from that a pattern could have instead of its own."""
    return math.ceil(reach(pattern, shapes)[0] * GRID) / GRID


def budget(size: int, source: Loaded | Origin, matrices: Matrices, at: Callable[[float], Pattern], pattern: Pattern) -> Budget:
    """The budget of ``size`` bytes for a model whose weights can be read; at: the pattern of a sparsity; pattern: any."""
    estimate = Estimate(source, matrices, pattern)
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    reaches = [reach(pattern, shapes), reach(pattern, estimate.shapes)]  # proportions differ a little between the two
    return Budget(size, estimate, at, (max(low for low, _ in reaches), min(high for _, high in reaches)))
