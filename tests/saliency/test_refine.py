"""Refinement against brute force over masks, and what it must never do: raise an error, change a count or a weight."""

from itertools import combinations

import pytest
import torch

import pretend
from conftest import VOCABULARY, tiny_model
from uniprune import Recipe
from uniprune.errors import InputError
from uniprune.models import masking
from uniprune.models.blocks import last_hidden
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Magnitude, Wanda
from uniprune.saliency.observation import observing
from uniprune.saliency.refine import SWEEPS, damped, descend_groups, errors, refine, swap_rows
from uniprune.saliency.sequential import WEIGHT, first_tokens, refined, sequential
from uniprune.saliency.statistics import Gram, SquaredNorm
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.ruled import Rule, Ruled
from uniprune.sparsity.patterns.unstructured import Unstructured

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(8, 16), Unstructured(0.5), Unstructured(0.7)]


def tokens():
    return torch.randint(0, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(0))


def case(rows, columns, seed=0):
    """A matrix, and the Gram matrix of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.linspace(0.2, 2, columns)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def start(weight, gram, pattern):
    """The mask of Wanda."""
    return dict(pattern({"w": weight.abs() * gram.diagonal().sqrt()}))["w"]


def row_error(weight, kept, gram):
    """The error of one row, kept given by index, straight from the definition and in float64."""
    change = weight.double().clone()
    change[list(kept)] = 0
    return float(change @ gram.double() @ change)


def indices(mask):
    return mask.nonzero().flatten().tolist()


def exchanges(kept, columns):
    """Every mask one exchange away."""
    return [[*(i for i in kept if i != j), p] for j in kept for p in range(columns) if p not in kept]


def test_errors_are_the_mean_squared_change_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 8, generator=generator), torch.randn(5, 8, generator=generator)
    gram = Gram(8, x.device)
    gram.update(x)
    mask = torch.rand(5, 8, generator=generator) < 0.5
    expected = (x @ weight.T - x @ (weight * mask).T).square().mean(0)
    torch.testing.assert_close(errors(weight, mask, gram.mean), expected)


def test_damping_leads_from_the_plain_error_to_wandas():
    weight, gram = case(20, 48)
    assert torch.equal(damped(gram, 0), gram)
    assert torch.equal(damped(gram, 1), gram.diagonal().diag())
    assert torch.equal(damped(gram), (gram + gram.diagonal().diag()) / 2)
    for pattern in (NM(2, 4), Unstructured(0.5)):
        mask = start(weight, gram, pattern)
        assert torch.equal(refine(weight, mask, damped(gram, 1), pattern), mask)
        shares = [errors(weight, refine(weight, mask, damped(gram, share), pattern), gram).sum() for share in (0, 0.5, 1)]
        assert shares == sorted(shares)


def test_a_rare_token_that_matters_is_harmed_less():
    """Most tokens lie in few directions, in which lost weights can cancel each other; one token is unlike them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=generator) @ torch.randn(4, 48, generator=generator)
    rare = 3 * torch.randn(1, 48, generator=generator)
    weight, gram = torch.randn(64, 48, generator=generator), (x.T @ x + rare.T @ rare) / 2001
    mask = start(weight, gram, NM(2, 4))
    plain, careful = (refine(weight, mask, damped(gram, share), NM(2, 4)) for share in (0, 0.5))
    change = [float((rare @ (weight * ~cut).T).square().sum()) for cut in (careful, plain)]
    assert change[0] < 0.8 * change[1]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3)])
def test_one_group_takes_the_best_of_all_its_masks(n, m):
    weight, gram = case(20, m, seed=n * m)
    found = descend_groups(weight, start(weight, gram, NM(n, m)), gram, NM(n, m), sweeps=1)
    for row, kept in zip(weight, found, strict=True):
        assert indices(kept) == list(min(combinations(range(m), n), key=lambda choice: row_error(row, choice, gram)))


