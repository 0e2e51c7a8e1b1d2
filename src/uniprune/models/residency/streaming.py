"""A model whose decoder blocks are in memory one at a time: read from the checkpoint when a block runs, and dropped after.

Embeddings, norms outside the blocks and the output head are in memory; the blocks' parameters are on the meta device until
their turn comes. Weights whose type is the one computed in are mapped, not copied: the page cache holds what there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.checkpoints.layout import keys_of
from uniprune.checkpoints.origin import Origin
from uniprune.errors import InputError
from uniprune.models.loading import Loaded, without_weights
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.models.residency.filling import assign, fill, loaded_dtypes
from uniprune.storage.files import announce
from uniprune.storage.stash import give_back_memory


class Streamer:
    """Brings the parameters of one block at a time into memory.

    model: as ``loading.without_weights`` makes it; its parameters outside the blocks are loaded at once.
    Raises InputError if the checkpoint lacks a parameter, or stores it in another shape than the model has it.
    """

    def __init__(self, model: nn.Module, origin: Origin, dtype: torch.dtype, device: torch.device) -> None:
        assert origin.files is not None
        self._files, self._dtype, self._device = origin.files, dtype, device
        self._dtypes = loaded_dtypes(model, dtype)
        self._located = origin.files.layout(model).located
        prefix, self._blocks = find_blocks(model)
        _check_shared(self._blocks, origin)
        if missing := [name for name, _ in model.named_parameters() if name not in self._located]:  # as transformers allows
            raise InputError(
                f"model {origin} cannot be streamed: its files have no {missing[0]}; give it memory for the whole model"
            )
        self._prefix, self._last, self._way = prefix, -1, 1  # the last block whose turn it was, and up or down from there
        self._parts = [dict(block.named_parameters()) for block in self._blocks]  # name inside the block -> parameter on meta
        fill(model, origin.files, self._dtypes, device, without=f"{prefix}.")

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """Inside ``with``, the block's parameters are in memory; those that a sweep comes to next are read meanwhile."""
        self._way = index - self._last if abs(index - self._last) == 1 else -self._way if index == self._last else 1
        self._last = index
        if 0 <= index + self._way < len(self._parts):
            self._announce(index + self._way)
        block = self.fill(index)
        try:
            yield
        finally:
            for name, placeholder in self._parts[index].items():
                assign(block, name, placeholder)
            give_back_memory()

    def fill(self, index: int) -> nn.Module:
        """Brings the parameters of a block in, to stay; returns the block."""
        block = self._blocks[index]
        for name in self._parts[index]:
            assign(block, name, nn.Parameter(self.read(f"{self._prefix}.{index}.{name}"), requires_grad=False))
        return block

    def read(self, name: str) -> Tensor:
        """A parameter by its name in the model, in the type computed in."""
        return self._files.read(self._located[name], self._dtypes.get(name, self._dtype), self._device)

    def read_matrix(self, name: str) -> Tensor:
        """A matrix by its name, as the checkpoint has it, in the type computed in."""
        return self._files.read_matrix(name, self._dtype, self._device)

    def _announce(self, index: int) -> None:
        """Tells the system which bytes come next, so that it reads them while this block computes."""
        for name in self._parts[index]:
            for key in keys_of(self._located[f"{self._prefix}.{index}.{name}"]):
                entry = self._files.tensors[key]
                announce(entry.file, entry.start, entry.stop)


def _check_shared(blocks: nn.ModuleList, origin: Origin) -> None:
    """Weights of several blocks have no block whose turn they could wait for."""
    if common := shared_parameter(blocks):
        one, other, name = common
        raise InputError(
            f"model {origin} cannot be streamed: its blocks {one} and {other} share {name}; give it memory for the whole model"
        )


def shared_parameter(blocks: nn.ModuleList) -> tuple[int, int, str] | None:
    """The indices of two blocks that have a parameter in common, and its name in the second (ALBERT's way, Zamba 2)."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if (first := owner.setdefault(id(parameter), index)) != index:
                return first, index, name
    return None


def share_keys_and_values(blocks: nn.ModuleList) -> bool:
    """Whether a block attends to another one's keys and values (Gemma 3n, Mistral Large 4), as transformers marks it; then
    blocks cannot be run one by one.
    """
    return any(getattr(module, "is_kv_shared_layer", False) is True for module in blocks.modules())


def open_streamed(origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A model as ``loading.load`` gives it, but for its blocks, which :attr:`Loaded.residency` brings in.

    Raises InputError for a model that is not in safetensors files, and as Streamer does.
    """
    return opened(Streamer, origin, tokenizer, dtype, device)


def opened(kind: type[Streamer], origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A model on the meta device whose residency is of a kind. Raises InputError as :func:`open_streamed` does."""
    if not origin.files:
        raise InputError(
            f"model {origin} cannot be streamed: it is not in safetensors files; give it memory for the whole model"
        )
    model = without_weights(origin, dtype)
    return Loaded(model, tokenizer, origin, kind(model, origin, dtype, device))


def attached(matrices: Matrices, streamer: Streamer) -> Matrices:
    """Matrices whose weight is read from the checkpoint where their block is not in memory."""
    return {name: replace(matrix, read=streamer.read_matrix) for name, matrix in matrices.items()}
