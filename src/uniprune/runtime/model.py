"""Models that compute with packed matrices: swapped in memory, or opened from a folder in the runtime layout."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from uniprune.checkpoints.checkpoint import PACKED
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.shards import lacking
from uniprune.errors import InputError
from uniprune.models.loading import Loaded, load_weights, native_dtype, parse_dtype, warn_of_emulation, without_weights
from uniprune.models.matrices import Matrix, find_matrices
from uniprune.models.residency.filling import fill, loaded_dtypes
from uniprune.runtime.layout import RuntimeOrigin
from uniprune.runtime.linear import BitmaskLinear, KernelLinear, nothing_to_pack, too_dense, unsupported
from uniprune.runtime.native import library
from uniprune.runtime.packed import Packed, bits_of, count, pack, unpack
from uniprune.storage.files import path_of

logger = logging.getLogger(__name__)


def accelerate(source: str | Path | nn.Module | Loaded, dtype: str | None = None) -> nn.Module:
    """A pruned model, for inference on a CPU, whose linear layers hold and multiply by the kept weights alone.

    source: a folder in the runtime layout (``uniprune pack --runtime``), which is mapped, not read; a pruned checkpoint folder,
    hub name or GGUF file; or a model in memory, which is changed in place, and is in evaluation mode afterwards. dtype: to
    compute in, of a model on disk; its own by default. Returns a transformers model: ``generate`` works, and
    ``save_pretrained`` writes a dense checkpoint, zeros and all. Products with up to 8 tokens use the kernel, others unpack
    rows and multiply densely. Fused experts and matrices with few zeros stay as they are. Whether it is faster here,
    ``uniprune bench`` measures.
    The kernel is compiled once, by this machine's C++ compiler; where there is none, a warning says so and the model is dense.
    Raises InputError if the source cannot be read, if no matrix is sparse, or if a model in memory is given another type.
    """
    chosen, compiled = parse_dtype(dtype), _compiled()
    if not isinstance(source, (nn.Module, Loaded)) and (folder := path_of(source) / PACKED).is_file():
        model = _opened(RuntimeOrigin(str(source), folder.parent), chosen, compiled)
    else:
        model = _in_memory(source, chosen)
        if compiled:
            _pack_in_place(model)
    if compiled:
        KernelLinear.convert(model)
    warn_of_emulation(model)
    return model.eval()


def _compiled() -> bool:
    """Whether the kernel is there; a warning says what is missing."""
    try:
        library()
    except InputError as error:
        logger.warning("%s; until then the model computes densely", error)
        return False
    return True


def _in_memory(source: str | Path | nn.Module | Loaded, dtype: torch.dtype | None) -> nn.Module:
    """The model that is given, or loaded."""
    if not isinstance(source, (nn.Module, Loaded)):
        return load_weights(resolve(source), dtype, torch.device("cpu"))
    if dtype:
        raise InputError(f"a type is for a model on disk; convert the one in memory before: model.to({dtype})")
    return source.model if isinstance(source, Loaded) else source


def _pack_in_place(model: nn.Module) -> None:
    """Packs the sparse matrices of a model one after the other: at no time are all there twice."""
    matrices, swap = find_matrices(model), Swap(model)
    left: dict[str, str] = {}
    total = len(matrices)
    for name in list(matrices):
        matrix = matrices.pop(name)
        weight = matrix.parameter
        reason = unsupported(matrix, weight.dtype) or (None if weight.is_cpu else f"it is on {weight.device}, not on the CPU")
        if reason := reason or too_dense(count(bits_of(weight), weight.dtype)[0], matrix.size):
            left[name] = reason
        else:
            swap(matrix, pack(matrix.weight))
    if len(left) == total:
        raise nothing_to_pack(left)
    _forget_ties(model)
    if left:
        logger.info("%d of %d matrices stay dense, e.g. %s: %s", len(left), total, *next(iter(left.items())))


def _opened(origin: RuntimeOrigin, dtype: torch.dtype | None, compiled: bool) -> nn.Module:
    """A model from its runtime folder; what has the type ``dtype``, by default the folder's own, is mapped."""
    dtype, files = dtype or native_dtype(origin), origin.files
    model = without_weights(origin, dtype)
    matrices, swap, dtypes = find_matrices(model), Swap(model), loaded_dtypes(model, dtype)
    for name, facts in files.facts.matrices.items():
        matrix = matrices.get(name)
        if matrix is None or matrix.shape != facts.shape or unsupported(matrix, dtype):
            raise InputError(f"{files.weights} and config.json differ on {name[:200]}; pack the pruned folder again")
        if compiled:
            swap(matrix, files.packed(name, dtype, Packed))
        else:
            weight = files.packed(name, dtype, unpack)
            parameter = nn.Parameter(weight.T.contiguous() if matrix.transposed else weight, requires_grad=False)
            for module in matrix.modules:
                module.weight = parameter
    _forget_ties(model)
    located = files.layout(model).located
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in located]:
        raise lacking(str(origin), getattr(model, "config", None), missing)
    fill(model, files, dtypes, torch.device("cpu"), own=False)
    return model


def _forget_ties(model: nn.Module) -> None:
    """Packed matrices are no parameters that transformers could tie; those that were tied share their values already."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for target in list(tied):
        if isinstance(model.get_submodule(target.rpartition(".")[0]), BitmaskLinear):
            del tied[target]


class Swap:
    """Puts packed matrices into the places of the modules that multiply by them."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._places[id(child)].append((parent, name))

    def __call__(self, matrix: Matrix, packed: Packed) -> None:
        for module in matrix.modules:
            new = BitmaskLinear(packed, module.bias, matrix.transposed).eval()  # type: ignore[arg-type]
            for parent, name in self._places[id(module)]:
                setattr(parent, name, new)