@pytest.mark.parametrize("panel", [4, 128])
def test_a_sweep_gives_each_group_its_best_mask_in_turn(monkeypatch, panel):
    """Against the same descent done entry by entry; the products are kept current within panels and across them."""
    monkeypatch.setattr("uniprune.saliency.refine.PANEL", panel)
    weight, gram = case(30, 12)
    mask = start(weight, gram, NM(2, 4))
    found = descend_groups(weight, mask, gram, NM(2, 4), sweeps=1)
    for row, before, after in zip(weight, mask, found, strict=True):
        kept = indices(before)
        for first in range(0, 12, 4):
            others = [i for i in kept if i // 4 != first // 4]
            choices = [[*others, *choice] for choice in combinations(range(first, first + 4), 2)]
            kept = min(choices, key=lambda choice: row_error(row, choice, gram))
        assert sorted(kept) == indices(after)


def test_large_groups_end_where_no_exchange_helps():
    weight, gram = case(5, 32)
    found = descend_groups(weight, start(weight, gram, NM(8, 16)), gram, NM(8, 16), sweeps=100)
    for row, mask in zip(weight, found, strict=True):
        kept = indices(mask)
        within = [other for other in exchanges(kept, 32) if sum(i < 16 for i in other) == 8]
        assert min(row_error(row, other, gram) for other in within) >= row_error(row, kept, gram) * (1 - 1e-4)


@pytest.mark.parametrize("columns", [2, 4, 5, 6])
def test_one_swap_is_the_best_one(columns):
    weight, gram = case(40, columns, seed=columns)
    mask = start(weight, gram, Unstructured(0.5))
    found = swap_rows(weight, mask, gram, rounds=1, swaps=1)
    for row, before, after in zip(weight, mask, found, strict=True):
        best = min([indices(before), *exchanges(indices(before), columns)], key=lambda kept: row_error(row, kept, gram))
        assert indices(after) == sorted(best)


def test_swaps_in_one_round_are_exact_after_those_before():
    """Three swaps on one product equal a greedy search entry by entry, in which no weight moves twice."""
    weight, gram = case(30, 10)
    mask = start(weight, gram, Unstructured(0.5))
    found = swap_rows(weight, mask, gram, rounds=1, swaps=3)
    for row, before, after in zip(weight, mask, found, strict=True):
        kept, first = indices(before), set(indices(before))
        for _ in range(3):
            moved = first ^ set(kept)
            free = [
                other for other in exchanges(kept, 10) if moved <= first ^ set(other) and len(first ^ set(other)) > len(moved)
            ]
            kept = min([kept, *free], key=lambda other: row_error(row, other, gram))
        assert indices(after) == sorted(kept)


def test_swaps_end_where_no_pair_helps():
    weight, gram = case(300, 20)  # several chunks of rows
    found = swap_rows(weight, start(weight, gram, Unstructured(0.6)), gram, rounds=100)
    for row, mask in zip(weight[::20], found[::20], strict=True):
        kept = indices(mask)
        assert min(row_error(row, other, gram) for other in exchanges(kept, 20)) >= row_error(row, kept, gram) * (1 - 1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract(pattern, dtype):
    """Lower in total and nowhere higher, by the definition; the pattern's counts; inputs untouched; the same again."""
    weight, gram = case(24, 48)
    weight = weight.to(dtype)
    mask = start(weight.float(), gram, pattern)
    before = weight.clone(), mask.clone(), gram.clone()
    found = refine(weight, mask, gram, pattern)
    for now, then in zip((weight, mask, gram), before, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(found, refine(weight, mask, gram, pattern))
    group = pattern.m if isinstance(pattern, NM) else 48
    keep = pattern.n if isinstance(pattern, NM) else pattern.keep(48)
    assert bool((found.reshape(-1, group).sum(1) == keep).all())
    old = [row_error(row, indices(kept), gram) for row, kept in zip(weight, mask, strict=True)]
    new = [row_error(row, indices(kept), gram) for row, kept in zip(weight, found, strict=True)]
    assert errors(weight, found, gram).tolist() == pytest.approx(new, rel=1e-3)
    assert all(after <= ahead * (1 + 1e-5) for after, ahead in zip(new, old, strict=True))
    assert sum(new) < 0.9 * sum(old)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_uncorrelated_inputs_leave_the_magnitude_mask(pattern):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(48) * 0.3
    ties = weight.sign() * weight[:, :1], (2 * weight).round() * 0.7  # they stay as they are, whatever is rounded
    for values in (weight, *ties):
        mask = dict(pattern({"w": values.abs()}))["w"]
        found = descend_groups(values, mask, gram, pattern) if isinstance(pattern, NM) else swap_rows(values, mask, gram)
        assert torch.equal(found, mask)
        assert torch.equal(refine(values, mask, gram, pattern), mask)


@pytest.mark.parametrize("pattern", [*PATTERNS, NM(4, 4), Unstructured(0), Unstructured(1)], ids=str)
def test_degenerate_cases_leave_the_mask(pattern):
    weight, gram = case(4, 48)
    mask = start(weight, gram, pattern)
    assert torch.equal(refine(weight, mask, torch.zeros(48, 48), pattern), mask)
    assert torch.equal(refine(torch.zeros(4, 48), mask, gram, pattern), mask)
    if pattern.sparsity in (0, 1):
        assert torch.equal(refine(weight, mask, gram, pattern), mask)


def test_gram_matrices_merge_and_hold_the_norms():
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(2))
    whole, part, other, norms = (kind(7, x.device) for kind in (Gram, Gram, Gram, SquaredNorm))
    for statistic, rows in ((whole, x), (part, x[:4]), (other, x[4:].to(torch.float64)), (norms, x)):
        statistic.update(rows)
    part.merge(other)
    assert part.tokens == whole.tokens == 11
    assert part.total.dtype == torch.float32
    torch.testing.assert_close(part.mean, (x.T @ x) / 11)
    torch.testing.assert_close(whole.rms, norms.rms)


def test_every_matrix_has_the_gram_of_its_own_inputs():
    """Sums are shared between matrices that are called on one tensor; here each input is multiplied out by itself."""
    model = tiny_model()
    matrices = find_matrices(model)
    seen = {name: [] for name in matrices}
    for name, matrix in matrices.items():
        matrix.module.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].flatten(0, 1)))
    with observing(matrices, Gram) as statistics:
        for batch in tokens().split(2):
            last_hidden(model, batch)
    for name, statistic in statistics.items():
        x = torch.cat(seen[name])
        assert statistic.tokens == len(x) == 80
        torch.testing.assert_close(statistic.total, x.T @ x, rtol=1e-4, atol=1e-4)


