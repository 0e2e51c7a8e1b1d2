"""Fine-tuning that keeps zeros. This is a weight update, outside the pruner; docs/finetuning.md.

Of each parameter a mask of *removed* weights is held, in its own shape: of fused experts one for all of them, of a weight that
several modules share one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from uniprune.artefacts.binding import check_shapes
from uniprune.artefacts.mask_tools import CheckedMasks
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.loading import is_sharded
from uniprune.models.matrices import Matrices, find_matrices
from uniprune.storage.files import path_of

logger = logging.getLogger(__name__)

NO_PLACE = "adapters learn biases (lora_bias) for layers without one, into which PEFT merges none"

Masks = str | Path | Mapping[str, Tensor]


class Removed(NamedTuple):
    """What a parameter loses: True where a weight is to be 0."""

    parameter: Tensor
    mask: Tensor


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """A callback for transformers' Trainer: pruned weights stay exactly 0, with any optimiser.

    masks: a masks file, or matrix names -> boolean masks ``[out, in]`` (True = keep); by default the zeros that the prunable
    matrices have when training begins. What they remove is zeroed then, and after each step of the optimiser; its gradients are
    zeroed as they are accumulated, so they are not counted when gradients are clipped.
    LoRA adapters (PEFT) compute with masked updates from then on, also when training has ended, so that :func:`merge_adapters`
    does not change what the model computes. Other adapters do not, and a warning says so. A mask takes a byte a weight.
    When training begins: raises InputError for FSDP, DeepSpeed and tensor parallelism, for masks that are not boolean, or if
    there are no zeros; MismatchError if masks are not of this model's matrices.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self._masks = masks
        self._removed: list[Removed] = []
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        # accelerate launch says of FSDP in none of the arguments
        if args.fsdp or args.deepspeed or getattr(args, "deepspeed_plugin", None) or is_sharded(model):
            raise InputError(
                "KeepZeros needs whole weights in each process; train without FSDP, DeepSpeed, tensor parallelism; DDP will do"
            )
        self._release()
        with without_adapters(model) as (base, adapters):
            matrices = find_matrices(base)
            self._removed = _by_parameter(matrices, _masks(self._masks, matrices))
        for adapter in adapters:
            _unmask(adapter)
        self._zero()
        for parameter, mask in self._removed:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(partial(_zero_gradient, mask=mask))  # type: ignore[no-untyped-call]
                self._undo.append(hook.remove)
        masks_of = {id(parameter): mask for parameter, mask in self._removed}
        masked = [(one, masks_of[id(weight)]) for one in adapters if id(weight := _adapted(one)) in masks_of]
        for adapter, mask in masked:
            if _is_plain_lora(adapter):
                adapter.forward = MaskedUpdate(adapter, mask)
        if others := sorted({_kind(one) for one, _ in masked if not _is_plain_lora(one)}):
            logger.warning("adapters %s are trained without masks; merge_adapters() masks them at the end", ", ".join(others))
        if any(map(_has_no_place, adapters)):
            logger.warning("%s: they can be saved, but not merged", NO_PLACE)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._zero()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._release()

    @torch.no_grad()
    def _zero(self) -> None:
        for parameter, mask in self._removed:
            parameter.masked_fill_(mask, 0)

    def _release(self) -> None:
        for undo in self._undo:
            undo()
        self._removed, self._undo = [], []


def merge_adapters(model: Any, masks: Masks | None = None) -> nn.Module:
    """Merges the adapters of a PEFT model into its weights, with what is pruned exactly 0; returns the model without them.

    masks: as for :class:`KeepZeros`; by default the zeros of the base model, which PEFT's own ``merge_and_unload`` fills with
    most kinds of adapters (docs/finetuning.md).
    Before anything is merged: raises InputError if the model has no adapters that can be, or if its zeros are asked for and no
    adapted layer has any (they were merged already, or rewrite their base, as PiSSA does), or for masks that are not boolean;
    MismatchError as KeepZeros.
    """
    if not hasattr(model, "merge_and_unload"):
        raise _nothing_to_merge(model)
    with without_adapters(model) as (base, adapters):
        if any(map(_has_no_place, adapters)):
            raise InputError(f"{NO_PLACE}; save the adapters as they are, or train them without it")
        matrices = find_matrices(base)
        kept = _masks(masks, matrices)
        adapted = {id(_adapted(one)) for one in adapters}
        if masks is None and not any(id(matrices[name].whole) in adapted for name in kept):
            raise InputError("no adapted layer of the base model has a zero; give the masks that it was pruned by")
    merged: nn.Module = model.merge_and_unload()
    masking.apply(find_matrices(merged), kept.items())
    return merged


def _nothing_to_merge(model: Any) -> InputError:
    """Why PEFT has no way to merge what a model has learned."""
    kind, settings = type(model).__name__, getattr(model, "active_peft_config", None)
    if settings is not None:
        how = type(settings).__name__.removesuffix("Config")
        return InputError(
            f"{kind} is tuned by {how}, which learns beside the weights: nothing can be merged into them; save it as it is"
        )
    if any(_wrapped(module) is not None for module in model.modules()):
        return InputError(
            f"{kind} has adapters of its own; save them, and load them around the base model: PeftModel.from_pretrained"
        )
    return InputError(f"{kind} has no adapters to merge; give the PeftModel")


