"""Which experts of a mixture matter: by the scores of their weights, or by what they add to their layer's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uniprune.models.experts import FusedExperts, Output, Slice
from uniprune.models.matrices import Matrices, Matrix
from uniprune.saliency.calibration import OUTPUTS, Calibration, observed
from uniprune.saliency.observation import sum_over_processes
from uniprune.saliency.statistics import Norm, Statistic
from uniprune.sparsity.views import Scores

ExpertLayers = dict[str, FusedExperts]
"""Layers of experts, by the name of the module that holds them."""


def layers_of(matrices: Matrices) -> ExpertLayers:
    """The layers of fused experts that matrices are of."""
    return {matrix.module.fused.name: matrix.module.fused for matrix in matrices.values() if isinstance(matrix.module, Slice)}


def of_experts(matrices: Matrices) -> Matrices:
    """Those of fused experts."""
    return {name: matrix for name, matrix in matrices.items() if isinstance(matrix.module, Slice)}


@dataclass(frozen=True)
class Observed:
    """What the experts of a layer put out. tokens: how many were routed to each; reap: :func:`observe` says what."""

    tokens: list[int]
    reap: Tensor


def observe(calibration: Calibration) -> dict[str, Observed]:
    """How many tokens were routed to each expert, and REAP's criterion (arXiv 2510.13999), by layer.

    That is the norm of what an expert puts out, times the router's weight, averaged over the tokens routed to it; float64
    ``[experts]``, 0 for an expert that no token was routed to. It takes one forward pass.
    """
    outputs: Matrices = {}
    layers = layers_of(calibration.matrices)
    blocks = {m.module.fused.name: m.block for m in calibration.matrices.values() if isinstance(m.module, Slice)}
    for name, fused in layers.items():
        fused.outputs = {expert: Output(fused, expert) for expert in range(fused.experts)}
        outputs |= {f"{name}.{e}": Matrix(f"{name}.{e}", one, blocks[name], False) for e, one in fused.outputs.items()}
    try:
        seen = observed(
            replace(calibration, matrices=outputs),
            Norm,
            lambda _, statistics: sum_over_processes(statistics),
            OUTPUTS,
            all_called=False,
        )
    finally:
        for fused in layers.values():
            fused.outputs = {}
    return {name: _of_layer([seen[f"{name}.{expert}"] for expert in range(fused.experts)]) for name, fused in layers.items()}


def _of_layer(seen: Sequence[Statistic]) -> Observed:
    return Observed([one.tokens for one in seen], torch.stack([one.mean.cpu() for one in seen]))


def by_weights(saliency: Scores, matrices: Matrices, seen: Mapping[str, Observed] | None) -> dict[str, Tensor]:
    """The scores of experts by those of their weights: sums over all weights of an expert, float64 ``[experts]``, by layer.

    Scores that are on a scale of their own in each matrix (``comparable``) are divided by their mean over the experts first,
    so that each of an expert's matrices counts alike. seen: of scores by inputs, which are those of a token on average; with
    the root of their number an expert counts by the norm over all of its tokens, as in Wanda's paper, and so by how often it
    is chosen. None of scores that know no inputs.
    """
    sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, scores in saliency.items():
        part = matrices[name].module
        assert isinstance(part, Slice)
        places = sums[part.fused.name]
        if part.place not in places:
            places[part.place] = torch.zeros(part.fused.experts, dtype=torch.float64)
        places[part.place][part.expert] += scores.sum(dtype=torch.float64).cpu()
    found: dict[str, Tensor] = {}
    for layer, places in sums.items():
        each = torch.stack([_scaled(one, saliency.comparable) for one in places.values()]).sum(0)
        found[layer] = each if seen is None else each * torch.tensor(seen[layer].tokens).double().sqrt()
    return found


def _scaled(sums: Tensor, comparable: bool) -> Tensor:
    mean = float(sums.mean())
    return sums if comparable or not mean else sums / mean


def best(scores: Tensor, kept: int, groups: int = 1) -> list[int]:
    """The numbers of the experts to keep, ascending: those with the highest scores; of each group as many.

    groups: experts next to each other that a router chooses among first. Ties go to the lower number.
    """
    each = scores.view(groups, -1)
    order = each.sort(dim=1, descending=True, stable=True).indices[:, : kept // groups]
    return sorted((order + torch.arange(groups)[:, None] * each.shape[1]).flatten().tolist())