def test_first_tokens_are_bos_or_any():
    windows = torch.arange(64).reshape(2, 32)
    assert first_tokens(windows).tolist() == [[0], [16], [32], [48]]
    windows[:, 0] = 1
    assert first_tokens(windows).tolist() == [[1]]
    assert len(first_tokens(windows[:1])) == 2  # one window says nothing of what others begin with


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("metric", [Wanda(), Magnitude()], ids=lambda metric: type(metric).__name__)
def test_sequential_refines_each_block_on_pruned_inputs(pattern, metric):
    """Against the slow way: prune the first blocks for good, run the whole model, cut and refine the next block."""
    model, reference = tiny_model(), tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, _ = refined(Calibration(model, find_matrices(model), tokens()), metric, pattern)
    everything = find_matrices(reference)
    cut_errors, found_errors = 0.0, 0.0
    for index in range(3):
        here = {name: matrix for name, matrix in everything.items() if matrix.block == index}
        with observing(here, Gram) as statistics:
            last_hidden(reference, tokens())
        with observing(here, Gram) as first:
            last_hidden(reference, first_tokens(tokens()))
        for name, matrix in here.items():
            gram = statistics[name].mean + WEIGHT * first[name].mean
            cut = dict(pattern({name: metric(matrix.weight, statistics[name])}))[name]
            assert torch.equal(found[name], refine(matrix.weight, cut, damped(gram), pattern)), name
            cut_errors += float(errors(matrix.weight, cut, gram).sum())
            found_errors += float(errors(matrix.weight, found[name], gram).sum())
        masking.apply(here, ((name, found[name]) for name in here))
    assert found_errors < 0.95 * cut_errors
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_budgets_over_several_rows_are_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("uniprune.saliency.calibration.Replay", None)  # before the model runs
    with pytest.raises(InputError, match=r"0\.5 by matrix has no budget by row; use --scope row or N:M"):
        refined(Calibration(model, find_matrices(model), tokens()), Wanda(), Unstructured(0.5, "matrix"))
    with pytest.raises(InputError, match="no budget by row"):
        refine(torch.ones(2, 2), torch.ones(2, 2).bool(), torch.eye(2), Unstructured(0.5, "model"))


