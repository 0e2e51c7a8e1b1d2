"""How a model's parameters lie in the checkpoint that transformers writes: mostly one key each, by the parameter's own name.

Some are renamed when a checkpoint is loaded, and experts, a key each on disk, are fused into 3-D parameters. transformers has
these conversions as data, and reverses them when it saves. They are reversed here on numbers instead of weights: each row of a
fused parameter gets its own, and where the numbers come out is where the rows lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """What of a parameter lies under a key: all of it, or rows ``start`` to ``stop`` of the matrix of one expert."""

    key: str
    expert: int | None = None
    start: int = 0
    stop: int = 0


class Layout:
    """The keys of a model's parameters. Which checkpoint it is does not matter, nor whether the model has its weights."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        found = get_model_conversion_mapping(model, add_legacy=False)
        # As transformers has it: a prefix is put back for none but the checkpoint that lacked it.
        conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
        self._like: Any = SimpleNamespace(_weight_conversions=conversions, config=getattr(model, "config", None))

    def key(self, name: str) -> str:
        """The key of a parameter that lies under one."""
        keys = list(self._reversed(name, torch.empty(1, 1)))
        return keys[0] if len(keys) == 1 else name

    def parts(self, name: str, shape: tuple[int, ...]) -> list[Part]:
        """The parts of a fused parameter ``[experts, rows, columns]``; one part if it lies under one key as it is."""
        experts, rows, _ = shape
        # Two columns: of one, some versions of transformers drop the axis.
        numbers = torch.arange(experts * rows, dtype=torch.int32).reshape(experts, rows, 1).repeat(1, 1, 2)
        parts = []
        for key, found in self._reversed(name, numbers).items():
            if found.shape == numbers.shape and torch.equal(found, numbers):
                return [Part(key)]
            first, count = int(found.flatten()[0]), len(found)
            wanted = torch.arange(first, first + count, dtype=torch.int32)[:, None].repeat(1, 2)
            if not torch.equal(found, wanted):  # of another shape, too
                return []
            parts.append(Part(key, first // rows, first % rows, first % rows + count))
        return sorted(parts, key=lambda part: (part.expert, part.start))

    def _reversed(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        if not self._like._weight_conversions:
            return {name: tensor}
        try:
            found: dict[str, Tensor] = revert_weight_conversion(self._like, {name: tensor})
        except Exception:  # a conversion that needs the values, or other parameters beside this one
            return {name: tensor}
        return found


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
