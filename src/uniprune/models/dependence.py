"""What the decoder blocks of a model have in common, so that they cannot be run, or brought into memory, one by one."""

from __future__ import annotations

from torch import nn


def shared_parameter(blocks: nn.ModuleList) -> tuple[int, int, str] | None:
    """The indices of two blocks that have a parameter in common, and its name in the second (ALBERT's way, Zamba 2)."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if (first := owner.setdefault(id(parameter), index)) != index:
                return first, index, name
    return None


def share_keys_and_values(blocks: nn.ModuleList) -> bool:
    """Whether a block attends to another one's keys and values (Gemma 3n and 4, Mistral Large 4), as transformers marks it."""
    return any(getattr(module, "is_kv_shared_layer", False) is True for module in blocks.modules())
