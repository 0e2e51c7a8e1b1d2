"""Objects of a user's own, in no table of uniprune: statistics, metrics, a pattern, controllers."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.protocol import Controller, ControllerRecord, Cost
from uniprune.saliency.calibration import one_shot
from uniprune.saliency.statistics import Gram, SquaredNorm, Statistic
from uniprune.sparsity.patterns.protocol import BasePattern


class AbsoluteSum(Statistic):
    """Per input channel, the sum of magnitudes."""

    @staticmethod
    def sums(x):
        return x.abs().sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Loud:
    """``|W_ij| * mean |X_j|``: Wanda with another norm of the inputs."""

    power: float = 1.0
    statistic: ClassVar = AbsoluteSum

    def __call__(self, weight, inputs):
        assert type(inputs) is AbsoluteSum, inputs
        return weight.abs().float() * inputs.mean.float() ** self.power


@dataclass(frozen=True)
class Correlated:
    """``|W_ij| * sum_k |A_jk|``, A the Gram matrix: wants more than channels."""

    statistic: ClassVar = Gram

    def __call__(self, weight, inputs):
        assert type(inputs) is Gram, inputs
        return weight.abs().float() * inputs.mean.abs().sum(0)


@dataclass(frozen=True)
class Blind:
    """``W_ij ** 2``: wants nothing of the inputs."""

    statistic: ClassVar = None

    def __call__(self, weight, inputs):
        assert inputs is None
        return weight.float().square()


class Largest(SquaredNorm):
    """No statistic: the maximum of two batches is not the sum of their maxima."""

    @staticmethod
    def sums(x):
        return x.abs().amax(0).double() if len(x) else torch.zeros(x.shape[1], dtype=torch.float64)


@dataclass(frozen=True)
class FirstInputs(BasePattern):
    """Keeps the first inputs of every row, whatever the scores say."""

    keep: int = 3
    of: int = 4

    @property
    def sparsity(self):
        return 1 - self.keep / self.of

    def __str__(self):
        return f"the first {self.keep} of {self.of} inputs"

    def unsupported(self, rows, columns):
        return None if columns % self.of == 0 else f"{columns} inputs are not divisible by {self.of}"

    def prepare(self, saliency):
        return lambda name, scores: torch.arange(scores.shape[1]).expand(scores.shape) < scores.shape[1] * self.keep // self.of


@dataclass(frozen=True)
class Lowest(BasePattern):
    """Removes the lowest scores of each matrix. scope: a word of its own, which says nothing of rows to anybody else."""

    sparsity: float = 0.3
    scope: str = "row"

    def __str__(self):
        return f"the lowest {self.sparsity:g}"

    def prepare(self, saliency):
        def create(name, scores):
            order = scores.flatten().argsort()
            mask = torch.ones(scores.numel(), dtype=torch.bool)
            mask[order[: int(self.sparsity * scores.numel() + 1e-9)]] = False
            return mask.reshape(scores.shape)

        return create


@dataclass(frozen=True)
class Signs(MirrorDescent):
    """Mirror descent that sees of a gradient nothing but its signs: an update rule of its own under the same loop."""

    def step(self, state, gradient, size):
        return state._replace(dual=state.dual - size * state.unit * gradient.sign(), steps=state.steps + 1)


@dataclass(frozen=True)
class Halved(Controller):
    """The local metric of the first half of the windows: a controller without any descent."""

    cost: ClassVar = Cost(flops_per_token=1)
    in_memory: ClassVar = False
    images: ClassVar = True  # one_shot is shown them
    share: float = 0.5

    def calibrate(self, calibration, metric, targets, steps=None, seed=0):
        steps = steps or max(1, int(len(calibration.windows) * self.share))
        local = one_shot(replace(calibration, windows=calibration.windows[:steps]), metric)
        tokens = steps * calibration.windows.shape[1]
        return dict(local), ControllerRecord(objective="score", unit="of the last matrix", steps=steps, tokens=tokens)
