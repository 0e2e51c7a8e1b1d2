"""The controller against plain autograd, torch's Adam, and its own promises."""

import json
import math
from dataclasses import dataclass, field, fields
from urllib.parse import unquote

import pytest
import torch
from torch.nn import functional

from conftest import VOCABULARY, tiny_model
from small_models import MATRICES, tiny
from uniprune.controller.controllers import any_sparsity
from uniprune.controller.descent.dual_samples import sample_stride
from uniprune.controller.descent.history import DescentHistory
from uniprune.controller.descent.loop import Descent
from uniprune.controller.descent.loop import opened as open_descent
from uniprune.controller.descent.loss import Loss
from uniprune.controller.descent.position import Position
from uniprune.controller.descent.teacher import TeacherCache
from uniprune.controller.descent.token_weighting import TokenWeighting, weighted
from uniprune.controller.descent.update import confidence, dither, from_ue5m3, noise_of, to_ue5m3
from uniprune.controller.mirror_descent import BOUNDS, MirrorDescent
from uniprune.controller.passes.resident import Resident
from uniprune.controller.passes.streamed import Streamed
from uniprune.controller.start import sensitivities
from uniprune.controller.straight_through import StraightThrough
from uniprune.errors import InputError
from uniprune.models.matrices import Matrix, find_blocks, find_matrices
from uniprune.models.replay.replay import Replay
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Wanda
from uniprune.saliency.record import Starved
from uniprune.saliency.statistics import SquaredNorm
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.tiled import Tiled
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import runs
from uniprune.storage.runs import Run
from uniprune.storage.stash import Stash
from uniprune.storage.tensor_store import Store


def tokens(count=8, length=16):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def resident(model, network):
    return Resident(model, find_blocks(model)[1], network)


def differentiate(model, network, ids, **settings):
    """One pass forwards and backwards, into the network's sink; the mean KL, and the loss and passes for more."""
    passes = resident(model, network)
    loss = Loss(passes.head(ids), **settings)
    student, teacher = passes.forward(ids)
    kl, gradient = loss.gradient(student, teacher, ids)
    passes.backward(gradient)
    return kl / ids.numel(), loss, passes


def flush(network):
    for block in range(3):
        network.flush(block)


