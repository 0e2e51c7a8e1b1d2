"""MXFP4 as gpt-oss has it: ``gate_up_proj_blocks`` of 32 E2M1 codes, two a byte, and ``gate_up_proj_scales``.

Scales are powers of two, a byte each. The experts are stored by output; the model has them transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from uniprune.checkpoints.quantised.codes import E2M1, Found, coded
from uniprune.storage.safetensors_index import Entry

BLOCKS, SCALES = "_blocks", "_scales"


def find(config: dict[str, Any], entries: Mapping[str, Entry]) -> Iterator[Found]:
    """Stacks of experts, ``[experts, outputs, blocks, bytes]``."""
    for blocks, entry in entries.items():
        key = blocks.removesuffix(BLOCKS)
        scales = key + SCALES
        if key != blocks and scales in entries and entry.dtype == "U8" and len(entry.shape) == 4:
            experts, outputs, number, size = entry.shape
            shape = (experts, outputs, number * size * 2)
            yield Found(key, coded(key, entry, E2M1, shape, [entries[scales]], flipped=True), {blocks, scales})
