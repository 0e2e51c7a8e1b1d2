"""Proximal maps against grids, torch's optimiser and each other's objectives."""

from itertools import combinations

import pytest
import torch

from uniprune.controller.prox import (
    nm_regulariser,
    prox_nm,
    soft_threshold,
)
from uniprune.errors import InputError
from uniprune.sparsity.patterns.nm import NM


def l1_objective(x, v, lam):
    """What soft_threshold minimises."""
    return 0.5 * (x - v).square().sum() + lam * x.abs().sum()


def nm_objective(w, z, lam, n, m):
    """What prox_nm minimises."""
    return 0.5 * (w - z).square().sum() + lam * nm_regulariser(w, n, m)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_soft_threshold_is_the_best_on_a_grid(lam):
    grid = torch.linspace(-4, 4, 801)
    for value in [-1.7, -0.3, -0.1, 0.0, 0.2, 0.3, 2.5]:
        v = torch.tensor([value])
        best = grid[torch.stack([l1_objective(x, v, lam) for x in grid]).argmin()]
        assert soft_threshold(v, lam).item() == pytest.approx(float(best), abs=1e-2)


def test_soft_threshold_by_hand():
    assert soft_threshold(torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0]), 1.0).tolist() == [-1, 0, 0, 0, 2]


def test_nonsense_is_refused():
    with pytest.raises(InputError, match="weight -1"):
        soft_threshold(random(3), -1)
    with pytest.raises(InputError, match="weight nan"):
        prox_nm(random(1, 4), float("nan"), 2, 4)
    with pytest.raises(InputError, match="6 inputs are not divisible by 4"):
        prox_nm(random(2, 6), 1.0, 2, 4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4), (4, 8), (4, 4)])
def test_the_regulariser_is_a_sum_over_sets(n, m):
    w = random(3, 2 * m, seed=m)
    sets = [group[list(chosen)].abs().prod() for group in w.reshape(-1, m) for chosen in combinations(range(m), n + 1)]
    torch.testing.assert_close(nm_regulariser(w, n, m), sum(sets, torch.zeros(())))
    assert nm_regulariser(w * dict(NM(n, m)({"w": w.abs()}))["w"], n, m) == 0


def test_two_of_four_by_hand():
    assert nm_regulariser(torch.tensor([[1.0, -2.0, 3.0, 4.0]]), 2, 4).item() == 6 + 8 + 12 + 24


def best_on_a_grid(z, lam, n, m, points):
    """The lowest objective of one group on a grid from 0 to each magnitude; beyond it, or across 0, both terms only grow."""
    axes = [torch.linspace(0, 1, points) * value for value in z[0]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, m)
    size = grid.abs()
    sets = [size[:, list(chosen)].prod(1) for chosen in combinations(range(m), n + 1)]
    return float((0.5 * (grid - z).square().sum(1) + lam * torch.stack(sets).sum(0)).min())


@pytest.mark.parametrize(("n", "m", "points"), [(2, 4, 16), (1, 4, 16), (3, 4, 16), (1, 2, 501), (2, 3, 41)])
@pytest.mark.parametrize("lam", [0.05, 0.3, 0.7, 1.0, 2.0, 10.0])
def test_prox_nm_beats_a_grid(n, m, points, lam):
    """Random, tied and nearly tied groups: at ties a descent from z alone overshoots into a corner."""
    groups = [random(1, m, seed=seed) for seed in range(6)]
    groups += [torch.ones(1, m), torch.tensor([[1.0, 1.0, 0.9, 0.9]])[:, :m], torch.tensor([[1.0, -0.5, 0.0, 0.0]])[:, :m]]
    found = prox_nm(torch.cat(groups), lam, n, m)
    for z, w in zip(groups, found, strict=True):
        assert float(nm_objective(w[None], z, lam, n, m)) <= best_on_a_grid(z, lam, n, m, points) + 1e-6, z


@pytest.mark.parametrize("lam", [0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (2, 3)])
def test_random_starts_find_nothing_better(n, m, lam):
    """Gradient descent on the box, from 30 random points, near the weights where the number of survivors changes."""
    z = 1 - 0.1 * torch.rand(20, m, generator=torch.Generator().manual_seed(1))
    found = prox_nm(z, lam, n, m)
    starts = z.repeat(30, 1)
    w = torch.rand(starts.shape, generator=torch.Generator().manual_seed(2)) * starts
    for _ in range(300):
        (gradient,) = torch.autograd.grad(nm_objective(w.requires_grad_(), starts, lam, n, m), w)
        w = (w - 0.1 * gradient).detach().clamp_min(0)
    for group, tries in enumerate(w.reshape(30, 20, 1, m).unbind(1)):
        best = min(nm_objective(one, z[group, None], lam, n, m) for one in tries)
        assert nm_objective(found[group, None], z[group, None], lam, n, m) <= best + 1e-5


@pytest.mark.parametrize("lam", [0.3, 1.0, 3.0])
def test_many_groups_are_solved_as_each_alone(lam, monkeypatch):
    z = random(2, 12, seed=5)
    together = prox_nm(z, lam, 2, 4)
    alone = torch.cat([prox_nm(group[None], lam, 2, 4) for group in z.reshape(-1, 4)]).reshape(z.shape)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    monkeypatch.setattr("uniprune.controller.prox.CHUNK", 5)
    torch.testing.assert_close(prox_nm(z, lam, 2, 4), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_prox_nm_between_nothing_and_all(n, m):
    z = random(5, 2 * m, seed=7)
    assert torch.equal(prox_nm(z, 0.0, n, m), z)
    assert torch.equal(prox_nm(z, 1e6, n, m), z * dict(NM(n, m)({"w": z.abs()}))["w"])
    shrunk = prox_nm(z, 0.2, n, m)
    assert bool((shrunk.abs() <= z.abs()).all())
    assert bool((shrunk * z >= 0).all())
    assert nm_regulariser(shrunk, n, m) < nm_regulariser(z, n, m)


def test_among_equal_magnitudes_the_lower_index_survives():
    assert prox_nm(torch.tensor([[1.0, -1.0, 1.0, 1.0]]), 1e3, 2, 4).tolist() == [[1, -1, 0, 0]]
    assert prox_nm(torch.tensor([[3.0, -4.0]]), 1e3, 2, 2).tolist() == [[3, -4]]
    assert prox_nm(torch.tensor([[3.0]]), 1e3, 1, 1).tolist() == [[3]]