def random_masks(matrices):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(matrix.shape, generator=generator) < 0.5 for name, matrix in matrices.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_straight_through_gradients_are_those_of_the_pruned_model(family):
    """The same model with its weights really pruned, by plain autograd."""
    ids = tokens(2)
    model, pruned = tiny_model(family), tiny_model(family)
    matrices, reference = find_matrices(model), find_matrices(pruned)
    masks = random_masks(matrices)
    for name, matrix in reference.items():
        matrix.weight.mul_(masks[name])
        matrix.parameter.requires_grad_(True)
    expected = pruned(input_ids=ids, labels=ids).loss
    expected.backward()
    found = {}
    with StraightThrough(matrices) as network, network.training(masks, found.__setitem__):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        flush(network)
    torch.testing.assert_close(loss, expected)
    for name, matrix in reference.items():
        gradient = matrix.parameter.grad.T if matrix.transposed else matrix.parameter.grad
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_model_is_as_before_and_the_teacher_is_dense():
    ids = tokens(2)
    model = tiny_model()
    matrices = find_matrices(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dense = model(input_ids=ids).logits
    with StraightThrough(matrices) as network:
        with network.pruned(random_masks(matrices)):
            pruned = model(input_ids=ids).logits
            with network.dense():
                assert torch.equal(model(input_ids=ids).logits, dense)
        assert torch.equal(model(input_ids=ids).logits, dense)
    assert not torch.allclose(pruned, dense)
    assert torch.equal(model(input_ids=ids).logits, dense)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all("forward" not in vars(matrix.module) for matrix in matrices.values())


def test_the_step_is_adams_on_the_dual():
    """But for the 8 bits that the moments are kept in; rounded stochastically, they are right on average."""
    settings = MirrorDescent(mean_decay=0.9, rms_decay=0.95, focus=False)
    generator = torch.Generator().manual_seed(0)
    state = settings.init(torch.rand(60, 80, generator=generator) + 0.1, torch.ones(60))
    start = state.dual
    dual = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([dual], lr=0.02 * float(start.mean()), betas=(0.9, 0.95), eps=1e-30)
    signal = 0.1 * torch.randn(60, 80, generator=generator)
    for _ in range(40):
        gradient = (signal + torch.randn(60, 80, generator=generator)) * 1e-4
        state = settings.step(state, gradient, 0.02)
        dual.grad = gradient
        adam.step()
    found, expected = state.dual - start, dual.detach() - start
    assert (found - expected).square().mean() < 0.05**2 * expected.square().mean()
    assert (found * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.01)
    assert (state.dual.dtype, state.ratio.dtype, state.rms.dtype) == (torch.float32, torch.int8, torch.uint8)


@pytest.mark.parametrize(("mean", "rms"), [(0.9, 0.8), (0.5, 0.0)])
def test_decays_that_bound_no_mean_are_refused(mean, rms):
    with pytest.raises(InputError, match=r"rms_decay = 0\.\d is not above mean_decay \*\* 2"):
        MirrorDescent(mean_decay=mean, rms_decay=rms)
    assert MirrorDescent(mean_decay=0, rms_decay=0).step_size > 0


def test_the_moments_fade_where_gradients_end():
    """By less than half a unit a step, at the end: rounded to the nearest, they would stay for good."""
    settings = MirrorDescent()
    state = settings.init(torch.ones(8, 32), torch.ones(8))
    for step in range(60):
        state = settings.step(state, torch.full((8, 32), 1e-3 * (step < 5)), 0.0)
    root = from_ue5m3(state.rms) * state.top
    assert root.mean().item() == pytest.approx(1e-3 * ((1 - 0.95**5) * 0.95**55) ** 0.5, rel=0.3)
    assert state.ratio.abs().max() <= 3


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_an_rms_is_rounded_to_either_side(size):
    values = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) * size
    found = [from_ue5m3(to_ue5m3(values, dither(values, step * 0x6487ED51))) for step in range(1, 65)]
    assert all(((one - values).abs() <= values / 8).all() for one in found)
    torch.testing.assert_close(sum(found) / len(found), values, rtol=0.02, atol=0)
    assert from_ue5m3(to_ue5m3(torch.zeros(1), dither(torch.zeros(1), 1))) < 1e-9


def test_gradients_that_differ_by_rounding_lead_to_the_same_states_but_for_rounding():
    """As those of other executions do: what is rounded at random must not depend on their last bits."""
    generator = torch.Generator().manual_seed(0)
    settings = MirrorDescent()
    state = near = settings.init(torch.rand(64, 96, generator=generator), torch.ones(64))
    for _ in range(20):
        gradient = torch.randn(64, 96, generator=generator)
        state = settings.step(state, gradient, 0.01)
        near = settings.step(near, gradient * (1 + 1e-6 * torch.randn(64, 96, generator=generator)), 0.01)
    assert ((state.dual - near.dual).abs() > 1e-5).float().mean() < 0.01


def test_the_start_is_a_power_of_the_local_saliency():
    local = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    dual = MirrorDescent(power=0.5).init(local, torch.tensor([1.0, 3.0])).dual
    assert dual[0].tolist() == pytest.approx([0.5**0.5, 2**0.5])
    assert dual[1].tolist() == pytest.approx([0, 3**0.5], abs=1e-6)


def test_confidence_is_in_rows_whose_gradients_agree():
    """Running means of pure noise, but for one row with a signal; in pure noise the move has the energy that is subtracted."""
    generator = torch.Generator().manual_seed(0)
    settings = MirrorDescent(mean_decay=0.9, rms_decay=0.99, focus=False)
    state = settings.init(torch.ones(40, 300), torch.ones(40))
    signal = torch.zeros(40, 1)
    signal[7] = 1
    for _ in range(60):
        before, state = state, settings.step(state, signal + torch.randn(40, 300, generator=generator), 1.0)
    move = (before.dual - state.dual) / state.unit
    others = [row for row in range(40) if row != 7]
    assert move[others].square().mean().item() == pytest.approx(0.1 / 1.9, rel=0.1)
    rows, columns = confidence(move.square().mean(1), move.square().mean(0), noise_of(0.9, 60))
    assert (rows.mean().item(), columns.mean().item()) == pytest.approx((1, 1))
    assert rows[7] > 3 * rows[others].max()


