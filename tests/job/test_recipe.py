"""A recipe is parsed once, and never keeps what it was parsed to when it is changed."""

import copy
import pickle

import pytest

from own import Signs
from uniprune import NM, RIA, Fisher, MirrorDescent, Recipe, Wanda
from uniprune.controller import controllers
from uniprune.errors import InputError
from uniprune.saliency import metrics


def test_it_is_parsed_once(monkeypatch):
    recipe = Recipe(metric="ria:a=0.3", tuning={"batch_tokens": 64})
    for module in (controllers, metrics):
        monkeypatch.setattr(module, "parse", None)
    assert recipe.parsed_metric() is recipe.parsed_metric() == RIA(a=0.3)
    assert recipe.parsed_controller() is recipe.parsed_controller() == MirrorDescent(batch_tokens=64)
    assert recipe.uses_controller
    assert recipe.comparable
    assert (recipe.cost, recipe.step_tokens(32), recipe.step_tokens(128)) == (MirrorDescent.cost, 64, 128)


@pytest.mark.parametrize(
    ("settings", "some"),
    [
        ({}, 8192),
        ({"tuning": {"vocabulary": 100}}, 100),
        ({"tuning": {"labels": 0.5}}, 50_000),
        ({"controller": "fisher"}, 50_000),
        ({"controller": "none"}, 50_000),
    ],
    ids=str,
)
def test_how_many_logits_a_step_has(settings, some):
    assert Recipe(**settings).logits(50_000) == some
    assert Recipe(**settings).logits(50) == 50


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda recipe: pickle.loads(pickle.dumps(recipe))])
def test_copies_are_parsed_alike(copied):
    recipe = Recipe(sparsity=NM(2, 4), controller=Signs(batch_tokens=64), metric="ria")
    again = copied(recipe)
    assert again == recipe
    assert again.parsed_controller() == Signs(batch_tokens=64)
    assert again.parsed_metric() == RIA()


@pytest.mark.parametrize("change", [lambda old, **new: old.replace(**new), lambda old, **new: old.model_copy(update=new)])
def test_what_is_changed_is_parsed_anew(change):
    recipe = Recipe(sparsity="2:4", metric="ria")
    changed = change(recipe, controller="fisher", metric="wanda")
    assert (changed.parsed_controller(), changed.parsed_metric()) == (Fisher(), Wanda())
    assert (recipe.parsed_controller(), recipe.parsed_metric()) == (MirrorDescent(), RIA())
    assert not change(recipe, controller="none").uses_controller
    assert not change(recipe, sequential=True).uses_controller  # by default it is the metric's alone
    assert changed.record() == Recipe(sparsity="2:4", metric="wanda", controller="fisher").record()
    with pytest.raises(InputError, match="controller = 'magic': it is unknown"):
        change(recipe, controller="magic")


def test_what_is_replaced_is_checked():
    recipe = Recipe(size="1MB", refine=True)
    assert recipe.replace(size="2MB").given() == {"size": "2MB", "sequential": True, "refine": True}
    for changes, reason in (
        ({"sparsity": "0.5"}, "are two budgets"),
        ({"controller": "fisher"}, "--refine and --controller fisher exclude each other"),
        ({"seed": -1}, "seed = -1"),
        ({"sed": 1}, r"sed = 1: no such setting \(did you mean seed\?\); known settings: "),
    ):
        with pytest.raises(InputError, match=reason):
            recipe.replace(**changes)


@pytest.mark.parametrize(
    ("setting", "reason"), [("metrics: ria", r"no such setting \(did you mean metric\?\)"), ("seed: -1", "seed")]
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, setting, reason):
    (tmp_path / "own.yaml").write_text(setting)
    with pytest.raises(InputError, match=rf"recipe .*own\.yaml: .*{reason}"):
        Recipe.load(tmp_path / "own.yaml")
