"""What all metrics and all statistics keep to, those of a user's own included; and that a metric is given its own statistic
by whatever calibrates: against the statistic of the inputs that hooks have seen."""

import importlib.util

import pytest
import torch

from conftest import VOCABULARY, tiny_model
from own import AbsoluteSum, Blind, Correlated, Largest, Loud
from small_models import tiny
from uniprune import Recipe
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.passes.resident import Resident
from uniprune.controller.start import sensitivities
from uniprune.controller.straight_through import StraightThrough
from uniprune.controller.unipruning import UniPruning
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.blocks import last_hidden
from uniprune.models.matrices import find_blocks, find_matrices
from uniprune.saliency import metrics, statistics
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import METRICS, Wanda
from uniprune.saliency.observation import FEW
from uniprune.saliency.refine import damped, refine
from uniprune.saliency.sequential import WEIGHT, first_tokens, refined, sequential
from uniprune.saliency.statistics import Gram, SquaredNorm, Statistic
from uniprune.sparsity.patterns.nm import NM

CPU = torch.device("cpu")
ALL_METRICS = [*(metrics.parse(name, seed=5) for name in METRICS), Loud(), Correlated(), Blind()]
STATISTICS = [SquaredNorm, Gram, AbsoluteSum]
OWN = [Loud(power=0.5), Correlated(), Blind()]


def name_of(one):
    return getattr(one, "__name__", type(one).__name__)


def tokens(count=8, length=16):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(kind, x):
    found = kind(x.shape[1], x.device)
    found.update(x)
    return found


def seen(model, matrices, windows):
    """The inputs ``[tokens, in]`` of every matrix."""
    inputs, handles = {name: [] for name in matrices}, []
    for name, matrix in matrices.items():
        keep = inputs[name].append
        handles += [matrix.module.register_forward_pre_hook(lambda m, args, keep=keep: keep(args[0].flatten(0, 1)))]
    last_hidden(model, windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def by_hand(metric, model, matrices, windows):
    """Scores from inputs that hooks have seen."""
    inputs = seen(model, matrices, windows)
    kind = metric.statistic
    return {name: metric(matrix.weight, filled(kind, inputs[name]) if kind else None) for name, matrix in matrices.items()}


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", ALL_METRICS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores(metric, dtype):
    """Float32, the weight's shape, finite and >= 0, a zero weight scores 0; also with dead rows, columns and inputs."""
    weight, x = numbers(5, 7).to(dtype), numbers(11, 7, seed=2) * torch.arange(1, 8)
    weight[2], weight[:, 3] = 0, 0
    x[:, 5] = 0
    before = weight.clone()
    scores = metric(weight, filled(metric.statistic, x) if metric.statistic else None)
    assert scores.dtype == torch.float32
    assert scores.shape == weight.shape
    assert bool(torch.isfinite(scores).all())
    assert bool((scores >= 0).all())
    assert bool((scores[weight == 0] == 0).all())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("metric", ALL_METRICS, ids=name_of)
def test_metrics_can_be_used_spelled_and_recorded(metric):
    metrics.check(metric)
    spelled = metrics.spell(metric)
    assert (spelled is not None) == (type(metric) in METRICS.values())
    if spelled:
        assert metrics.parse(spelled) == metric
        assert metrics.record(metric) == spelled
    else:
        assert metrics.record(metric)["class"].endswith(type(metric).__name__)


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_hyper_parameters_have_their_types_whatever_the_file_imports(tmp_path, monkeypatch, future):
    (tmp_path / "mine.py").write_text(
        future + "from dataclasses import dataclass\nfrom typing import ClassVar\n\n\n@dataclass(frozen=True)\nclass Odd:\n"
        "    count: int = 2\n    share: float = 1\n    on: bool = True\n    name: str = 'a'\n    statistic: ClassVar = None\n\n"
        "    def __call__(self, weight, inputs):\n        return weight.abs().float()\n"
    )
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "mine", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METRICS, "odd", module.Odd)
    found = metrics.parse("odd:count=3,share=2,on=false,name=b")
    assert [(type(value), value) for value in vars(found).values()] == [(int, 3), (float, 2.0), (bool, False), (str, "b")]
    assert metrics.parse(metrics.spell(found)) == found
    for wrong in ("count=1.5", "count=x", "share=nan", "on=2", "on=perhaps", "size=1"):
        with pytest.raises(InputError, match=f"metric odd: '?{wrong.partition('=')[0]}"):
            metrics.parse(f"odd:{wrong}")