def test_recipes_that_refine(tmp_path):
    recipe = Recipe(refine=True, sparsity="0.5")
    assert recipe.sequential
    assert recipe.record()["controller"] == "none"
    assert recipe.pattern() == Unstructured(0.5, "row")
    assert Recipe(**recipe.record()).record() == recipe.record()
    assert Recipe(sequential=True, controller="none", refine=True).refine
    assert not Recipe(refine=False).sequential
    (tmp_path / "recipe.yaml").write_text("refine: true\nsparsity: 2:4\n")
    assert Recipe.load(tmp_path / "recipe.yaml").sequential
    for conflict, message in (
        ({"controller": "feedback"}, "--refine and --controller feedback exclude"),
        ({"sequential": False}, "sequential is set to false"),
        ({"refine": "perhaps"}, "refine = 'perhaps'"),
        ({"sparsity": "0.5", "scope": "matrix"}, "no budget by row"),
        ({"sparsity": "0.5", "scope": "model"}, "no budget by row"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe(**{"refine": True, **conflict})


def test_groups_are_refined_without_waiting():
    """On a GPU the host waits for none of them, but once a sweep."""
    generator = torch.Generator().manual_seed(0)
    weight, scores, x = (torch.randn(shape, generator=generator) for shape in ((8, 32), (8, 32), (64, 32)))
    mask = NM(2, 4).prepare({})("a", scores)
    expected = descend_groups(weight, mask, x.T @ x, NM(2, 4))
    with pretend.device() as counts:
        there = [tensor.to(pretend.DEVICE) for tensor in (weight, mask, x.T @ x)]
        before = counts.snapshot()
        found = descend_groups(*there, NM(2, 4))
        done = counts.since(before)
    assert torch.equal(found.cpu(), expected)
    assert done["syncs"] <= SWEEPS
    assert done["launches"] <= 40 * 8 * SWEEPS  # a group is 40 at most


def test_matrices_of_a_rule_are_refined_as_it_says():
    """Dense ones stay dense, N:M ones are refined, and a budget for the matrix, which swaps in rows could not keep, is left."""
    model = tiny_model(initializer_range=0.3)
    given = Calibration(model, find_matrices(model), tokens())
    rules = Rule("q_proj", "dense"), Rule("k_proj", "4:8"), Rule("v_proj", "0.3")
    pattern = Ruled(NM(2, 4), rules)
    assert Recipe(sparsity="2:4", refine=True, rules=[f"{rule}" for rule in rules]).pattern() == pattern
    (masks, _), (plain, _) = refined(given, Wanda(), pattern), sequential(given, Wanda(), pattern)
    first = {name: mask for name, mask in masks.items() if given.matrices[name].block == 0}
    for name, mask in first.items():
        part = pattern.pattern_of(name)
        assert int((~mask).sum()) == int(part.sparsity * mask.numel())
        assert torch.equal(mask, plain[name]) == ("q_proj" in name or "v_proj" in name)
