"""What other methods do, for comparison in benchmarks: OWL's sparsities, Fisher scores. SparseGPT is uniprune.comparison's."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from uniprune.common.progress import Progress, silent
from uniprune.controller.straight_through import StraightThrough
from uniprune.models.blocks import device_of
from uniprune.models.matrices import Matrices
from uniprune.sparsity.patterns.protocol import Saliency
from uniprune.sparsity.patterns.unstructured import Unstructured


def owl(
    matrices: Matrices, saliency: Saliency, sparsity: float, outlier: float = 5.0, spread: float = 0.08
) -> dict[str, float]:
    """The sparsity of each matrix, by name: OWL's (arXiv 2310.05175), one per decoder block.

    saliency: Wanda's in the paper. outlier: a score is one if it is above so many times the mean of its block's. spread: how
    far a sparsity may lie from ``sparsity``. The more outliers a block has, the less sparse it is, linearly, as steeply as
    ``spread`` and [0, 1] allow; the mean sparsity over all weights is ``sparsity``.
    """
    names: dict[int, list[str]] = {}
    for name, matrix in matrices.items():
        names.setdefault(matrix.block, []).append(name)
    sizes = {block: sum(matrices[name].size for name in here) for block, here in names.items()}
    outliers: dict[int, int] = {}
    for block, here in names.items():  # one matrix in memory at a time
        mean = sum(float(saliency[name].double().sum()) for name in here) / sizes[block]
        outliers[block] = sum(int((saliency[name] > outlier * mean).sum()) for name in here)
    # Fractions: equal ratios must not differ by a rounding error, which the scaling would blow up to the whole spread.
    mean_ratio = Fraction(sum(outliers.values()), sum(sizes.values()))
    excess = {block: Fraction(outliers[block], sizes[block]) - mean_ratio for block in names}
    largest = max(map(abs, excess.values())) or 1
    room = min(spread, sparsity, 1 - sparsity)
    return {name: sparsity - room * float(excess[matrix.block] / largest) for name, matrix in matrices.items()}


def owl_masks(
    matrices: Matrices, saliency: Saliency, sparsity: float, outlier: float = 5.0, spread: float = 0.08
) -> dict[str, Tensor]:
    """Masks cut by row, each decoder block at its own sparsity: :func:`owl`'s, with the same arguments."""
    masks: dict[str, Tensor] = {}
    for name, own in owl(matrices, saliency, sparsity, outlier, spread).items():
        masks |= Unstructured(own, "row")({name: saliency[name]})
    return masks


def fisher(model: nn.Module, matrices: Matrices, windows: Tensor, progress: Progress = silent) -> dict[str, Tensor]:
    """``W_ij^2 * mean of g_ij^2`` over the windows, float32: the first-order score of arXiv 1906.10771.

    windows: token ids ``[windows, length]``. g: gradient of the dense model's next-token loss in nats, the sum over one window.
    """
    totals = {name: torch.zeros(matrix.shape, device=matrix.device) for name, matrix in matrices.items()}

    def sink(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # else an expert that no token of this window was sent to
            totals[name] += gradient.float().square()

    with StraightThrough(matrices) as network, network.training({}, sink):
        for window in progress(windows, "differentiating", len(windows)):
            ids = window[None].to(device_of(model))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
            for block in dict.fromkeys(matrix.block for matrix in matrices.values()):
                network.flush(block)
    return {name: total.mul_(matrices[name].weight.float().square() / len(windows)) for name, total in totals.items()}
