"""What a model in memory is checked for before the heavy work: finite weights, those of its files, can it be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.checkpoints.checkpoint import Files, checkpoint_of
from uniprune.checkpoints.layout import names_of
from uniprune.errors import InputError
from uniprune.models.matrices import Matrices, Matrix
from uniprune.storage.outline import Outline

ROWS = 64  # of a tensor outside the prunable matrices that are compared, about
KINDS = 16  # of a block's matrices that are compared at least, in one block or another
COMPUTED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
COMPILED = "_orig_mod"  # where torch.compile puts the module that it stands for


def check_loaded(model: nn.Module, matrices: Matrices) -> None:
    """Raises InputError if a model in memory is not what its files have, which will be pruned.

    matrices: all that could be pruned, for those that stay dense are written as the files have them, too.
    A matrix of each block and of each kind, every vector (norms, biases) and every persistent buffer are compared, bit for bit,
    in the type that the model has them in; of what else stays dense (embeddings, head, routers) some ROWS.
    """
    files = checkpoint_of(model)
    if not isinstance(files, Files):
        return
    layout = files.layout(model)
    blocks: dict[int, list[Matrix]] = {}
    for matrix in matrices.values():
        blocks.setdefault(matrix.block, []).append(matrix)
    inside = list(blocks.values())
    prunable = {id(matrix.parameter) for matrix in matrices.values()}

    def stored() -> Iterator[tuple[str, Tensor, Tensor]]:
        for turn in range(max(len(inside), min(KINDS, max(map(len, inside))))):
            block = inside[turn % len(inside)]
            matrix = block[turn % len(block)]
            loaded = matrix.stored
            read = files.read_matrix(matrix.name, loaded.dtype, loaded.device)
            yield matrix.name, loaded, read.T if matrix.flipped else read
        others = ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in prunable)
        for name, tensor in (*others, *model.named_buffers()):
            if (place := layout.located.get(name)) is not None:
                step = len(tensor) // ROWS if tensor.ndim > 1 else 1
                if step > 1 and isinstance(place, Outline):
                    tensor, place = tensor[::step], place.thinned(step)
                yield name, tensor.cpu(), files.read(place, tensor.dtype, torch.device("cpu"))

    for name, loaded, read in stored():
        if not torch.equal(_bits(loaded), _bits(read)):
            raise InputError(
                f"{name} is not in memory what it is in {files.folder}, whose weights would be pruned; load the model again, "
                "or give it without its folder"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_finite(matrices: Matrices) -> None:
    """Raises InputError naming the first matrix with NaN or infinity: such a checkpoint is broken; or of a type that nothing
    computes with."""
    for name, matrix in matrices.items():
        if matrix.stored.dtype not in COMPUTED:
            kind = str(matrix.stored.dtype).removeprefix("torch.")
            raise InputError(
                f"{name}: weights of type {kind} cannot be pruned in memory; give the model in bfloat16 or float32"
            )
        least, most = torch.aminmax(matrix.stored)  # both are NaN if any weight is; 50 times as fast as isfinite on all
        if not bool(torch.isfinite(least) & torch.isfinite(most)):
            if matrix.stored.dtype == torch.float16:
                raise InputError(f"{name}: the weights contain NaN or infinity in float16; give --dtype bfloat16 or float32")
            raise InputError(f"{name}: the weights contain NaN or infinity; the checkpoint is broken, fetch it again")


def check_uncompiled(model: nn.Module) -> None:
    """Raises InputError for a model in which ``torch.compile`` stands in for a module: its weights have other names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, COMPILED, None), nn.Module):
            raise InputError(
                f"{name} is what torch.compile put in place of a module, and would be saved under names that no model has; "
                "prune the model before it is compiled, or compile in place: module.compile()"
            )


def check_writable(model: nn.Module) -> None:
    """Raises InputError for a model that ``save_pretrained`` refuses, or that would not load again: after the work it would be
    too late."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    known = getattr(model, "_tied_weights_keys", None) or {}
    for names in names_of(model).values():
        if len(untied := [name for name in names if name not in tied]) > 1:
            what, kind = f"{untied[0]} and {untied[1]} are one parameter", type(model).__name__
            if any(name in known for name in untied):
                raise InputError(f"{what}, but the config says they are not tied; set tie_word_embeddings, or clone one")
            raise InputError(
                f"{what}, which {kind} does not say, so transformers saves no such model; give each its own (a clone), or "
                "prune in memory: prune_in_place"
            )
    if not getattr(model, "can_generate", lambda: False)():
        return
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        raise InputError("the model's generation_config is None, which transformers does not save; give it a GenerationConfig")
    try:  # as it was published it is saved, whatever it says
        settings.validate(strict=getattr(settings, "_original_object_hash", None) != hash(settings))
    except ValueError as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"the model's generation_config cannot be saved; correct it on the model: {said}") from None
