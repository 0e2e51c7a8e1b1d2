"""compressed-tensors, as llm-compressor writes it: INT4 and INT8, FP8, MXFP4, NVFP4, by tensor, row, group or block.

``weight`` has a byte a weight, ``weight_packed`` integers in 32-bit words, with half their range added (``weight_shape`` says
how many a row), or FP4 codes in bytes; scales are in ``weight_scale``, which NVFP4 divides by ``weight_global_scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from uniprune.checkpoints.quantised.codes import (
    E2M1,
    E4M3,
    E5M2,
    INT8,
    OFFSET4,
    OFFSET8,
    Coded,
    Found,
    Refused,
    coded,
    pair,
    unpacked,
)
from uniprune.storage.safetensors_index import Entry

BYTES = {"I8": INT8, "F8_E4M3": E4M3, "F8_E5M2": E5M2}
PACKED = {4: OFFSET4, 8: OFFSET8}
SCALE, GLOBAL, SHAPE, OFFSET, ORDER = (f"weight_{name}" for name in ("scale", "global_scale", "shape", "zero_point", "g_idx"))
OTHERS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
# Where transforms change nothing as the model runs: in the stored weights, and on both sides of queries times keys.
HARMLESS = {"weight_input", "weight_output", "k_cache", "q_attn"}

Config = dict[str, Any]


def find(config: Config, entries: Mapping[str, Entry]) -> Iterator[Found]:
    """Weights with scales. Raises Refused where 0 has no code that is the same for all."""
    if (sparse := (config.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise Refused(f"its zeros are left out ({sparse}), a format that nothing writes any more")
    if places := _transformed(config):
        raise Refused(f"layers transform their {' and '.join(places)} as it runs (transform_config), which is not done here")
    block = _block(config)
    for key, entry in entries.items():
        layer, _, kind = key.rpartition("weight")
        if kind in ("", "_packed") and f"{layer}{SCALE}" in entries:
            _check(layer, entries)
            parts = {f"{layer}{part}" for part in (SCALE, GLOBAL, SHAPE, OFFSET, *OTHERS)} | {key}
            yield Found(f"{layer}weight", _tensor(f"{layer}weight", entry, layer, entries, block), parts)


def is_dense(config: Config) -> bool:
    """Whether it names no layers that are quantised: so llm-compressor writes a model that was only pruned."""
    return not config.get("config_groups")


def _transformed(config: Config) -> list[str]:
    """What layers multiply by a transform as the model runs (QuIP, SpinQuant): without it their weights compute nonsense."""
    groups = ((config.get("transform_config") or {}).get("config_groups") or {}).values()
    places = {str(one.get("location")) for group in groups for one in group.get("apply") or ()}
    return sorted(places - HARMLESS)


def _block(config: Config) -> tuple[int, int] | None:
    """The rows and columns of blocks, where some layers have them."""
    weights = ((group.get("weights") or {}) for group in (config.get("config_groups") or {}).values())
    return next((found for one in weights if (found := pair(one.get("block_structure")))), None)


def _check(layer: str, entries: Mapping[str, Entry]) -> None:
    """Raises Refused for weights whose code of zero, or whose scale, is not told by their place."""
    offset = entries.get(f"{layer}{OFFSET}")
    if offset and np.fromfile(offset.file, np.uint8, offset.stop - offset.start, offset=offset.start).any():
        raise Refused(f"it is asymmetric: each group of weights has a code of its own for 0 ({layer}{OFFSET})")
    if f"{layer}{ORDER}" in entries:
        raise Refused(f"its groups are of inputs in an order of their own ({layer}{ORDER})")


def _tensor(key: str, entry: Entry, layer: str, entries: Mapping[str, Entry], block: tuple[int, int] | None) -> Coded:
    scale = entries[f"{layer}{SCALE}"]
    if entry.dtype == "I32":
        shape = _shape(key, entries.get(f"{layer}{SHAPE}"))
        bits = entry.shape[-1] * 32 / shape[-1]
        if bits not in PACKED:
            raise Refused(f"{key} has rows of {shape[-1]} weights in {entry.shape[-1]} words, which is not 4 or 8 bits each")
        return coded(key, entry, PACKED[int(bits)], shape, [scale], block)
    if entry.dtype == "U8":
        shape = unpacked(entry, E2M1)
        if whole := entries.get(f"{layer}{GLOBAL}"):
            return coded(key, entry, E2M1, shape, [scale, whole], factor=_divided)
        return coded(key, entry, E2M1, shape, [scale])
    if entry.dtype not in BYTES:
        raise Refused(f"{key} is {entry.dtype}, and has scales")
    return coded(key, entry, BYTES[entry.dtype], entry.shape, [scale], block)


def _shape(key: str, entry: Entry | None) -> tuple[int, ...]:
    """Numbers that stand in the file itself."""
    if entry is None or entry.dtype not in ("I64", "I32"):
        raise Refused(f"{key} is packed, and has no {SHAPE}")
    kind = np.dtype(entry.dtype.lower().replace("i64", "i8").replace("i32", "i4"))
    found = np.fromfile(entry.file, kind, (entry.stop - entry.start) // kind.itemsize, offset=entry.start)
    if len(found) < 2 or (found <= 0).any():
        raise Refused(f"{key} has a {SHAPE} of {found.tolist()}")
    return tuple(found.tolist())


def _divided(scale: Tensor, whole: Tensor) -> Tensor:
    return scale / whole