def test_token_weights_by_hand():
    """Two channels, three tokens; sizes in units of the channels' own."""
    norm = SquaredNorm(2, torch.device("cpu"))
    norm.update(torch.tensor([[1.0, 2.0]]))
    weighting = TokenWeighting({"w": norm}, {"w": torch.tensor([4.0])})
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 2.0]])
    gradient = torch.tensor([[4.0], [4.0], [16.0]])
    weights = (weighting("w", x, gradient) / gradient)[:, 0]
    assert (weights / weights[0]).tolist() == pytest.approx([1, 1 / 2, 1 / 2])  # input twice as loud; output gradient 4 times


def test_sensitivities_by_hand():
    """The last block's last matrix adds straight into the stream: its output gradient is that of the stream."""
    model, ids = tiny_model(), tokens(3)
    name = "model.layers.2.mlp.down_proj"
    with StraightThrough(find_matrices(model)) as network:
        inputs, gradients, *_ = sensitivities(Resident(model, find_blocks(model)[1], network), ids, SquaredNorm)
    statistic = one_shot(Calibration(model, find_matrices(model), ids), Wanda())._statistics[name]
    torch.testing.assert_close(inputs[name].rms, statistic.rms)
    total = torch.zeros(32)
    for window in ids:
        stream = []
        handle = model.model.norm.register_forward_pre_hook(
            lambda m, a, seen=stream: seen.append(a[0].requires_grad_()) or None
        )
        logits = model(input_ids=window[None]).logits[0, :-1]
        handle.remove()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, window[1:], reduction="sum"), stream[0])
        total += gradient[0].square().sum(0)
    torch.testing.assert_close(gradients[name], (total / ids.numel()).sqrt(), rtol=1e-4, atol=1e-8)


def test_the_loss_is_the_kl_of_the_whole_distributions():
    model, ids = tiny_model(), tokens(2)
    matrices = find_matrices(model)
    found = {}
    with StraightThrough(matrices) as network, network.training(random_masks(matrices), found.__setitem__):
        kl, loss, passes = differentiate(model, network, ids)
        gradients = dict(found)
        assert loss.kl(*passes.infer(ids), ids) / ids.numel() == pytest.approx(kl, rel=1e-4)
        with network.dense():
            target = model(input_ids=ids).logits.log_softmax(-1)
        predicted = model(input_ids=ids).logits.log_softmax(-1)
        expected = functional.kl_div(predicted, target, log_target=True, reduction="sum")
        expected.backward()
        flush(network)
    assert kl == pytest.approx(float(expected.detach()) / ids.numel(), rel=1e-4)
    for name in matrices:
        torch.testing.assert_close(gradients[name], found[name], rtol=1e-3, atol=1e-5)


def test_sampled_thresholds_are_close_to_the_exact_ones(tmp_path):
    model, matrices, ids, metric, settings = setting()
    target = Unstructured(0.7, "model")
    with StraightThrough(matrices) as network:
        descent = opened(settings, model, network, ids, metric, [target], Run(tmp_path))
        kept = sum(int(mask.sum()) for mask in descent.position.mask_factory.create(target).values())
    assert kept == pytest.approx(target.keep(sum(matrix.size for matrix in matrices.values())), rel=0.03)


def opened(settings, model, network, ids, metric, targets, run):
    """A descent before its first step."""
    return over(settings, resident(model, network), Calibration(model, network.matrices, ids), metric, targets, run)


