"""Models without weights are filled: with parameters and persistent buffers from files, in the types that transformers has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from uniprune.checkpoints.checkpoint import Files


def fill(
    model: nn.Module,
    files: Files,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    without: str = "",
    own: bool = True,
) -> None:
    """Brings in the parameters that are on the meta device, and the buffers.

    dtypes: by name, as :func:`loaded_dtypes`. without: the beginning of the names of parameters that stay on the meta device.
    own: on a CPU, too, they are copies, not maps of the files.
    """
    located = files.layout(model).located
    filled: dict[int, nn.Parameter] = {}  # by the one on meta: what is tied has several names, in any order
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta and not (without and name.startswith(without)):
            if id(parameter) not in filled:
                found = files.read(located[name], dtypes[name], device, own=own)
                filled[id(parameter)] = nn.Parameter(found, requires_grad=False)
            assign(model, name, filled[id(parameter)])
    model.tie_weights(recompute_mapping=False)  # type: ignore[operator]
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        # A persistent one is in the checkpoint, as a router's bias is; the others are as the model made them.
        stored = name in located
        found = files.read(located[name], dtypes[name], device, own=own) if stored else buffer.to(device)
        model.get_submodule(owner)._buffers[leaf] = found


def assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter into the place that its name inside the module says."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def loaded_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type that transformers loads each parameter and persistent buffer in, when it is asked for ``dtype``.

    model: made in that type (it may be on the meta device). Some families keep a few tensors in float32.
    """
    from transformers.core_model_loading import build_glob_alternation

    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(dtype)  # type: ignore[operator]
    if plan:
        kept, _, _ = build_glob_alternation(list(plan))
        found |= {name: torch.float32 for name in found if kept.search(name)}
    return found