@contextmanager
def without_adapters(model: Any) -> Iterator[tuple[nn.Module, list[Any]]]:
    """For the length of a ``with`` block a model as it was before PEFT put adapters around its layers; and the adapters.

    A layer that is trained as a copy (``modules_to_save``) is that copy.
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    places = [
        (parent, name, child) for parent in base.modules() for name, child in parent._modules.items() if child is not None
    ]
    wrappers = [(parent, name, child, inner) for parent, name, child in places if (inner := _wrapped(child)) is not None]
    try:
        for parent, name, _, inner in wrappers:
            parent._modules[name] = inner
        yield base, [child for _, _, child, _ in wrappers if "base_layer" in child._modules]
    finally:
        for parent, name, child, _ in wrappers:
            parent._modules[name] = child


def _wrapped(module: Any) -> nn.Module | None:
    """The layer that a module of PEFT's stands for; None for any other module."""
    inner: nn.Module | None = None
    if "base_layer" in module._modules:
        inner = module.get_base_layer()
    elif "original_module" in module._modules:
        copies = module._modules.get("modules_to_save", {})
        active = [name for name in module.active_adapters if name in copies]
        inner = copies[active[0]] if active else module.original_module
    return inner


def _adapted(adapter: Any) -> Tensor | None:
    """The parameter that an adapter changes."""
    weight: Tensor | None = getattr(adapter.get_base_layer(), getattr(adapter, "parameter_name", "weight"), None)
    return weight


def _has_no_place(adapter: Any) -> bool:
    """Whether an adapter learns a bias for a layer that has none to merge it into."""
    learns = getattr(adapter, "lora_bias", None) or {}
    return any(learns.values()) and getattr(adapter.get_base_layer(), "bias", None) is None


def _masks(given: Masks | None, matrices: Matrices) -> Mapping[str, Tensor]:
    """The masks that are given, or those of the zeros that the matrices have."""
    if given is None:
        zeros = {name: matrix.weight != 0 for name, matrix in matrices.items()}
        if found := {name: mask for name, mask in zeros.items() if not mask.all()}:
            return found
        raise InputError("none of the model's prunable matrices has a zero; prune it first, or give masks")
    masks = CheckedMasks(path_of(given)) if isinstance(given, (str, Path)) else given
    shapes = masks.shapes if isinstance(masks, CheckedMasks) else _shapes(masks)
    there = {name: matrix.shape for name, matrix in matrices.items()}
    check_shapes(shapes, there, masks.path if isinstance(masks, CheckedMasks) else "the dict of masks", "the model in training")
    return masks


def _shapes(masks: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of masks in memory. Raises InputError for others than boolean ones: ``~`` of 1 is -2 or 254, which is True, too."""
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"the mask of {name} is of type {kind}; give boolean tensors, True = keep (mask != 0)")
    return {name: tuple(mask.shape) for name, mask in masks.items()}


def _by_parameter(matrices: Matrices, masks: Mapping[str, Tensor]) -> list[Removed]:
    removed: dict[int, Removed] = {}
    for name, mask in masks.items():
        matrix = matrices[name]
        whole = matrix.whole
        found = removed.setdefault(id(whole), Removed(whole, torch.zeros_like(whole, dtype=torch.bool)))
        matrix.part(found.mask).copy_(~mask)
    return [*removed.values()]


def _zero_gradient(parameter: Tensor, *, mask: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.masked_fill_(mask, 0)


def _is_plain_lora(adapter: Any) -> bool:
    """Whether an adapter adds the product of two matrices to a layer's weight, and does nothing else."""
    from peft.tuners.lora import Linear

    return type(adapter) is Linear and not adapter.lora_variant


def _kind(adapter: Any) -> str:
    """As ``hira.Linear``: PEFT's classes have the same few names in every tuner."""
    return ".".join([*type(adapter).__module__.split(".")[:-1], type(adapter).__name__][-2:])


class MaskedUpdate:
    """Stands in for the ``forward`` of a LoRA layer: it computes with its update masked, as it will be when merged.

    adapter: that layer; removed: a mask of its weight's shape, True where that is to be 0. Copied or pickled with the layer, it
    computes with the copy's weights. The update is as large as the weight. It is computed again for the backward pass instead
    of being kept for it.
    """

    def __init__(self, adapter: Any, removed: Tensor) -> None:
        self._adapter, self._removed = adapter, removed

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        adapter = self._adapter
        if adapter.disable_adapters or adapter.merged or adapter.lora_variant or kwargs:
            return type(adapter).forward(adapter, x, *args, **kwargs)
        y: Tensor = adapter.base_layer(x, *args)
        result = y
        for name in [name for name in adapter.active_adapters if name in adapter.lora_A]:
            inputs = adapter.lora_dropout[name](x.to(adapter.lora_A[name].weight.dtype))
            result = result + checkpoint(self._product, inputs, name, use_reentrant=False, preserve_rng_state=False)
        return result.to(y.dtype)

    def _product(self, x: Tensor, name: str) -> Tensor:
        adapter = self._adapter
        plain = adapter.get_delta_weight(name)
        self._removed = self._removed.to(plain.device)  # the model may have been moved since training
        update, bias = plain.masked_fill(self._removed, 0), adapter.lora_B[name].bias
        scaled = None if bias is None else bias * adapter.scaling[name]
        return functional.linear(x, update.T if adapter.fan_in_fan_out else update, scaled)


def _unmask(adapter: Any) -> None:
    """Ends what an earlier training made of an adapter."""
    if isinstance(vars(adapter).get("forward"), MaskedUpdate):
        del adapter.forward  # the class's own shows again
