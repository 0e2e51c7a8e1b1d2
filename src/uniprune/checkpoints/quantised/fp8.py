"""FP8 as DeepSeek-V3 has it (``quant_method: fp8``): ``weight`` and ``weight_scale_inv``, one scale a block, row or tensor.

The same files may have packed FP4 (E2M1) experts, two codes a byte, with a scale for every 32 (DeepSeek-V4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from uniprune.checkpoints.quantised.codes import E2M1, E4M3, E5M2, Found, coded, pair, unpacked
from uniprune.storage.safetensors_index import Entry

CODES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "I8": E2M1}
OTHERS = ("activation_scale", "input_scale")  # of inputs


def find(config: dict[str, Any], entries: Mapping[str, Entry]) -> Iterator[Found]:
    """Weights with scales."""
    for key, entry in entries.items():
        scale = next((name for name in _scales(key) if name in entries), None)
        if scale is None or entry.dtype not in CODES:
            continue
        code, block = CODES[entry.dtype], pair(config.get("weight_block_size"))
        tensor = coded(key, entry, code, unpacked(entry, code), [entries[scale]], block)
        yield Found(key, tensor, {key, scale, *(f"{key.removesuffix('weight')}{other}" for other in OTHERS)})


def _scales(key: str) -> Iterator[str]:
    """What the scales of a tensor are called: some checkpoints have names of their own."""
    yield from (f"{key}_scale_inv", f"{key}_scale")
    if key.endswith(".weight"):
        yield from (f"{key.removesuffix('weight')}{name}" for name in ("scale", "qscale_weight"))
