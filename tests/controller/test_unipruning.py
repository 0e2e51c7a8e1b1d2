"""The published controller against torch's Adam on a cloned model, its own formulas by hand, and its promises."""

import copy

import pytest
import torch
from torch.nn import functional

from conftest import VOCABULARY, tiny_model
from uniprune.common.progress import Silent
from uniprune.controller.prox import prox_nm
from uniprune.controller.unipruning import UniPruning, WorkingCopy
from uniprune.errors import InputError, UniPruneError
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Magnitude, StochRIA, Wanda
from uniprune.saliency.observation import observing
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.views import ScaledToMeanOne

ROW = Unstructured(0.5)


def tokens(count=6, length=16):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def reference(model, windows, rates, metric=None, nm_weight=None):
    """Adam on a clone whose own parameters learn; per step its loss, W' and S(W', X)."""
    clone = copy.deepcopy(model)
    matrices = find_matrices(clone)
    for matrix in matrices.values():
        matrix.parameter.requires_grad_(True)
    adam = torch.optim.Adam([matrix.parameter for matrix in matrices.values()], lr=0)
    for batch, rate in zip(windows, rates, strict=True):
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        with observing(matrices, metric and metric.statistic) as statistics:
            logits = clone(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        adam.step()
        for matrix in matrices.values() if nm_weight else ():
            matrix.weight.copy_(prox_nm(matrix.weight, rate * nm_weight, 2, 4))
        saliency = {name: metric(m.weight, statistics.get(name)) for name, m in matrices.items()} if metric else {}
        yield loss.item(), {name: matrix.weight.clone() for name, matrix in matrices.items()}, saliency


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_copy_learns_as_torchs_adam(family):
    model = tiny_model(family)
    windows, rates = tokens(8).split(2), [1e-3, 2e-3, 2e-3, 5e-4]
    expected = list(reference(model, windows, rates))
    with WorkingCopy(model, find_matrices(model)) as working:
        for batch, rate, (loss, weights, _) in zip(windows, rates, expected, strict=True):
            assert working.step(batch, rate) == pytest.approx(loss, rel=1e-5)
            for name, weight in working.weights.items():
                torch.testing.assert_close(weight.detach(), weights[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [ROW, NM(2, 4)])
def test_a_descent_by_hand(family, target):
    """Start, schedule, Adam, prox, refreshed statistics and moving average, on a clone."""
    model, windows = tiny_model(family), tokens()
    settings = UniPruning(learning_rate=1e-3, warmup=0.5, nm_weight=500.0, batch_tokens=16)
    rates = [1e-3 * share for share in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)]
    nm_weight = 500.0 if isinstance(target, NM) else None
    matrices = find_matrices(model)
    expected = dict(one_shot(Calibration(model, matrices, windows), Wanda()))
    losses = []
    for loss, _, saliency in reference(model, windows.split(1), rates, Wanda(), nm_weight):
        losses.append(loss)
        expected = {name: 0.95 * gamma + 0.05 * saliency[name] for name, gamma in expected.items()}
    found, record = settings.calibrate(Calibration(model, matrices, windows), Wanda(), [target])
    assert record.loss == pytest.approx(losses, rel=1e-5)
    assert (record.steps, record.tokens) == (6, windows.numel())
    for name, gamma in found.items():
        torch.testing.assert_close(gamma, expected[name], rtol=1e-3, atol=2e-5)


def test_a_step_by_hand():
    settings = UniPruning(rho=0.1, alpha=2.0, kappa=2.0, lam=0.5)
    dual = torch.tensor([[0.4, 1.5]])
    assert settings.gamma(dual).flatten().tolist() == [0.0, 2.0]
    moved = settings.step(dual, torch.tensor([[1.0, 3.0]]))
    assert moved.flatten().tolist() == pytest.approx([0.4 + 0.2 * 1, 1.5 + 0.2 * (3 - 2)])
    assert settings.gamma(moved).flatten().tolist() == pytest.approx([0.2, 2.4])


@pytest.mark.parametrize("settings", [UniPruning(), UniPruning(kappa=0.5, alpha=1e4, lam=0.3)])
def test_the_start_is_at_rest_and_lambda_does_not_show(settings):
    local, other = torch.tensor([[0.0, 1e-4, 2.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    dual = settings.init(local)
    torch.testing.assert_close(settings.gamma(dual), local, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(settings.step(dual, local), dual)
    rate = settings.alpha * settings.rho * settings.kappa
    for _ in range(5):
        dual, local = settings.step(dual, other), (1 - rate) * local + rate * other
        torch.testing.assert_close(settings.gamma(dual), local, rtol=1e-4, atol=1e-6)


def test_the_schedule_by_hand():
    settings = UniPruning(learning_rate=1.0)
    assert [settings.rate(index, 20) for index in range(20)] == pytest.approx([0.5, 1, *((20 - i) / 18 for i in range(2, 20))])
    assert settings.rate(0, 1) == 1
    assert UniPruning(learning_rate=1.0, warmup=0).rate(0, 4) == 1
    assert UniPruning(learning_rate=1.0, warmup=1).rate(3, 4) == 1


class Breaks(Silent):
    """Progress that fails while the third step is under way."""

    def note(self, text, tokens=0):
        self.notes = getattr(self, "notes", 0) + 1
        if self.notes == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_the_model_is_untouched(family, dtype):
    model = tiny_model(family).to(dtype)
    matrices, windows = find_matrices(model), tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(input_ids=windows[:1]).logits
    settings = UniPruning(learning_rate=0.1, batch_tokens=16)
    settings.calibrate(Calibration(model, matrices, windows), Wanda(), [NM(2, 4)])
    with pytest.raises(KeyboardInterrupt):
        settings.calibrate(Calibration(model, matrices, windows, progress=Breaks()), Wanda(), [NM(2, 4)])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all("forward" not in vars(matrix.module) for matrix in matrices.values())
    assert all(not matrix.module._forward_pre_hooks for matrix in matrices.values())
    assert torch.equal(model(input_ids=windows[:1]).logits, logits)


def test_gradients_of_a_trainable_model_stay_out_of_it():
    model = tiny_model().requires_grad_(True)
    UniPruning(batch_tokens=16).calibrate(Calibration(model, find_matrices(model), tokens(2)), Wanda(), [ROW])
    assert all(p.grad is None for p in model.parameters())


def test_the_copy_of_a_half_precision_model_is_float32():
    """A step far below bfloat16's resolution still moves it."""
    model = tiny_model().to(torch.bfloat16)
    matrices = find_matrices(model)
    with WorkingCopy(model, matrices) as working:
        working.step(tokens(1), 1e-6)
        for name, weight in working.weights.items():
            assert weight.dtype == torch.float32
            moved = weight.detach() - matrices[name].weight.float()
            assert 0 < float(moved.abs().max()) < 2e-6
        moments = working._adam.state[weight]
        assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32


def test_the_prox_pulls_towards_the_pattern():
    model = tiny_model()
    with WorkingCopy(model, find_matrices(model)) as working:
        weight = working.weights["model.layers.0.mlp.up_proj"]
        before = weight.detach().clone()
        working.pull(NM(2, 4), 0.0)
        assert torch.equal(weight, before)
        working.pull(NM(2, 4), 1e9)
        assert torch.equal(weight, before * dict(NM(2, 4)({"w": before.abs()}))["w"])


@pytest.mark.parametrize("metric", [Wanda(), StochRIA(), Magnitude()])
def test_masks_can_be_cut_from_it(metric):
    model = tiny_model()
    gamma, _ = UniPruning(batch_tokens=16).calibrate(
        Calibration(model, find_matrices(model), tokens()), metric, [NM(2, 4), ROW]
    )
    for scores in gamma.values():
        assert scores.dtype == torch.float32
        assert bool(torch.isfinite(scores).all())
        assert bool((scores >= 0).all())
        assert not scores.requires_grad
    for pattern in (NM(2, 4), ROW):
        assert all(float(mask.float().mean()) == 0.5 for _, mask in pattern(gamma))
    kept = sum(int(mask.sum()) for _, mask in Unstructured(0.5, "model")(ScaledToMeanOne(gamma)))
    assert kept == sum(scores.numel() for scores in gamma.values()) / 2


def test_learning_lowers_the_loss_and_moves_the_saliency():
    model, windows = tiny_model(), tokens(1)
    matrices = find_matrices(model)
    calibration = Calibration(model, matrices, windows)
    still, _ = UniPruning(learning_rate=0.0).calibrate(calibration, Wanda(), [ROW], 20)
    moved, record = UniPruning(learning_rate=1e-2).calibrate(calibration, Wanda(), [ROW], 20)
    assert record.loss[-1] < 0.9 * record.loss[0]
    local = one_shot(Calibration(model, matrices, windows), Wanda())
    for name in matrices:
        torch.testing.assert_close(still[name], local[name], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(moved[name], local[name], rtol=1e-2, atol=1e-4)


def test_same_seed_same_saliency():
    model = tiny_model()
    matrices = find_matrices(model)
    settings, targets = UniPruning(nm_weight=1e4, learning_rate=1e-3, batch_tokens=16), [NM(2, 4), ROW, NM(1, 4)]
    calibration = Calibration(model, matrices, tokens())
    runs = [settings.calibrate(calibration, Wanda(), targets, 4, seed) for seed in (3, 3, 5)]
    (first, record), (again, same_record), (other, _) = runs
    assert record == same_record
    assert all(torch.equal(first[name], again[name]) for name in matrices)
    assert any(not torch.equal(first[name], other[name]) for name in matrices)


def test_what_cannot_work_is_refused():
    model = tiny_model()
    matrices = find_matrices(model)
    with pytest.raises(InputError, match="not divisible by 3"):
        UniPruning(batch_tokens=16).calibrate(Calibration(model, matrices, tokens(2)), Wanda(), [NM(1, 3)])
    with pytest.raises(UniPruneError, match="step 1: the loss is nan"):
        UniPruning(learning_rate=1e30, batch_tokens=16).calibrate(Calibration(model, matrices, tokens(3)), Magnitude(), [ROW])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate = -1"),
        ({"lam": float("nan")}, "lam = nan"),
        ({"warmup": 2.0}, "warmup = 2.0"),
        ({"alpha": 2e5}, "alpha \\* rho \\* kappa = 2 is"),
        ({"kappa": 0.0}, "kappa = 0 is"),
        ({"batch_tokens": 0}, "batch_tokens = 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=f"unipruning: .*{message}"):
        UniPruning(**changes)


@pytest.mark.parametrize(("length", "windows"), [(16, 4), (40, 1), (64, 1), (96, 1)])
def test_a_step_has_as_many_windows_as_fit_and_one_at_least(length, windows):
    settings, model = UniPruning(batch_tokens=64), tiny_model()
    assert settings.step_tokens(length) == windows * length
    _, record = settings.calibrate(Calibration(model, find_matrices(model), tokens(4, length)), Magnitude(), [ROW])
    assert (record.steps, record.tokens) == (4 // windows, 4 * length)
    assert UniPruning().step_tokens(512) == 512
    assert UniPruning().step_tokens(2048) == 2048