def over(settings, passes, calibration, metric, targets, run):
    """As :func:`opened`, by these passes."""
    position = Position(settings, calibration, targets, run, Store(run, "descent"))
    return open_descent(settings, passes, calibration, metric, position, TeacherCache(passes, Stash(run.aside())))


def setting(**changes):
    model = tiny_model(initializer_range=0.3)
    matrices = find_matrices(model)
    ids = tokens(32, 32)
    return model, matrices, ids, Wanda(), MirrorDescent(batch_tokens=128, **changes)


def test_descent_lowers_the_held_out_loss():
    model, matrices, ids, metric, settings = setting(step_size=0.05)
    duals, record = settings.calibrate(Calibration(model, matrices, ids), metric, [NM(2, 4)], 24)
    assert duals.keys() == matrices.keys()
    assert record.best_held_out_loss < 0.97 * record.held_out_loss[0]
    assert record.tokens == 24 * 128


@pytest.mark.parametrize("changes", [{"labels": 0.1}, {"power": 1.0}], ids=str)
def test_variants_lower_the_held_out_loss(changes):
    model, matrices, ids, metric, settings = setting(step_size=0.05, **changes)
    _, record = settings.calibrate(Calibration(model, matrices, ids), metric, [NM(2, 4)], 24)
    assert record.best_held_out_loss < record.held_out_loss[0]


def test_labels_are_the_cross_entropy():
    """With labels alone, the gradient is that of the next-token loss of the pruned model."""
    model, ids = tiny_model(), tokens(2)
    matrices = find_matrices(model)
    found = {}
    with StraightThrough(matrices) as network, network.training(random_masks(matrices), found.__setitem__):
        differentiate(model, network, ids, labels=1.0)
        gradients = dict(found)
        logits = model(input_ids=ids).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
        flush(network)
    for name in matrices:
        torch.testing.assert_close(gradients[name], found[name], rtol=1e-3, atol=1e-5)


def test_evenness_weighs_tokens_by_their_divergence():
    """With evenness 1/2 the gradient is that of twice the root of each token's divergence."""
    model, ids = tiny_model(initializer_range=0.3), tokens(2)
    matrices = find_matrices(model)
    found = {}
    with StraightThrough(matrices) as network, network.training(random_masks(matrices), found.__setitem__):
        differentiate(model, network, ids, evenness=0.5)
        gradients = dict(found)
        with network.dense():
            target = model(input_ids=ids).logits.log_softmax(-1)
        predicted = model(input_ids=ids).logits.log_softmax(-1)
        kl = functional.kl_div(predicted, target, log_target=True, reduction="none").sum(-1)
        assert kl.min() > 0.02
        (2 * kl.sqrt()).sum().backward()
        flush(network)
    for name in matrices:
        torch.testing.assert_close(gradients[name], found[name], rtol=1e-3, atol=1e-4)


def test_tokens_are_weighed_in_the_gradient():
    model, ids = tiny_model(), tokens(2)
    matrices = find_matrices(model)
    plain, doubled = {}, {}
    for found, weigh in ((plain, None), (doubled, lambda name, x, gradient: 2 * gradient)):
        with StraightThrough(matrices) as network, network.training({}, found.__setitem__, weigh):
            model(input_ids=ids, labels=ids).loss.backward()
            flush(network)
    assert all(torch.allclose(doubled[name], 2 * plain[name]) for name in matrices)


@pytest.mark.parametrize("steps", [1, 5, 7, 9])
def test_held_out_windows_judge_no_more_often_than_the_budget_counts(steps):
    model, matrices, ids, metric, settings = setting(checks=4)
    _, record = settings.calibrate(Calibration(model, matrices, ids), metric, [NM(2, 4)], steps)
    assert len(record.held_out_loss) <= 1 + 4  # the start, and as often as asked


@dataclass
class Script:
    """The held-out KL of each check as a test wants it; what the descent had when it was checked, and before each step."""

    values: list[float]
    checked: list[dict] = field(default_factory=list)  # the duals
    stepped: list[dict] = field(default_factory=list)  # the states
    sizes: list[float] = field(default_factory=list)  # of each step, in all matrices
    stops_before: int = -1  # the step that is not taken any more


