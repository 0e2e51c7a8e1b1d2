"""Each metric against its formula written out entry by entry; what all of them keep to is in test_metric_contract."""

import pytest
import torch

from uniprune.errors import InputError
from uniprune.saliency.metrics import METRICS, RIA, Magnitude, StochRIA, Wanda, parse, spell
from uniprune.saliency.statistics import SquaredNorm
from uniprune.sparsity.views import ScaledToMeanOne


def statistic(x):
    found = SquaredNorm(x.shape[1], x.device)
    found.update(x)
    return found


@pytest.fixture
def weight():
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return torch.randn(11, 7, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 8)


def test_wanda_entry_by_entry(weight, x):
    scores = Wanda()(weight, statistic(x))
    for i in range(5):
        for j in range(7):
            expected = abs(float(weight[i, j])) * (sum(float(v) ** 2 for v in x[:, j]) / 11) ** 0.5
            assert float(scores[i, j]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("least", [1, 1e-9, 1e-30])
def test_ria_entry_by_entry(weight, x, least):
    """However small a row is beside the others."""
    weight[2] *= least
    scores = RIA(a=0.3)(weight, statistic(x))
    for i in range(5):
        for j in range(7):
            size = abs(float(weight[i, j]))
            row, column = float(weight[i].abs().sum()), float(weight[:, j].abs().sum())
            expected = (size / row + size / column) * float(x[:, j].square().mean()) ** 0.15
            assert float(scores[i, j]) == pytest.approx(expected, rel=1e-5)


def test_wanda_on_unit_activations_is_magnitude(weight):
    assert torch.equal(Wanda()(weight, statistic(torch.ones(3, 7))), Magnitude()(weight))


def test_stochria_with_every_entry_is_ria(x):
    square = torch.randn(7, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(StochRIA(beta=1.0)(square, statistic(x)), RIA()(square, statistic(x)))


def test_stochria_samples_by_its_seed(weight, x):
    one, again, other = (StochRIA(beta=0.4, seed=seed)(weight, statistic(x)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_statistics_merge_to_the_same_sums(x):
    whole, part = statistic(x), statistic(x[:4])
    part.merge(statistic(x[4:]))
    assert part.tokens == whole.tokens == 11
    torch.testing.assert_close(part.rms, whole.rms)


def test_statistics_do_not_overflow_whatever_comes_in(x):
    found = statistic(x.to(torch.bfloat16) * 1000)
    assert (found.total.dtype, found.rms.dtype) == (torch.float64, torch.float32)
    assert bool(torch.isfinite(found.total).all())


def test_parse_and_spell():
    assert parse("ria:a=0.25") == RIA(a=0.25)
    assert parse("stochria:beta=0.5", seed=7) == StochRIA(beta=0.5, seed=7)
    assert parse("stochria:seed=3", seed=7) == StochRIA(seed=3)
    for name in METRICS:
        assert parse(spell(parse(name, seed=5))) == parse(name, seed=5)


@pytest.mark.parametrize("spec", ["wnada", "ria:b=1", "ria:a=x", "ria:a=-1", "stochria:beta=0", "wanda:a=1", ""])
def test_unknown_metrics_and_hyper_parameters(spec):
    with pytest.raises(InputError):
        parse(spec)


def test_a_hyper_parameter_without_a_value_is_refused():
    with pytest.raises(InputError, match="metric ria:a: 'a' is not NAME=VALUE"):
        parse("ria:a")


def test_comparable_scores_have_mean_one():
    saliency = {"a": torch.rand(3, 4) * 100, "b": torch.rand(2, 2), "dead": torch.zeros(2, 2)}
    comparable = ScaledToMeanOne(saliency)
    assert float(comparable["a"].mean()) == pytest.approx(1)
    assert float(comparable["b"].mean()) == pytest.approx(1)
    assert torch.equal(comparable["dead"], saliency["dead"])
