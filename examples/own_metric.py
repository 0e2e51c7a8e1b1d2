"""A local metric of your own: a frozen dataclass, and one line that gives it a name.

    python examples/own_metric.py [MODEL]

Its scores go everywhere that Wanda's go: any pattern and scope, `--sequential`, and the controller as its start.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import uniprune
from uniprune.saliency.metrics import METRICS


@dataclass(frozen=True)
class Peaky:
    """``|W_ij| * rms(X_j) ** a``: Wanda's with an exponent on the activations."""

    a: float = 0.5
    statistic: ClassVar[type[uniprune.SquaredNorm]] = uniprune.SquaredNorm  # what it wants to know of the inputs

    def __call__(self, weight: Tensor, inputs: uniprune.SquaredNorm) -> Tensor:
        return weight.abs().float() * inputs.rms**self.a  # [out, in], higher = keep, finite


METRICS["peaky"] = Peaky  # from here on `metric="peaky:a=0.3"` is a metric like any other; `metric=Peaky(a=0.3)` always is

if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
    for metric in ("wanda", "peaky:a=0.5", "peaky:a=0"):
        loaded = uniprune.load(model)
        recipe = uniprune.Recipe(sparsity=0.5, metric=metric, controller="none", windows=8, length=128)
        uniprune.prune_in_place(loaded, recipe)
        found = uniprune.evaluate(loaded, text_source="builtin", windows=4, length=128)
        print(f"{metric:12} perplexity {found.perplexity:.2f}")
