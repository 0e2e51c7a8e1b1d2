"""Which weights are prunable: every matrix inside the decoder blocks, found by structure and never by family.

The decoder blocks are the repeated ``ModuleList`` whose members are of one class. Embeddings, norms, biases and the output
head lie outside or are not matrices, and stay dense. Anything unclear is an error that lists what was seen: a matrix
that is silently skipped is a model that is silently not pruned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uniprune.errors import InputError

COVERAGE = 0.9  # of the blocks' parameters must lie in matrices that we know how to prune


@dataclass(frozen=True)
class Matrix:
    """One prunable weight. ``shape`` is (out, in), also where the module stores it transposed (GPT-2's Conv1D).

    read: gives a parameter by name while the module's own waits for its block's turn: it is then on the meta device
    (``streaming``), or a DTensor of which this process has a part (``sharding``).
    """

    name: str
    module: nn.Module
    block: int
    transposed: bool
    read: Callable[[str], Tensor] | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def stored(self) -> Tensor:
        """The parameter, read from the checkpoint where it is not in memory as a whole."""
        parameter = self.parameter.detach()
        if self.read and (parameter.is_meta or type(parameter) is not Tensor):
            return self.read(f"{self.name}.weight")
        return parameter

    @property
    def weight(self) -> Tensor:
        """A view of the parameter as ``[out, in]``."""
        return self.stored.T if self.transposed else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def size(self) -> int:
        return self.parameter.numel()


Matrices = dict[str, Matrix]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a model, by name: the repeated list of equal-class modules that holds most parameters.

    Raises InputError if there is none, or if two lists compete (an encoder-decoder model).
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outer.items()}
    ranked = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    if not ranked or sizes[ranked[0]] == 0:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children())
        raise InputError(f"{type(model).__name__} has no list of equal decoder blocks; its parts are: {children}")
    if len(ranked) > 1 and sizes[ranked[1]] > 0.5 * sizes[ranked[0]]:
        seen = ", ".join(f"{n} ({len(outer[n])} x {type(outer[n][0]).__name__})" for n in ranked)
        raise InputError(f"{type(model).__name__} has several lists of blocks, only decoders are supported: {seen}")
    return ranked[0], outer[ranked[0]]


def find_matrices(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Matrices:
    """The prunable matrices in the order of the model, by module name; a weight tied between modules is listed once.

    include, exclude: regular expressions, searched in the module names; ``exclude`` wins.
    Raises InputError if under 90 % of the blocks' parameters lie in matrices, or if an expression matches none.
    """
    prefix, blocks = find_blocks(model)
    found: Matrices = {}
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in seen:
                seen.add(id(module.weight))
                name = f"{prefix}.{index}.{inner}"
                found[name] = Matrix(name, module, index, transposed=isinstance(module, Conv1D))
    _check_coverage(prefix, blocks, seen)
    return _select(found, include, exclude)


def _check_coverage(prefix: str, blocks: nn.ModuleList, covered: set[int]) -> None:
    parameters = {id(p): (n, p) for n, p in blocks.named_parameters()}
    total = sum(p.numel() for _, p in parameters.values())
    missed = [(n, p) for key, (n, p) in parameters.items() if key not in covered]
    if sum(p.numel() for _, p in missed) > (1 - COVERAGE) * total:
        largest = sorted(missed, key=lambda item: -item[1].numel())[:5]
        names = ", ".join(f"{prefix}.{n} {tuple(p.shape)}" for n, p in largest)
        raise InputError(f"under {COVERAGE:.0%} of the blocks' parameters are in Linear or Conv1D matrices; not: {names}")


def _select(found: Matrices, include: Sequence[str], exclude: Sequence[str]) -> Matrices:
    def matches(pattern: str, option: str) -> set[str]:
        try:
            names = {name for name in found if re.search(pattern, name)}
        except re.error as error:
            raise InputError(f"--{option} {pattern!r} is not a regular expression: {error}") from None
        if not names:
            example = next(iter(found))
            raise InputError(f"--{option} {pattern!r} matches none of the {len(found)} matrices, e.g. {example}")
        return names

    kept = set.union(*(matches(p, "include") for p in include)) if include else set(found)
    for pattern in exclude:
        kept -= matches(pattern, "exclude")
    if not kept:
        raise InputError("--include and --exclude leave no matrix to prune")
    return {name: matrix for name, matrix in found.items() if name in kept}


def check_fit(shapes: Iterable[tuple[str, tuple[int, int]]], pattern: Any) -> None:
    """Raises InputError naming the matrices whose shape cannot have the pattern."""
    misfits = [(name, reason) for name, shape in shapes if (reason := pattern.misfit(*shape))]
    if misfits:
        name, reason = misfits[0]
        raise InputError(f"{len(misfits)} matrices cannot be {pattern}, e.g. {name}: {reason}; leave them out with --exclude")


def check_finite(matrices: Matrices) -> None:
    """Raises InputError naming the first matrix with NaN or infinity: such a checkpoint is broken."""
    for name, matrix in matrices.items():
        if not bool(torch.isfinite(matrix.stored).all()):
            raise InputError(f"{name}: the weights contain NaN or infinity; the checkpoint is broken, fetch it again")