@pytest.fixture
def script(monkeypatch):
    """Has every descent follow a script."""
    followed, step, update = Script([]), Descent.step, MirrorDescent.step

    def held_out_kl(self, targets, windows):
        followed.checked.append({name: self.position.states.dual(name).clone() for name in self.position.own})
        return followed.values[len(self.history.held_out_loss)]

    def stepped(self, *arguments):
        if len(self.history.loss) == followed.stops_before:
            raise KeyboardInterrupt
        followed.stepped.append({name: self.position.states[name] for name in self.position.own})
        return step(self, *arguments)

    def updated(self, state, gradient, size):
        if size not in followed.sizes:
            followed.sizes.append(size)
        return update(self, state, gradient, size)

    monkeypatch.setattr(Descent, "held_out_kl", held_out_kl)
    monkeypatch.setattr(Descent, "step", stepped)
    monkeypatch.setattr(MirrorDescent, "step", updated)
    return followed


def followed_by(script, values, checks, run=None):
    """The result of a descent that is checked after every second step, and its matrices."""
    script.values = values
    model, matrices, ids, metric, settings = setting(checks=checks)
    duals, record = settings.calibrate(Calibration(model, matrices, ids, run=run), metric, [NM(2, 4)], 2 * checks)
    return {name: duals[name].clone() for name in matrices}, record


