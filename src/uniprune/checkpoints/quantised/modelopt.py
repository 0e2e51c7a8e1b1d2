"""NVIDIA's ModelOpt: FP8 with a scale for each tensor or row; NVFP4 with one for 16 weights, times ``weight_scale_2``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from uniprune.checkpoints.quantised.codes import E2M1, E4M3, Found, Refused, coded, unpacked
from uniprune.storage.safetensors_index import Entry

SCALE, WHOLE, SMOOTH = "weight_scale", "weight_scale_2", "pre_quant_scale"


def find(config: dict[str, Any], entries: Mapping[str, Entry]) -> Iterator[Found]:
    """Weights with scales. Raises Refused where inputs are scaled, too: scores would be of other inputs."""
    for key, entry in entries.items():
        layer = key.removesuffix("weight")
        scale, whole = entries.get(f"{layer}{SCALE}"), entries.get(f"{layer}{WHOLE}")
        if layer == key or scale is None:
            continue
        if f"{layer}{SMOOTH}" in entries:
            raise Refused(f"the inputs of {layer.rstrip('.')} are scaled ({SMOOTH})")
        if entry.dtype == "U8" and whole is not None:
            tensor = coded(key, entry, E2M1, unpacked(entry, E2M1), [scale, whole], factor=_times)
        elif entry.dtype == "F8_E4M3" and whole is None:
            tensor = coded(key, entry, E4M3, entry.shape, [scale])
        else:
            raise Refused(f"{key} is {entry.dtype} with scales of a kind that is not known")
        yield Found(key, tensor, {key, *(f"{layer}{name}" for name in (SCALE, WHOLE, "input_scale"))})


def _times(scale: Tensor, whole: Tensor) -> Tensor:
    return scale * whole