class Unsaid:
    statistic = None

    def __call__(self, weight, inputs):
        return weight


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (Wanda, "Wanda is a class; give an object of it, Wanda()"),
        (Unsaid(), "Unsaid is no dataclass"),
        (3, "3 is neither a spelling nor a metric: it has no statistic"),
    ],
)
def test_what_is_no_metric_is_refused(metric, reason):
    with pytest.raises(InputError, match=reason):
        Recipe(metric=metric)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_are_sums_over_tokens(kind):
    """However they are split; of a size that is said; and what stands in for them is even, and has the power asked for."""
    statistics.check(kind)
    x = numbers(11, 7)
    whole, merged, again = filled(kind, x), filled(kind, x[:4]), filled(kind, x[4:])
    merged.merge(filled(kind, x[4:]))
    again.merge(filled(kind, x[:4]))
    assert whole.tokens == merged.tokens == again.tokens == 11
    for other in (merged, again):
        torch.testing.assert_close(other.total, whole.total)
    assert whole.total.nbytes == kind.nbytes(7)
    assert not kind(7, CPU).total.any()
    whole.become_even(3.0)
    assert (whole.tokens, whole.power) == (1, pytest.approx(3))
    permuted = kind(7, CPU)
    permuted.become_even(3.0)
    assert torch.equal(permuted.total, whole.total)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Largest, "is not what they add together; it must be a sum over tokens"),
        (Statistic, "NotImplementedError"),
        (dict, "no subclass of"),
        ("rms", "no subclass of"),
    ],
)
def test_what_is_no_statistic_is_refused_before_any_work(kind, reason, monkeypatch):
    monkeypatch.setattr(Loud, "statistic", kind)
    with pytest.raises(InputError, match=reason):
        Recipe(sparsity="2:4", metric=Loud())


# ---------------------------------------------------------------------------------- each metric gets its own statistic


@pytest.mark.parametrize("metric", OWN, ids=name_of)
def test_one_shot(metric):
    model = tiny_model()
    matrices = find_matrices(model)
    expected, found = by_hand(metric, model, matrices, tokens()), one_shot(Calibration(model, matrices, tokens()), metric)
    for name in matrices:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("create", [sequential, refined])
@pytest.mark.parametrize("metric", OWN, ids=name_of)
def test_block_by_block(create, metric):
    """Against the slow way: prune the first blocks for good, run the whole model, score, and refine if it is to, the next."""
    model, reference = tiny_model(), tiny_model()
    found, _ = create(Calibration(model, find_matrices(model), tokens()), metric, NM(2, 4))
    everything = find_matrices(reference)
    for index in range(3):
        here = {name: matrix for name, matrix in everything.items() if matrix.block == index}
        expected = dict(NM(2, 4)(by_hand(metric, reference, here, tokens())))
        if create is refined:
            inputs = seen(reference, here, tokens())
            first = seen(reference, here, first_tokens(tokens()))
            grams = {
                name: x.T @ x / len(x) + WEIGHT * first[name].T @ first[name] / len(first[name]) for name, x in inputs.items()
            }
            expected = {name: refine(here[name].weight, mask, damped(grams[name]), NM(2, 4)) for name, mask in expected.items()}
        for name, mask in expected.items():
            assert float((found[name] != mask).float().mean()) < 1e-3, name  # sums in another order
        masking.apply(here, ((name, found[name]) for name in here))


@pytest.mark.parametrize("metric", OWN, ids=name_of)
def test_the_start_of_mirror_descent(metric):
    """Steps of size 0 leave the start: a power of the metric's scores on the first windows, times the output gradients."""
    model, windows = tiny_model(), tokens(16, 32)
    matrices, settings = find_matrices(model), MirrorDescent(step_size=0.0, batch_tokens=32)
    duals, _ = settings.calibrate(Calibration(model, matrices, windows), metric, [NM(2, 4)], 1)
    expected = by_hand(metric, model, matrices, windows[:-2])
    with StraightThrough(matrices) as network:
        start = sensitivities(Resident(model, find_blocks(model)[1], network), windows[:-2], metric.statistic)
    for name in matrices:
        by_formula = (expected[name] * start.gradients[name][:, None]).clamp_min(1e-20) ** settings.power
        torch.testing.assert_close(duals[name], by_formula, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", OWN, ids=name_of)
def test_the_published_controller(metric):
    """A copy that does not learn leaves the local saliency, but for statistics of one window at a time."""
    model = tiny_model()
    matrices, window = find_matrices(model), tokens(1, 64)
    found, _ = UniPruning(learning_rate=0.0).calibrate(Calibration(model, matrices, window), metric, [NM(2, 4)], 3)
    expected = by_hand(metric, model, matrices, window)
    for name in matrices:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_starved_expert_is_on_its_fellows_scale_whatever_the_statistic():
    """Both kinds of statistics of a start are evened out, where both are collected."""
    model = tiny("mixtral")
    matrices = find_matrices(model)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with StraightThrough(matrices) as network:
        start = sensitivities(Resident(model, find_blocks(model)[1], network), ids, AbsoluteSum)
    starved = [name for name in matrices if matrices[name].group and start.norms[name].tokens < FEW]
    assert starved
    for name in starved:
        assert start.statistics[name].tokens == start.norms[name].tokens == 1
        assert len(start.statistics[name].total.unique()) == len(start.norms[name].total.unique()) == 1
