"""The weights of tokens in each matrix's gradient, by which a few loud ones do not drown the others."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from uniprune.common.fused import fused
from uniprune.saliency.statistics import SquaredNorm

TINY = 1e-20  # stands for 0 where numbers are divided by
LOUDEST = 256.0  # a weighted gradient in float16, at most: the sum over tokens is to stay below its largest number, 65,504


class TokenWeighting:
    """Weights tokens in each matrix's gradient, such that tokens with large inputs or output gradients do not dominate it.

    A token's weight is ``|x| ** -1 * |dL/dy| ** -1/2``. Sizes are RMS over channels, each channel in units of its own RMS in
    the dense model. The weight depends on no other token, so a batch may be run in parts. The exponents are those with which
    the gradient of few tokens predicts that of many best (docs/experiments.md).

    inputs, gradients: by matrix name, the statistics of its inputs, and the RMS ``[out]`` of its output gradients.
    """

    def __init__(self, inputs: Mapping[str, SquaredNorm], gradients: Mapping[str, Tensor]) -> None:
        self._inputs = {name: norm.rms.clamp_min(1e-9).reciprocal() for name, norm in inputs.items()}
        self._gradients = {name: rms.clamp_min(TINY).reciprocal() for name, rms in gradients.items()}

    def __call__(self, name: str, x: Tensor, gradient: Tensor) -> Tensor:
        """The output gradients ``[tokens, out]`` times the tokens' weights. x: inputs ``[tokens, in]``."""
        return weighted(x, gradient, self._inputs[name], self._gradients[name])  # type: ignore[no-any-return]


@fused(kernels=1, triton="uniprune.controller.descent.kernels:weighted")
def weighted(x: Tensor, gradient: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The gradient ``[tokens, out]`` times the tokens' weights. inputs ``[in]``, outputs ``[out]``: 1 / RMS of the channels."""
    input_size, gradient_size = _rms(x, inputs), _rms(gradient, outputs)
    factors = (input_size * gradient_size.sqrt()).reciprocal()
    if gradient.dtype == torch.float16:  # in which the factor of a token whose inputs are near 0 would overflow
        return (gradient * factors[:, None]).clamp_(-LOUDEST, LOUDEST).half()
    return gradient * factors.to(gradient.dtype)[:, None]


def _rms(tokens: Tensor, units: Tensor) -> Tensor:
    """The RMS ``[tokens]`` over channels, each channel times its unit first; at least the square root of TINY."""
    if tokens.dtype == torch.bfloat16:  # has float32's range; on a CPU four times as fast
        units = units.bfloat16()
    norm: Tensor = torch.linalg.vector_norm(tokens * units, dim=1).float()
    return (norm / math.sqrt(tokens.shape[1])).clamp_min(TINY**0.5)
