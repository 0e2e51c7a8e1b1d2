"""What it takes to reproduce a result: what was asked, of which weights, by which software, on which machine."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniprune.common.provenance import processor, versions
from uniprune.data.windows import Windows
from uniprune.errors import InputError
from uniprune.evaluation.request import READS, EvaluationRequest
from uniprune.evaluation.results import Difference, Evaluation, Machine
from uniprune.models.blocks import device_of, dtype_of
from uniprune.models.loading import dtype_name
from uniprune.storage.record import parsed

# Not what a model does: its name may be another, versions and machines are compared apart, and weights instead of masks.
IGNORED = {"kind", "format", "model", "against", "versions"}
IGNORED |= {f"protocol.{name}" for name in ("versions", "machine", "request", "masks_sha256")}
REFERENCE = "lm_eval_reference."
TOLERANCE = 1e-2  # relative, between machines of different kinds: their kernels add in another order


def weights_sha256(model: nn.Module) -> str:
    """Of the names, shapes, types and bits of all parameters and persistent buffers, as the model computes with them.

    An accelerated layer counts by its dense matrix, whose zeros have no sign. Buffers that are no part of a checkpoint follow
    from the configuration, and may differ in their last bit from machine to machine.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What :func:`weights_sha256` counts; what several modules share, once."""
    seen = set[int]()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        own |= {name: t for name, t in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}
        if getattr(module, "accelerated", False) and "weight" not in own:
            yield f"{path}.weight", module.weight  # unpacked; a Linear has it before its bias
        for name, tensor in own.items():
            if id(tensor) not in seen:
                yield from _plain(f"{path}.{name}" if path else name, tensor)
        seen.update(map(id, own.values()))


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor; of one that is made of others (codes and scales, as torchao has them) those, with bits to look at."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def machine(model: nn.Module) -> Machine:
    """The machine that a model computes on."""
    device = device_of(model)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Machine(device=device.type, kind=kind, threads=torch.get_num_threads())


def conditions(model: nn.Module, windows: Windows) -> dict[str, Any]:
    """What the protocols of all tables say of how their rows are measured, by field."""
    count, length = windows.tokens.shape
    return {
        "text": windows.describe(),
        "windows": count,
        "length": length,
        "stride": windows.stride or length,
        "dtype": dtype_name(dtype_of(model)),
        "weights_sha256": weights_sha256(model),
        "machine": machine(model),
        "versions": versions(),
    }


def _processor() -> str:
    """What PyTorch uses of the processor, and which it is: its libraries add in another order on another maker's or model's."""
    facts = processor()
    named = [facts[key] for key in ("model name", "cpu family", "model") if key in facts]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(named or [platform.processor() or platform.machine()])])


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """Where two results differ in what was measured."""
    before, now = dict(_leaves(recorded)), dict(_leaves(json.loads(json.dumps(found))))
    if not any(what.startswith(REFERENCE) for what in before):  # earlier versions did not keep it
        now = {what: value for what, value in now.items() if not what.startswith(REFERENCE)}
    every = [*before, *(what for what in now if what not in before)]
    pairs = ((what, before.get(what), now.get(what)) for what in every)
    return [
        Difference(what=what, recorded=a, found=b, within=_near(a, b))
        for what, a, b in pairs
        if a != b and not (a != a and b != b)
    ]


def in_words(differing: Sequence[Difference]) -> str:
    """The first few differences between the settings of two tables; nothing if there are none."""

    def said(value: Any) -> str:
        return "not given" if value is None else f"{value!r:.60}"

    return "; ".join(
        f"{one.what.removeprefix('protocol.')} was {said(one.recorded)}, is {said(one.found)}" for one in differing[:3]
    )


def read(path: Path) -> tuple[Evaluation, EvaluationRequest]:
    """A result file of ``evaluate``, and what was asked. Raises InputError if it is none."""
    if not path.exists():
        raise InputError(f"result {path} does not exist")
    data = parsed(path)
    protocol = data.get("protocol")
    if not isinstance(protocol, dict) or not isinstance(protocol.get("request"), dict):
        raise InputError(f"{path} is no result of uniprune evaluate with a protocol; make one with evaluate --output")
    try:
        request = EvaluationRequest.of(**protocol["request"])
        if request.text is None:  # some versions recorded how they would have read one
            request = request.model_copy(update=dict.fromkeys(READS))
    except InputError as error:
        raise InputError(f"result {path} was not written by this version of uniprune: {error}") from None
    return Evaluation.checked(path, data), request


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            where = f"{path}.{key}" if path else str(key)
            if where not in IGNORED:
                yield from _leaves(inner, where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def _near(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and math.isclose(a, b, rel_tol=TOLERANCE)