def test_a_descent_that_always_diverges_ends_where_it_started(script):
    duals, record = followed_by(script, [1.0, 2.0, 2.0, 2.0], checks=3)
    assert record.backed_off == 3
    assert record.best_held_out_loss == 1.0
    full = [MirrorDescent().step_size * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    assert script.sizes == pytest.approx([*full[:2], full[2] / 2, full[3] / 2, full[4] / 4, full[5] / 4])
    model, matrices, ids, metric, settings = setting()
    with StraightThrough(matrices) as network:
        norms, gradients, *_ = sensitivities(resident(model, network), ids[:28], SquaredNorm)
    for name in matrices:
        assert torch.equal(duals[name], settings.init(metric(matrices[name].weight, norms[name]), gradients[name]).dual)


@pytest.mark.parametrize("diverged", [1.51, math.inf, math.nan])
def test_a_descent_that_diverges_goes_on_from_the_best_at_half_the_step(script, caplog, diverged):
    duals, record = followed_by(script, [1.0, 0.8, diverged, 0.7], checks=3)
    assert record.backed_off == 1
    assert "the controller diverged" in caplog.text
    full = [MirrorDescent().step_size * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    assert script.sizes == pytest.approx([*full[:4], full[4] / 2, full[5] / 2])
    _, best, left, last = script.checked
    for name, state in script.stepped[4].items():  # right after it backed off
        assert torch.equal(state.dual, best[name])
        assert not torch.equal(state.dual, left[name])
        assert (state.steps, bool(state.ratio.any()), bool(state.rms.any())) == (0, False, False)
        assert torch.equal(duals[name], last[name])
    assert record.best_held_out_loss == 0.7
    assert len(record.loss) == 6


@pytest.mark.parametrize(
    ("values", "taken", "best"),
    [
        ([1.0, 1.1, 1.1], 4, 0),
        ([1.0, 1.5, 1.5], 4, 0),  # not yet divergence
        ([1.0, 1.0, 1.0], 4, 0),  # nor improvement
        ([1.0, 1.1, 2.0, 1.1], 6, 0),  # a divergence between them neither counts nor begins anew
        ([1.0, 1.1, 0.9, 1.1, 1.1], 8, 2),  # an improvement does begin anew
        ([1.0, 1.1, 0.9, 1.1, 0.8, 0.9], 10, 4),
    ],
)
def test_a_descent_ends_after_two_checks_without_improvement(script, values, taken, best):
    duals, record = followed_by(script, values, checks=5)
    assert record.steps == 10
    assert len(record.loss) == len(record.flips) == taken
    assert record.held_out_loss == values
    assert record.best_held_out_loss == values[best]
    assert record.backed_off == (2.0 in values)
    assert all(torch.equal(dual, script.checked[best][name]) for name, dual in duals.items())


@pytest.mark.parametrize("stops_before", [1, 3, 4, 5])
def test_a_descent_that_is_resumed_knows_its_checks(script, tmp_path, monkeypatch, stops_before):
    """How often it backed off, and how long it has not improved: it diverges before the 3rd step, and ends after the 6th."""
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    values, run = [1.0, 2.0, 1.1, 1.1], Run(tmp_path)
    expected, record = followed_by(script, values, checks=5)
    assert (record.backed_off, len(record.loss)) == (1, 6)
    script.sizes.clear()
    script.stops_before = stops_before
    with pytest.raises(KeyboardInterrupt):
        followed_by(script, values, checks=5, run=run)
    script.stops_before = -1
    found, again = followed_by(script, values, checks=5, run=run)
    assert again == record
    assert all(torch.equal(found[name], dual) for name, dual in expected.items())
    assert len(script.sizes) == 6
    followed_by(script, [], checks=5, run=run)  # is over, although not all steps were taken


def test_progress_of_another_version_is_refused():
    starved = Starved(matrices=["layers.0.experts.3.w1"], of=24, tokens_under=32)
    for history in (DescentHistory(done=2, loss=[1.0, 0.9]), DescentHistory(starved=starved)):
        facts = history.facts()
        assert DescentHistory.of(json.loads(json.dumps(facts))) == history
    assert DescentHistory.of({}) == DescentHistory()
    with pytest.raises(InputError, match="of an earlier version of uniprune; --overwrite without --resume restarts it"):
        DescentHistory.of(facts | {"scale": 0.5})


def test_same_seed_same_duals():
    model, matrices, ids, metric, settings = setting(step_size=0.05, checks=1)
    calibration = Calibration(model, matrices, ids)
    runs = [settings.calibrate(calibration, metric, any_sparsity(), 6, seed) for seed in (3, 3, 4)]
    (first, record), (again, same_record), (_, other_record) = runs
    assert all(torch.equal(first[name], again[name]) for name in matrices)
    assert record == same_record
    assert record.held_out_loss != other_record.held_out_loss


def test_a_descent_that_is_over_is_not_made_again(tmp_path, monkeypatch):
    """A run that was interrupted between the last step and its output; of what it keeps, the best duals are enough."""
    monkeypatch.setattr(runs.Pace, "due", lambda self: False)
    model, matrices, ids, metric, settings = setting()
    calibration = Calibration(model, matrices, ids, run=Run(tmp_path))
    found, record = settings.calibrate(calibration, metric, [NM(2, 4)], 2)
    kept = {unquote(path.name).split("/")[0] for path in (tmp_path / "descent").iterdir()}
    assert kept == {"best"}
    monkeypatch.setattr("uniprune.controller.descent.loop.Descent", None)
    again, same_record = settings.calibrate(calibration, metric, [NM(2, 4)], 2)
    assert same_record == record
    assert all(torch.equal(found[name], again[name]) for name in matrices)


def test_targets_share_the_windows_that_judge(tmp_path):
    model, matrices, ids, metric, settings = setting()
    targets = [NM(2, 4), Unstructured(0.7, "row")]
    with StraightThrough(matrices) as network:
        descent = opened(settings, model, network, ids, metric, targets, Run(tmp_path))
        alone = [descent.held_out_kl([target], ids[start:5:2]) for start, target in enumerate(targets)]
        assert descent.held_out_kl(targets, ids[:5]) == pytest.approx(sum(alone) / 2)
        assert descent.held_out_kl(targets, ids[:1]) == pytest.approx(
            sum(descent.held_out_kl([t], ids[:1]) for t in targets) / 2
        )


@pytest.mark.parametrize("execution", ["in memory", "block by block"])
def test_windows_that_judge_see_the_dense_model_once(execution, tmp_path, monkeypatch):
    model, matrices, ids, metric, settings = setting()
    targets = [NM(2, 4), Unstructured(0.7, "row")]
    passes, seen = {"in memory": Resident, "block by block": Streamed}[execution], []
    with StraightThrough(matrices) as network:
        run, blocks = Run(tmp_path), find_blocks(model)[1]
        replay = Replay.probed(model, blocks, ids)
        ways = Resident(model, blocks, network) if passes is Resident else Streamed(model, replay, network)
        descent = over(settings, ways, Calibration(model, matrices, ids), metric, targets, run)
        infer = passes.infer
        monkeypatch.setattr(passes, "infer", lambda self, batch: seen.append(len(batch)) or infer(self, batch))
        first = descent.held_out_kl(targets, ids[:6])
        assert sum(seen) == 6
        assert descent.held_out_kl(targets, ids[:6]) == first
        assert sum(seen) == 6
        assert descent.held_out_kl(targets, ids[:4]) != first  # other windows from the same place
        assert sum(seen) == 10
        kept = {path.name for path in run.aside().iterdir()}
        ids = ids.clone()  # as in another process, which goes on with the run
        again = over(settings, ways, Calibration(model, matrices, ids), metric, targets, run)
        assert again.held_out_kl(targets, ids[:6]) == first
        assert {path.name for path in run.aside().iterdir()} == kept


PATTERNS = [
    *(Unstructured(0.5, scope) for scope in ("row", "matrix", "block", "model")),
    *(NM(2, 4), Tiled(Unstructured(0.5, "matrix"), 32, 32), Tiled(Unstructured(0.5, "model"), 16, 16)),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_does_not_move_flips_no_mask(pattern):
    model = tiny_model(num_key_value_heads=4)
    settings, given = MirrorDescent(step_size=0.0, batch_tokens=128), Calibration(model, find_matrices(model), tokens(32, 32))
    _, record = settings.calibrate(given, Wanda(), [pattern], 2)
    assert record.flips == [0, 0]


def test_float16_descends_as_float32():
    """The first token of a window has no gradient in q_proj: its weight is infinite in float16."""
    losses = []
    for dtype in (torch.float32, torch.float16):
        model, _, ids, metric, settings = setting()
        model.to(dtype)
        _, record = settings.calibrate(Calibration(model, find_matrices(model), ids), metric, [NM(2, 4)], 3)
        losses.append(record.loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_float16_takes_tokens_whose_inputs_are_0():
    """As behind a ReLU that lets nothing through: their weight, times any gradient, is infinite in float16."""
    torch.manual_seed(0)
    x, gradient = torch.randn(8, 16), torch.randn(8, 4)
    x[:4], x[4] = 0, x[4] * 1e-6
    units = torch.ones(16), torch.ones(4)
    full, half = weighted(x, gradient, *units), weighted(x.half(), gradient.half(), *units)
    assert half.isfinite().all()
    assert torch.allclose(half[5:].float(), full[5:], rtol=0.01, atol=1e-3)
    assert not (half[:4].T @ x[:4].half()).any()  # they have no part in the gradient of the weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": -0.1}, r"step_size = -0.1 is not a finite number >= 0"),
        ({"evenness": math.inf}, r"evenness = inf is not a finite number >= 0"),
        ({"labels": 1.5}, r"labels = 1.5 is not in \[0, 1\]"),
        ({"power": 0.0}, r"power = 0.0 is not a finite number > 0"),
        *(({name: 0}, rf"{name} = 0 is not at least 1") for name in ("vocabulary", "batch_tokens", "held_out", "checks")),
    ],
    ids=lambda each: str(each),
)
def test_settings_have_bounds(changes, message):
    with pytest.raises(InputError, match=f"feedback: {message}"):
        MirrorDescent(**changes)


def test_every_number_has_a_bound():
    numbers = {field.name for field in fields(MirrorDescent) if field.type in ("int", "float")}
    assert numbers == BOUNDS.keys()


@pytest.mark.parametrize("name", ["mean_decay", "rms_decay"])
def test_means_that_forget_nothing_are_refused(name):
    with pytest.raises(InputError, match=rf"{name} = 1 is not in \[0, 1\)"):
        MirrorDescent(**{name: 1})


def test_a_start_as_good_as_the_dense_model_does_not_diverge(caplog):
    model, matrices, ids, metric, settings = setting()
    _, record = settings.calibrate(Calibration(model, matrices, ids), metric, [Unstructured(0.0, "row")], 2)
    assert record.held_out_loss[0] == record.backed_off == 0
    assert not caplog.records


def test_too_few_windows_are_refused():
    model, matrices, ids, metric, settings = setting()
    with pytest.raises(InputError, match="with 1 held out, leave none"):
        settings.calibrate(Calibration(model, matrices, ids[:1]), metric, [NM(2, 4)], 2)


@pytest.mark.parametrize("family", MATRICES)
def test_every_family_can_be_descended_on(family):
    """Whatever a family does to its logits (scaling, capping, a bias), the loss at no sparsity is 0 and a step can be made."""
    model, ids = tiny(family), tokens(4) % 64
    matrices = find_matrices(model)
    with StraightThrough(matrices) as network:
        passes = resident(model, network)
        assert Loss(passes.head(ids)).kl(*passes.infer(ids), ids) / ids.numel() == pytest.approx(0, abs=1e-4)
    duals, record = MirrorDescent(batch_tokens=32).calibrate(Calibration(model, matrices, ids), Wanda(), [NM(2, 4)], 2)
    assert record.held_out_loss[0] > 0
    assert all(bool(torch.isfinite(dual).all()) for dual in duals.values())


def test_without_a_running_mean_the_descent_stays_finite():
    """What is noise in a mean of one gradient cannot be told: no row or column is trusted more than another."""
    shares = confidence(torch.full((4,), 0.3), torch.full((6,), 0.3), noise_of(0.0, 3))
    assert all(torch.equal(share, torch.ones_like(share)) for share in shares)
    model = tiny_model()
    given = Calibration(model, find_matrices(model), tokens())
    found, _ = MirrorDescent(mean_decay=0.0, batch_tokens=32).calibrate(given, Wanda(), [NM(2, 4)], steps=3)
    assert all(torch.isfinite(found[name]).all() for name in found)


def test_where_no_matrix_has_a_gradient_the_masks_are_the_metrics():
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.v_proj.weight.zero_()
    given = Calibration(model, find_matrices(model, ["[qk]_proj"]), tokens())
    found, record = MirrorDescent(batch_tokens=32).calibrate(given, Wanda(), [NM(2, 4)], steps=2)
    assert len(record.without_gradient) == len(given.matrices)
    windows = Calibration(model, given.matrices, tokens())
    expected = dict(NM(2, 4)(one_shot(windows, Wanda())))
    same = [float((mask == expected[name]).float().mean()) for name, mask in NM(2, 4)(found)]
    assert min(same) > 0.9  # the metric's on the windows that none is judged on


def test_the_threshold_of_a_small_model_is_exact():
    """It is found from all duals: a sample of a few thousand would have another sparsity than the final masks."""
    model = tiny_model()
    assert sample_stride(find_matrices(model)) == 1


@pytest.mark.parametrize(
    ("blocks", "shapes"),
    [(32, [(4096, 4096)] * 4 + [(16384, 4096), (4096, 16384)]), (24, [(2048, 2048)] * 4 + [(8192, 2048)] * 2 + [(2048, 8192)])],
    ids=["OPT-6.7B", "SmolLM2-1.7B"],
)
def test_samples_of_a_large_model_are_of_all_channels(blocks, shapes):
    """A stride that shares a factor with the length of rows would see few of them: 8 of OPT's 4,096."""
    linears = [torch.nn.Linear(columns, rows, bias=False, device="meta") for rows, columns in shapes]
    matrices = {f"{b}.{i}": Matrix(f"{b}.{i}", linear, b, False) for b in range(blocks) for i, linear in enumerate(linears)}
    stride = sample_stride(matrices)
    for _, columns in shapes:
        assert len({position % columns for position in range(0, stride * columns, stride)}) == columns
