"""A model whose decoder blocks are in memory one at a time: read from the checkpoint when a block runs, and dropped after.

Embeddings, norms outside the blocks and the output head are in memory; the blocks' parameters are on the meta device until
their turn comes. Weights whose type is the one computed in are mapped, not copied: the page cache holds what there is room for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from uniprune.errors import InputError
from uniprune.models.checkpoint_keys import Layout, Part, loaded_dtypes
from uniprune.models.loading import Loaded, Origin, hollow
from uniprune.models.matrices import Matrices, find_blocks
from uniprune.storage.safetensors_index import DTYPES, entries, find_key, key_of
from uniprune.storage.stash import give_back_memory


class Streamer:
    """Brings the parameters of one block at a time into memory.

    model: as :func:`models.hollow` makes it; its parameters outside the blocks are loaded at once.
    Raises InputError if the checkpoint lacks one, or stores it in another shape than the model has it.
    """

    def __init__(self, model: nn.Module, origin: Origin, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._dtypes = loaded_dtypes(model, dtype)
        self._entries = entries(origin.shards)
        prefix, self._blocks = find_blocks(model)
        _check_shared(self._blocks, origin)
        layout = Layout(model)
        self._stored: dict[str, list[Part]] = {}  # parameter -> where it lies
        outside: list[str] = []
        for name, parameter in model.named_parameters():
            self._stored[name] = self._find(model, layout, name, tuple(parameter.shape), origin)
            if not name.startswith(f"{prefix}."):
                outside.append(name)
        self._prefix = prefix
        self._parts = [dict(block.named_parameters()) for block in self._blocks]  # name inside the block -> parameter on meta
        for name in outside:
            _assign(model, name, nn.Parameter(self.read(name).clone(), requires_grad=False))
        model.tie_weights()  # type: ignore[operator]
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            # A persistent one is in the checkpoint, as a router's bias is; the others are as the model made them.
            stored = find_key(layout.key(name), self._entries) if name in self._dtypes else None
            if stored is not None:
                buffer = self._get(stored, self._dtypes[name]).clone()
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        """Inside ``with``, the block's parameters are in memory."""
        block = self.fill(index)
        try:
            yield
        finally:
            for name, hollow_one in self._parts[index].items():
                _assign(block, name, hollow_one)
            give_back_memory()

    def fill(self, index: int) -> nn.Module:
        """Brings the parameters of a block in, to stay; returns the block."""
        block = self._blocks[index]
        if index + 1 < len(self._parts):
            self._announce(index + 1)
        for name in self._parts[index]:
            _assign(block, name, nn.Parameter(self.read(f"{self._prefix}.{index}.{name}"), requires_grad=False))
        return block

    def _find(self, model: nn.Module, layout: Layout, name: str, shape: tuple[int, ...], origin: Origin) -> list[Part]:
        """Where a parameter lies: under one key, or in parts."""
        parts = layout.parts(name, shape) if len(shape) == 3 else []
        if len(parts) > 1 and all(part.key in self._entries for part in parts):
            return parts
        key = find_key(name, self._entries) or find_key(layout.key(name), self._entries) or self._renamed(model, shape)
        if key is None or self._entries[key].shape != shape:
            found = "no tensor" if key is None else f"a tensor {self._entries[key].shape}"
            raise InputError(
                f"model {origin} cannot be streamed: {found} for {name} {shape}; give it memory for the whole model"
            )
        return [Part(key)]

    def _renamed(self, model: nn.Module, shape: tuple[int, ...]) -> str | None:
        """The only tensor of a shape that no parameter claims by its name: a few heads are stored under another one."""
        claimed = {find_key(name, self._entries) for name, _ in model.named_parameters()}
        free = [key for key, entry in self._entries.items() if key not in claimed and entry.shape == shape]
        return free[0] if len(free) == 1 else None

    def read(self, name: str) -> Tensor:
        """A parameter by its name in the model, or a matrix of an expert by its own, in the type computed in."""
        parts = self._stored.get(name) or [Part(key_of(name, self._entries))]
        dtype = self._dtypes.get(name, self._dtype)
        if len(parts) == 1:
            return self._get(parts[0].key, dtype)
        experts, rows = 1 + max(part.expert or 0 for part in parts), max(part.stop for part in parts)
        columns = self._entries[parts[0].key].shape[1]
        whole = torch.empty(experts, rows, columns, dtype=dtype, device=self._device)
        for part in parts:
            whole[part.expert, part.start : part.stop] = self._get(part.key, dtype)
        return whole

    def _get(self, key: str, dtype: torch.dtype) -> Tensor:
        entry = self._entries[key]
        if key in self._entries.keys():  # noqa: SIM118  # the keys are the whole tensors, what it contains are parts of them too
            with safe_open(entry.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        else:
            tensor = torch.from_numpy(entry.array().copy()).view(DTYPES[entry.dtype]).reshape(entry.shape)
        return tensor.to(self._device, dtype)

    def _announce(self, index: int) -> None:
        """Tells the system which bytes come next, so that it reads them while this block computes."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in self._parts[index]:
            for part in self._stored[f"{self._prefix}.{index}.{name}"]:
                entry = self._entries[part.key]
                with entry.file.open("rb") as file:
                    os.posix_fadvise(file.fileno(), entry.start, entry.stop - entry.start, os.POSIX_FADV_WILLNEED)


def _check_shared(blocks: nn.ModuleList, origin: Origin) -> None:
    """Weights of several blocks have no block whose turn they could wait for."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise InputError(
                    f"model {origin} cannot be streamed: its blocks {owner[id(parameter)]} and {index} share {name}; "
                    "give it memory for the whole model"
                )


def open_streamed(origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A model as :func:`models.load` gives it, but for its blocks, which :attr:`Loaded.residency` brings in.

    Raises InputError for a model that is not in safetensors files, and as Streamer does.
    """
    return opened(Streamer, origin, tokenizer, dtype, device)


def opened(kind: type[Streamer], origin: Origin, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A hollow model whose residency is of a kind. Raises InputError as :func:`open_streamed` does."""
    if not origin.shards:
        raise InputError(
            f"model {origin} cannot be streamed: it is not in safetensors files; give it memory for the whole model"
        )
    model = hollow(origin, dtype)
    return Loaded(model, tokenizer, origin, kind(model, origin, dtype, device))


def attached(matrices: Matrices, streamer: Streamer) -> Matrices:
    """Matrices whose weight is read from the checkpoint where their block is not in memory."""
    return {name: replace(matrix, read=streamer.read) for name, matrix in matrices.items()}


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter
