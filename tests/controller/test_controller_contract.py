"""What all controllers keep to, those of a user's own included: an update rule under mirror descent's loop, and another."""

import dataclasses
import json
import math

import pytest
import torch

import uniprune
from conftest import VOCABULARY, Stopped, Stops, tiny_model
from own import Correlated, Halved, Loud, Signs
from uniprune import Recipe
from uniprune.checkpoints.origin import resolve
from uniprune.common import distributed
from uniprune.controller import controllers
from uniprune.controller.controllers import CONTROLLERS
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.controller.unipruning import UniPruning
from uniprune.errors import InputError
from uniprune.job import prepare as job
from uniprune.models.matrices import find_matrices
from uniprune.models.residency.streaming import attached, open_streamed
from uniprune.saliency.calibration import Calibration
from uniprune.saliency.metrics import Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.views import Comparable, View, comparable_for
from uniprune.storage import runs

OTHERS = {
    "feedback": {"step_size": 0.05, "batch_tokens": 32, "focus": False},
    "fisher": {"batch_tokens": 32},
    "unipruning": {"learning_rate": 1e-3, "batch_tokens": 32},
}
OWN = [Signs(step_size=0.05, batch_tokens=32), Halved(share=0.25)]
ALL_CONTROLLERS = [*(kind(**OTHERS.get(name, {})) for name, kind in CONTROLLERS.items()), *OWN]
TARGETS = [NM(2, 4), Unstructured(0.5, "row")]
SMALL = {"windows": 16, "length": 32}

each = pytest.mark.parametrize("controller", ALL_CONTROLLERS, ids=lambda one: type(one).__name__)


def tokens(count=12, length=32):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def calibrated(controller, steps=3, seed=0):
    model = tiny_model(initializer_range=0.3)
    matrices = find_matrices(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, record = controller.calibrate(Calibration(model, matrices, tokens()), Wanda(), TARGETS, steps, seed)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all("forward" not in vars(matrix.module) for matrix in matrices.values())
    return matrices, dict(found), record


def test_the_list_has_one_of_each():
    assert set(CONTROLLERS.values()) < set(map(type, ALL_CONTROLLERS))


@each
def test_the_saliency_and_the_record(controller):
    """Scores for all, masks of any pattern from them; a record that JSON can say and a report can tell."""
    matrices, found, record = calibrated(controller)
    assert found.keys() == matrices.keys()
    for name, scores in found.items():
        assert (scores.dtype, scores.shape) == (torch.float32, matrices[name].shape)
        assert bool(torch.isfinite(scores).all())
        assert not scores.requires_grad
    saliency = Comparable(found) if controller.comparable else View(found)
    size = sum(matrix.size for matrix in matrices.values())
    for pattern in (NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "model")):
        kept = sum(int(mask.sum()) for _, mask in pattern(comparable_for(saliency, pattern)))
        assert kept == size // 2
    assert record.objective
    assert record.unit
    assert record.steps == 3
    assert len(record.loss) <= 3  # it may end sooner, and have none
    assert record.tokens == (len(record.loss) or 3) * max(32, controller.step_tokens(32))
    assert all(map(math.isfinite, [*record.loss, *record.held_out_loss]))
    assert len(record.judged_at) == len(record.held_out_loss)
    again = type(record)(**json.loads(json.dumps(record.model_dump())))
    assert again == record


@each
def test_the_same_seed_gives_the_same(controller):
    (_, first, record), (_, again, same) = calibrated(controller, seed=3), calibrated(controller, seed=3)
    assert record == same
    assert all(torch.equal(scores, again[name]) for name, scores in first.items())


@each
def test_a_recipe_takes_it_and_its_record_says_it(controller):
    recipe = Recipe(controller=controller)
    assert recipe.parsed_controller() == controller
    assert (recipe.comparable, recipe.cost) == (controller.comparable, controller.cost)
    record = json.loads(json.dumps(recipe.record()))
    if type(controller) in CONTROLLERS.values():
        assert Recipe(**record).parsed_controller() == controller
        assert Recipe(**record).record() == recipe.record()
    else:
        assert record["controller"]["class"] == f"own.{type(controller).__name__}"
        assert record["controller"]["settings"] == dataclasses.asdict(controller)
        with pytest.raises(InputError, match="JSON alone cannot replay it: give the object itself"):
            Recipe(**record)


@each
def test_what_it_needs_is_heeded_before_any_weight_is_read(controller, folder, tmp_path, monkeypatch):
    """A model that does not fit, and several processes: run so, or refused with the reason."""
    recipe = Recipe(sparsity="2:4", dtype="float32", controller=controller, **SMALL)
    monkeypatch.setattr(job, "load_weights", None)
    monkeypatch.setattr(job, "open_streamed", lambda *arguments: (_ for _ in ()).throw(Stopped))
    if controller.in_memory:
        with pytest.raises(InputError, match=r"needs the whole model in memory; raise --max-memory"):
            uniprune.prune(str(folder), recipe, tmp_path / "out", execution="streamed")
    else:
        with pytest.raises(Stopped):
            uniprune.prune(str(folder), recipe, tmp_path / "out", execution="streamed")
    monkeypatch.setattr(distributed, "count", lambda: 2)
    if controller.one_process:
        with pytest.raises(InputError, match="runs in one process; start it without torchrun"):
            uniprune.prune(str(folder), recipe, tmp_path / "out", execution="streamed")
    else:
        job.check_execution(recipe, "sharded")


@pytest.mark.parametrize("controller", [c for c in ALL_CONTROLLERS if not c.in_memory], ids=lambda one: type(one).__name__)
def test_block_by_block_it_gives_the_same(controller, tmp_path):
    model = tiny_model(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    loaded = open_streamed(resolve(tmp_path), None, torch.float32, torch.device("cpu"))
    hollow = attached(find_matrices(loaded.model), loaded.residency)
    expected, _ = controller.calibrate(Calibration(model, find_matrices(model), tokens()), Loud(), TARGETS, 2)
    found, _ = controller.calibrate(Calibration(loaded.model, hollow, tokens(), loaded.residency), Loud(), TARGETS, 2)
    for name, scores in expected.items():
        differ = (found[name] > scores.median()) != (scores > scores.median())
        assert float(differ.float().mean()) < 5e-3, name


@pytest.mark.parametrize("execution", ["resident", "recomputed", "streamed"])
@pytest.mark.parametrize(
    ("controller", "metric"),
    [(MirrorDescent(batch_tokens=64, checks=1), Correlated()), (Signs(batch_tokens=64, checks=1), Loud())],
    ids=["Correlated", "Signs, Loud"],
)
def test_an_interrupted_run_goes_on_to_the_same_masks(folder, tmp_path, monkeypatch, controller, metric, execution):
    """With a statistic and an update rule that the package does not know: both are saved and taken up again."""
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    recipe = Recipe(sparsity="2:4", dtype="float32", controller=controller, metric=metric, steps=3, **SMALL)

    def run(output, **more):
        return uniprune.prune(str(folder), recipe, tmp_path / output, execution=execution, **more).masks_sha256

    expected = run("whole")
    with pytest.raises(Stopped):
        run("out", progress=Stops(2))
    monkeypatch.setattr("uniprune.controller.start._measured", None)  # the start is not made again
    assert run("out", resume=True) == expected


def test_the_state_takes_the_memory_that_is_said():
    """Mirror descent: the state, and one byte of mask beside; the published one: copy, gradient, Adam's two moments, and V."""
    state = MirrorDescent().init(torch.ones(64, 128), torch.ones(64))
    held = state.dual.nbytes + sum(part.nbytes for part in state.rest().values() if part.shape == state.dual.shape)
    assert held / (64 * 128) == MirrorDescent.cost.state_bytes
    assert NM(2, 4).prepare({})("a", state.dual).nbytes / (64 * 128) == MirrorDescent.cost.mask_bytes
    assert UniPruning.cost.state_bytes == 4 * torch.float32.itemsize + UniPruning().init(torch.ones(64, 128)).nbytes / (
        64 * 128
    )


def test_states_come_back_from_the_disk_bit_for_bit():
    settings = MirrorDescent()
    state = settings.init(torch.rand(4, 8), torch.rand(4))
    for step in range(3):
        state = settings.step(state, torch.randn(4, 8, generator=torch.Generator().manual_seed(step)), 0.01)
    again = settings.restore(state.dual, state.rest())
    assert (again.unit, again.steps) == (state.unit, state.steps)
    assert all(torch.equal(*pair) for pair in zip(again[:4], state[:4], strict=True))
    still = settings.restart(state, state.dual)
    assert (still.unit, still.steps, bool(still.ratio.any()), bool(still.top)) == (state.unit, 0, False, False)


def test_names_and_aliases():
    assert type(controllers.parse("paper", {"rho": 2e-5})) is UniPruning
    assert Recipe(controller="paper", tuning={"rho": "2e-5"}).record()["controller"] == "unipruning"
    assert Recipe(controller="paper", tuning={"rho": "2e-5"}).record()["tuning"] == {"rho": 2e-5}
    assert Recipe().record()["controller"] == "feedback"
    assert Recipe(sequential=True).record()["controller"] == "none"
    assert controllers.name_of(Signs()) == "Signs"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"controller": "wanda"}, r"it is unknown; use one of .*; wanda is a metric: --metric wanda"),
        ({"controller": "magic"}, r"controller = 'magic': it is unknown; use one of none, feedback, fisher, unipruning"),
        ({"controller": MirrorDescent}, r"MirrorDescent is a class; give an object of it"),
        (
            {"controller": Wanda()},
            r"it has no cost, in_memory, one_process, comparable, images, holds_out, step_tokens, logits, calibrate",
        ),
        ({"controller": Signs(), "tuning": {"step_size": 1}}, r"tuning \(--set\) is for a controller that is given by name"),
        ({"controller": Halved(), "sequential": True}, "--sequential and --controller Halved exclude each other"),
        ({"tuning": {"batch_tokens": 1.5}}, r"tuning \(--set\): batch_tokens = 1.5: Input should be a valid integer"),
        ({"tuning": {"focus": 2}}, r"tuning \(--set\): focus = 2: Input should be a valid boolean"),
        ({"tuning": {"step_size": "fast"}}, r"tuning \(--set\): step_size = fast: Input should be a valid number"),
        ({"tuning": {"even": True}}, r"tuning \(--set\): 'even' is not a setting of MirrorDescent"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        Recipe(**settings)


@pytest.mark.parametrize("value", [False, "false", "False", 0, "0", 0.0])
def test_truth_values_can_be_spelled(value):
    assert Recipe(tuning={"focus": value}).parsed_controller() == MirrorDescent(focus=False)
