"""A table of methods: each row is what pruning and evaluating by themselves give, and nothing is done twice."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from rich.table import Table

import uniprune
from command import run
from conftest import Stopped, Stops, tiny_model
from kills import KILLED, _run
from processes import Forked
from task_rows import ROWS
from uniprune import InputError, Loaded, MismatchError, Recipe
from uniprune.artefacts.masks import MasksFile, digest
from uniprune.cli.tables import comparison_table
from uniprune.comparison import calibrations
from uniprune.comparison.request import ComparisonRequest
from uniprune.comparison.results import Comparison
from uniprune.comparison.sparsegpt import sparsegpt
from uniprune.data.windows import load_windows
from uniprune.entrypoints.compare import compare
from uniprune.errors import UniPruneError
from uniprune.evaluation import reproduce
from uniprune.job.forecast import memory
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.storage import runs

READ = {"text_source": "builtin", "windows": 2, "length": 32}
SMALL = {"windows": 8, "length": 16, "eval_windows": 2, "eval_length": 32, "dtype": "float32"}
METHODS = ("magnitude", "ria:a=0.3", "sparsegpt", "feedback", "any", "sequential", "refine", "unipruning")
BOTH = ("0.5", "2:4")
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def table(folder, tmp_path_factory):
    """All methods at two sparsities, and the folder."""
    output = tmp_path_factory.mktemp("compare") / "table"
    return compare(str(folder), output, methods=METHODS, sparsities=BOTH, metric="ria", **SMALL), output


def rows_of(found, method):
    return [row for row in found.rows if row.method == method]


def measured(found):
    """A table without its times."""
    return [row.model_copy(update={"seconds": {}, "measured": "", "resumed": False}) for row in found.rows]


def test_the_dense_model_comes_first(table, folder):
    found, output = table
    assert [row.key for row in found.rows] == [("dense", None), *((name, spec) for name in METHODS for spec in BOTH)]
    dense = uniprune.evaluate(str(folder), dtype="float32", **READ)
    assert found.rows[0].perplexity == dense.perplexity
    assert found.rows[0].byte_perplexity == dense.byte_perplexity
    assert found.rows[0].nats_stderr == dense.nats_stderr
    assert found.protocol.weights_sha256 == dense.protocol.weights_sha256
    assert Comparison.read(output / "comparison.json") == found
    assert not list(output.parent.glob(".*"))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("sparsegpt", "any")])
def test_rows_are_what_prune_and_evaluate_give(table, folder, tmp_path, method):
    for row in rows_of(table[0], method):
        uniprune.prune(str(folder), Recipe(**row.recipe), tmp_path / "pruned", overwrite=True)
        assert digest(MasksFile(tmp_path / "pruned" / "pruning" / "masks.safetensors")) == row.masks_digest
        pruned = uniprune.evaluate(str(tmp_path / "pruned"), dtype="float32", **READ)
        assert row.perplexity == pruned.perplexity
        assert row.sparsity == pytest.approx(pruned.sparsity, abs=1e-3)
        assert not row.updates_weights


def test_rows_of_one_calibration_are_what_calibrate_and_mask_give(table, folder, tmp_path):
    first, second = rows_of(table[0], "any")
    assert first.recipe == second.recipe
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    uniprune.calibrate(str(folder), Recipe(**first.recipe), scores)
    for row in (first, second):
        uniprune.mask(scores, row.pattern, masks, overwrite=True)
        assert digest(MasksFile(masks)) == row.masks_digest
        uniprune.apply(str(folder), masks, tmp_path / "pruned", overwrite=True)
        assert row.perplexity == uniprune.evaluate(str(tmp_path / "pruned"), dtype="float32", **READ).perplexity


def test_one_calibration_under_rules_is_what_calibrate_and_mask_give(folder, tmp_path):
    """What shapes the budget is for mask: calibrate without a sparsity refuses it."""
    rules, scores, masks = ("down_proj=0.3",), tmp_path / "scores.safetensors", tmp_path / "masks.safetensors"
    found = compare(str(folder), tmp_path / "table", methods=["any"], sparsities=["0.5"], rules=rules, scope="row", **SMALL)
    (row,) = rows_of(found, "any")
    uniprune.calibrate(str(folder), Recipe(**row.recipe), scores)
    uniprune.mask(scores, row.pattern, masks, rules=rules, scope=row.scope)
    assert digest(MasksFile(masks)) == row.masks_digest


def test_scores_of_another_sparsity_are_warned_of(folder, tmp_path, caplog):
    scores = tmp_path / "scores.safetensors"
    uniprune.calibrate(str(folder), Recipe(sparsity="0.5", steps=1, windows=8, length=16), scores)
    for spec, warned in (("0.5", False), ("0.7", True)):
        caplog.clear()
        compare(str(folder), tmp_path / spec, methods=[str(scores)], sparsities=[spec], scope="model", **SMALL)
        assert ("was calibrated for 0.5 by model alone; masks of 0.7 by model would be better" in caplog.text) is warned


def test_masks_stand_with_what_has_their_sparsity(folder, tmp_path, caplog):
    """Spelled as ``--sparsity`` spells it, so that they are compared; and what changes nothing is said."""
    masks = []
    for spec, scope in (("0.5", "model"), ("2:4", None)):
        out = tmp_path / spec
        uniprune.prune(str(folder), Recipe(sparsity=spec, scope=scope, metric="magnitude", controller="none"), out)
        masks.append(str(out / "pruning" / "masks.safetensors"))
    found = compare(str(folder), tmp_path / "table", methods=masks, sparsities=["0.6"], metric="ria", **SMALL)
    assert [(row.pattern, row.scope) for row in found.rows] == [(None, None), ("0.5", "model"), ("2:4", None)]
    assert "--sparsity and --scope change nothing" in caplog.text
    assert "--metric changes nothing" in caplog.text
    caplog.clear()
    compare(str(folder), tmp_path / "other", methods=[masks[0], "sequential"], sparsities=["2:4"], metric="ria", **SMALL)
    assert "change" not in caplog.text


def test_sparsegpt_is_that_of_its_own_function(table, folder):
    for row, pattern in zip(rows_of(table[0], "sparsegpt"), (Unstructured(0.5), NM(2, 4)), strict=True):
        loaded = uniprune.load(str(folder), dtype="float32")
        windows = load_windows("builtin", loaded.tokenizer, use="calibration", length=16, count=8)
        masks = sparsegpt(loaded.model, find_matrices(loaded.model), windows.tokens, pattern)
        assert row.masks_digest == digest(masks)
        assert row.perplexity == uniprune.evaluate(loaded, **READ).perplexity
        assert row.updates_weights
        assert row.recipe == {}


def test_scopes_are_said(table):
    found = table[0]
    assert {row.method: row.scope for row in found.rows if row.pattern == "0.5"} == {
        **dict.fromkeys(METHODS, "row"),
        "feedback": "model",
        "any": "model",
    }
    assert found.scopes == ["row", "model"]
    assert {row.scope for row in found.rows if row.pattern != "0.5"} == {None}


def test_sparsities_of_matrices_are_said_where_they_differ(table, folder):
    found = table[0]
    assert {row.method for row in found.rows if row.matrices} == {"feedback", "any"}
    row = next(row for row in found.rows if row.key == ("feedback", "0.5"))
    shapes = {name: matrix.shape for name, matrix in find_matrices(uniprune.load(str(folder)).model).items()}
    assert row.matrices.keys() == shapes.keys()
    total = sum(row.matrices[name] * rows * columns for name, (rows, columns) in shapes.items())
    assert total / sum(rows * columns for rows, columns in shapes.values()) == pytest.approx(row.sparsity)


# ---------------------------------------------------------------------------------------------------------- the weights


class StopsIn(Stops):
    """Progress that ends the run within loops of one kind."""

    def __init__(self, label, after):
        super().__init__(after)
        self.label = label

    def __call__(self, items, label, total):
        return super().__call__(items, label, total) if label == self.label else iter(items)


def test_weights_come_back_bit_for_bit(tokenizer, tmp_path):
    loaded = Loaded(tiny_model(), tokenizer)
    before = reproduce.weights_sha256(loaded.model)
    asked = {"methods": ("wanda", "sparsegpt", "refine"), **SMALL}
    compare(loaded, tmp_path / "table", **asked)
    assert reproduce.weights_sha256(loaded.model) == before
    for label, after in (("SparseGPT, block by block", 1), ("evaluating", 2), ("comparing", 3)):
        with pytest.raises(Stopped):
            compare(loaded, tmp_path / "stopped", overwrite=True, progress=StopsIn(label, after), **asked)
        assert reproduce.weights_sha256(loaded.model) == before
    assert yaml.safe_load((tmp_path / "table" / "recipe.yaml").read_text()).keys().isdisjoint({"model"})


def test_one_pass_for_local_metrics_one_descent_for_any(folder, tmp_path, monkeypatch):
    calls = []
    for name in ("observed", "scored"):
        real = getattr(calibrations, name)
        monkeypatch.setattr(
            calibrations, name, lambda *given, name=name, real=real: calls.append((name, given)) or real(*given)
        )
    methods = ("magnitude", "wanda", "ria", "stochria:a=0.5,beta=0.2", "any", "feedback")
    found = compare(str(folder), tmp_path / "table", methods=methods, sparsities=BOTH, steps=1, **SMALL)
    assert [name for name, _ in calls] == ["observed", "scored", "scored", "scored"]
    assert [len(given[2]) > 1 for name, given in calls if name == "scored"] == [True, False, False]
    assert len({row.seconds["calibrate"] for row in found.rows if row.method in methods[1:4]}) == 1
    assert len({row.seconds["calibrate"] for row in rows_of(found, "any")}) == 1
    assert "calibrate" not in rows_of(found, "magnitude")[0].seconds


# -------------------------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_table_goes_on(folder, tmp_path):
    asked = {"methods": ("wanda", "feedback", "any"), "sparsities": BOTH, **SMALL}
    whole = compare(str(folder), tmp_path / "whole", **asked)
    output, kept = tmp_path / "table", []
    for label, after, rows in (("comparing", 2, 2), ("comparing", 1, 3), ("descending", 0, 3), ("comparing", 2, 5)):
        with pytest.raises(Stopped):
            compare(str(folder), output, resume=True, progress=StopsIn(label, after), **asked)
        there = Comparison.read(output / "comparison.json")
        assert len(there.rows) == rows
        assert there.rows[: len(kept)] == kept  # and no finished row was made again
        kept = there.rows
        assert (output / "comparison.md").read_text().count("\n| ") == rows + 2  # a head and a line below it
        assert len(list((output / "lm_eval").rglob("results_*.json"))) == rows
    with pytest.raises(InputError, match="exists; --resume keeps its rows and adds those that are missing"):
        compare(str(folder), output, **asked)
    found = compare(str(folder), output, resume=True, **asked)
    assert found.rows[: len(kept)] == kept
    assert measured(found) == measured(whole)
    assert not list(tmp_path.glob(".*"))
    again = compare(str(folder), output, resume=True, **asked)
    assert again.rows == found.rows
    more = compare(str(folder), output, resume=True, **asked | {"methods": ("magnitude",), "sparsities": ("0.3",)})
    assert [row.key for row in more.rows] == [*(row.key for row in found.rows), ("magnitude", "0.3")]
    assert more.rows[:-1] == found.rows
    assert ComparisonRequest.load(output / "recipe.yaml").methods == ("wanda", "feedback", "any", "magnitude")


def test_a_calibration_that_is_added_to_a_table_goes_on(folder, tmp_path, monkeypatch):
    """As in a table that has no row yet."""
    monkeypatch.setattr(runs.Pace, "due", lambda self: True)
    output, asked = tmp_path / "table", {"sparsities": ("2:4",), **SMALL}
    compare(str(folder), output, methods=("magnitude",), **asked)
    with pytest.raises(Stopped):
        compare(
            str(folder), output, methods=("feedback:batch_tokens=16",), resume=True, progress=StopsIn("descending", 2), **asked
        )
    begun = list((tmp_path / ".run-table").glob("row-*/descent.json"))
    assert json.loads(begun[0].read_bytes())["facts"]["done"] == 2
    assert compare(str(folder), output, methods=("feedback:batch_tokens=16",), resume=True, **asked).rows[-1].resumed
    assert not (tmp_path / ".run-table").exists()


def test_a_row_has_one_file_for_the_harness_whatever_it_is_called(folder, tmp_path):
    """A file of scores is called by its name, and by more of its path once there is another one of that name."""
    asked, files = {"sparsities": ("0.5",), **SMALL}, []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(str(tmp_path / name / "scores.safetensors"))
        uniprune.calibrate(str(folder), Recipe(controller="none", metric="magnitude"), Path(files[-1]))
    compare(str(folder), tmp_path / "table", methods=files[:1], **asked)
    strange = tmp_path / "table" / "lm_eval" / "other" / "results_2026.json"
    strange.parent.mkdir()
    strange.write_text('{"model_source": "hf"}')
    compare(str(folder), tmp_path / "table", methods=files[1:], resume=True, **asked)
    found = {path.parent.name for path in (tmp_path / "table" / "lm_eval").rglob("results_*.json")}
    assert len(found) == 4
    assert {"other"} <= found
    assert len([name for name in found if "a__scores" in name]) == 1
    assert {path.name for path in (tmp_path / "table" / "lm_eval").iterdir()} == found


def test_a_killed_table_goes_on(folder, tmp_path):
    """Killed just before random changes of the disk; every row that was there before is kept as it was."""
    words = ["compare", folder, "-m", "wanda,sequential", "-s", "0.5", *FLAGS, "--resume"]
    done = Forked(_run, tmp_path, None, [*words, "-o", tmp_path / "whole"]).wait()
    assert done.code == 0, done.err
    changes, draw, output, kept = int(done.err.splitlines()[-1]), random.Random(0), tmp_path / "table", []
    for kill in range(4):
        moment = draw.randint(0, changes // 2) if kill < 3 else None
        done = Forked(_run, tmp_path, moment, [*words, "-o", output]).wait()
        assert done.code in (0, KILLED), done.err
        if (output / "comparison.json").exists():
            rows = Comparison.read(output / "comparison.json").rows
            assert rows[: len(kept)] == kept
            kept = rows
    assert done.code == 0
    whole, found = (Comparison.read(path / "comparison.json") for path in (tmp_path / "whole", output))
    assert measured(found) == measured(whole)
    for name in ("comparison.md", "comparison.tex", "recipe.yaml"):
        assert (output / name).is_file()
    assert not list(tmp_path.glob(".*"))
    assert not list(output.rglob(".*"))


def test_another_table_is_not_gone_on_with(folder, tmp_path, tokenizer):
    asked = {"methods": ("wanda",), "sparsities": ("0.5",), **SMALL}
    compare(str(folder), tmp_path / "table", **asked)
    before = (tmp_path / "table" / "comparison.json").read_bytes()
    for changes, said in (
        ({"windows": 4}, "settings.windows was 8, is 4"),
        ({"seed": 1}, "settings.seed was 0, is 1"),
        ({"eval_length": 16}, "settings.eval_length was 32, is 16"),
        ({"scope": "matrix"}, "settings.scope was not given, is 'matrix'"),
    ):
        with pytest.raises(InputError, match=said):
            compare(str(folder), tmp_path / "table", resume=True, **asked | changes)
    with pytest.raises(InputError, match="weights_sha256 was"):
        compare(Loaded(tiny_model(), tokenizer), tmp_path / "table", resume=True, **asked)
    assert (tmp_path / "table" / "comparison.json").read_bytes() == before
    (tmp_path / "table" / "comparison.json").write_text('{"rows": 3}')
    with pytest.raises(InputError, match="damaged"):
        compare(str(folder), tmp_path / "table", resume=True, **asked)
    assert len(compare(str(folder), tmp_path / "table", overwrite=True, **asked).rows) == 2


# -------------------------------------------------------------------------------------------------------- files of ours


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory):
    """A scores file, and masks of it at 0.5 by matrix."""
    place = tmp_path_factory.mktemp("ours")
    scores, masks = place / "scores.safetensors", place / "masks.safetensors"
    uniprune.calibrate(str(folder), Recipe(metric="ria", controller="none", windows=4, length=16), scores)
    uniprune.mask(scores, "0.5", masks, scope="matrix")
    return scores, masks


def test_scores_and_masks_files_have_rows(folder, ours, tmp_path):
    scores, masks = ours
    found = compare(str(folder), tmp_path / "table", methods=tuple(map(str, ours)), sparsities=BOTH, **SMALL)
    assert [row.key for row in found.rows[1:]] == [*((str(scores), spec) for spec in BOTH), (str(masks), "0.5")]
    for row in found.rows[1:]:
        if row.method == str(scores):
            uniprune.mask(scores, row.pattern, tmp_path / "own.safetensors", overwrite=True)
        own = tmp_path / "own.safetensors" if row.method == str(scores) else masks
        assert row.masks_digest == digest(MasksFile(own))
        uniprune.apply(str(folder), own, tmp_path / "pruned", overwrite=True)
        assert row.perplexity == uniprune.evaluate(str(tmp_path / "pruned"), dtype="float32", **READ).perplexity
    assert [row.scope for row in found.rows] == [None, "row", None, "matrix"]
    uniprune.calibrate(str(folder), Recipe(controller="none", windows=4, length=16), scores.with_name("other.safetensors"))
    scores.with_name("other.safetensors").replace(scores)
    with pytest.raises(InputError, match="is not the file that its row was made of"):
        compare(str(folder), tmp_path / "table", methods=(str(scores),), sparsities=BOTH, resume=True, **SMALL)


def test_files_for_another_model_are_refused(ours, tokenizer, tmp_path):
    for model, said in (
        (tiny_model(), "which has other weights in"),
        (tiny_model(hidden_size=64), "it was made for another model: this one, with"),
    ):
        with pytest.raises(MismatchError, match=said):
            compare(Loaded(model, tokenizer), tmp_path / "table", methods=(str(ours[1]),), **SMALL)
    assert not list(tmp_path.iterdir())


def test_tasks_have_accuracies_with_errors(folder, tmp_path):
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps(ROWS["arc"] | {"question": f"{n} {ROWS['arc']['question']}"}) + "\n" for n in range(6)))
    asked = {"tasks": (str(path),), "limit": 4, **SMALL}
    found = compare(str(folder), tmp_path / "table", methods=("wanda",), sparsities=("0.5",), **asked)
    uniprune.prune(str(folder), Recipe(**found.rows[1].recipe), tmp_path / "pruned")
    for row, model in zip(found.rows, (folder, tmp_path / "pruned"), strict=True):
        assert row.tasks == uniprune.evaluate(str(model), tasks=(str(path),), limit=4, dtype="float32").tasks
        assert row.tasks[str(path)].acc_stderr is not None
    beside = uniprune.evaluate(str(tmp_path / "pruned"), tasks=(str(path),), limit=4, dtype="float32", against=str(folder))
    for metric, other in beside.tasks[str(path)].against.items():
        assert found.rows[1].flips(found.rows[0], str(path), metric) == (other.gained, other.lost)
    assert "| arc |" in (tmp_path / "table" / "comparison.md").read_text()


def test_prompts_are_gone_on_with_by_every_model(folder, tmp_path):
    asked = {"prompts": ("to be", "or not"), "new_tokens": 3}
    found = compare(str(folder), tmp_path / "table", methods=("magnitude",), sparsities=("0.5",), **asked, **SMALL)
    uniprune.prune(str(folder), Recipe(**found.rows[1].recipe), tmp_path / "pruned")
    beside = uniprune.evaluate(str(tmp_path / "pruned"), dtype="float32", against=str(folder), **asked, **READ)
    assert found.protocol.prompts == ["to be", "or not"]
    assert found.rows[0].written == [each.against for each in beside.generations]
    assert found.rows[1].written == [each.model for each in beside.generations]
    assert "\n\nor not\n\n| method | sparsity | goes on |" in (tmp_path / "table" / "comparison.md").read_text()
    titles = [str(part.title) for part in comparison_table(found) if isinstance(part, Table)]
    assert titles[1:] == ["to be", "or not"]
    asked["new_tokens"] = 0
    found = compare(str(folder), tmp_path / "none", methods=("magnitude",), sparsities=("0.5",), **asked, **SMALL)
    assert [row.written for row in found.rows] == [[], []]


def test_a_method_that_cannot_prune_the_model_stops_no_other(tokenizer, tmp_path, caplog):
    """SparseGPT needs tokens at every matrix, which rare experts lack; the table says so and goes on, also when resumed."""
    model = tiny_model()
    model.model.layers[0].mlp.forward = lambda x: x
    asked = {"methods": ("sparsegpt", "magnitude"), "sparsities": ("0.5", "2:4"), **SMALL}
    for options in ({}, {"resume": True}):
        with pytest.raises(
            UniPruneError, match=r"2 of \d rows could not be made.*method sparsegpt at 0\.5: .*saw no calibration"
        ):
            compare(Loaded(model, tokenizer), tmp_path / "table", **asked, **options)
        found = Comparison.read(tmp_path / "table" / "comparison.json")
        assert [(row.method, row.pattern) for row in found.rows] == [
            ("dense", None),
            ("magnitude", "0.5"),
            ("magnitude", "2:4"),
        ]
    assert "method sparsegpt at 2:4: " in caplog.text


def test_a_table_is_gone_on_with_in_its_own_folder(folder, tmp_path, monkeypatch):
    asked = {"methods": ("magnitude",), **SMALL}
    compare(str(folder), tmp_path / "table", sparsities=("0.5",), **asked)
    monkeypatch.chdir(tmp_path / "table")
    assert len(compare(str(folder), Path(), sparsities=("0.5", "2:4"), resume=True, **asked).rows) == 3


def test_tasks_and_methods_of_one_file_name_are_told_apart(folder, tmp_path, ours):
    names = [tmp_path / place / "test.jsonl" for place in ("a", "b")]
    for number, path in enumerate(names):
        path.parent.mkdir()
        path.write_text("".join(json.dumps(ROWS["arc"]) + "\n" for _ in range(1 + number)))
    scores = [tmp_path / place / "s.safetensors" for place in ("a", "b")]
    for path in scores:
        uniprune.calibrate(str(folder), Recipe(metric="magnitude", controller="none", windows=2, length=32), path)
    methods = tuple(map(str, scores))
    found = compare(str(folder), tmp_path / "t", methods=methods, sparsities=("2:4",), tasks=tuple(map(str, names)), **SMALL)
    written = [json.loads(path.read_text()) for path in (tmp_path / "t").rglob("results_*.json")]
    assert len(written) == len(found.rows) == 3
    for each in written:
        counts = {name: samples["effective"] for name, samples in each["n-samples"].items() if "perplexity" not in name}
        assert counts == {"a_test": 1, "b_test": 2}
    table = (tmp_path / "t" / "comparison.md").read_text()
    assert "| a/test | b/test |" in table


# ------------------------------------------------------------------------------------------------------- the command line


def test_the_recipe_replays_the_table(capsys, monkeypatch, folder, tmp_path):
    words = ["compare", folder, "-m", "wanda, stochria:a=0.5,beta=0.2", "-s", "0.4,2:4", "--exclude", r"layers\.0\.", *FLAGS]
    code, printed, errors = run(capsys, monkeypatch, *words, "-o", tmp_path / "table")
    assert (code, errors) == (0, "")
    assert "stochria" in printed
    config = tmp_path / "table" / "recipe.yaml"
    code, printed, errors = run(capsys, monkeypatch, "compare", "--config", config, "-o", tmp_path / "again", "--json")
    assert (code, errors) == (0, "")
    whole, again = Comparison.read(tmp_path / "table" / "comparison.json"), Comparison(**json.loads(printed))
    assert measured(again) == measured(whole)
    assert again.protocol == whole.protocol
    assert (tmp_path / "again" / "recipe.yaml").read_text() == config.read_text()
    words = ["compare", "--config", config, "--windows", 4, "-o", tmp_path / "again", "--resume"]
    code, _, errors = run(capsys, monkeypatch, *words)
    assert code == 2
    assert "settings.windows was 8, is 4" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "wandaa"], "method 'wandaa' is unknown; use magnitude, wanda, ria, stochria, feedback"),
        (["-m", "feedback:step"], "'step' is not NAME=VALUE"),
        (["-m", "feedback:speed=3"], "'speed' is not a setting of MirrorDescent"),
        (["-m", "sparsegpt:damp=-1"], "damp = -1.0 is negative"),
        (["-m", "ria:a=x"], "a = x"),
        (["-m", "nothing.safetensors"], "is a file that does not exist"),
        (["-m", ""], "nothing to compare"),
        (["-s", ""], "nothing to compare"),
        (["-s", "0.5,1.5"], "method magnitude at 1.5: sparsity"),
        (["-s", "3:7"], "method magnitude at 3:7: "),
        (["-m", "wanda,refine", "--scope", "matrix"], "method refine at 0.5: --refine exchanges weights within a row"),
        (["-m", "wanda,sparsegpt", "-s", "0.5@4x4"], "method sparsegpt at 0.5@4x4: SparseGPT cuts N:M patterns and fractions"),
        (["-m", "sparsegpt", "--scope", "model"], "method sparsegpt at 0.5: SparseGPT cuts block after block"),
        (["-m", "feedback", "--metric", "wandaa"], "metric 'wandaa' is unknown"),
        (["--limit", "3"], "--limit is a number of questions"),
        (["--new-tokens", "3"], "give --prompt"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--eval-text", "nowhere.txt"], "nowhere.txt"),
        (["--eval-text", "builtin", "--eval-text", "c4"], "given 2 times, and takes one value"),
        (["--eval-windows", "9999999"], "lower --eval-windows or --eval-length"),
        (["--rule", "nowhere=dense", "-m", "wanda"], "rule nowhere=dense matches none"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(capsys, monkeypatch, folder, tmp_path, words, said):
    monkeypatch.setattr("uniprune.job.prepare.load_weights", lambda *given: pytest.fail("weights were loaded"))
    code, _, errors = run(capsys, monkeypatch, "compare", folder, *FLAGS, *words, "-o", tmp_path / "table")
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_outputs_that_may_not_be_are_refused(capsys, monkeypatch, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for output, words in ((tmp_path / "mine", ["--overwrite"]), (folder, []), (folder / "table", []), (tmp_path / "mine", [])):
        code, _, errors = run(capsys, monkeypatch, "compare", folder, *FLAGS, *words, "-o", output)
        assert code == 2
        assert errors.count("\n") == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    code, _, errors = run(capsys, monkeypatch, "compare", "-o", tmp_path / "table")
    assert code == 2
    assert "MODEL is missing" in errors


def test_layers_that_cannot_have_a_pattern_may_stay_dense(tokenizer, tmp_path):
    """Methods that cut a matrix at a time, with a rule for some of them."""
    loaded = Loaded(tiny_model(intermediate_size=66), tokenizer)  # 66 inputs are not divisible by 4
    with pytest.raises(InputError, match=r"method wanda at 2:4: .*66 inputs"):
        compare(loaded, tmp_path / "table", methods=("wanda",), sparsities=("2:4",), **SMALL)
    asked = {"methods": ("wanda", "sparsegpt"), "sparsities": ("2:4",), "unsupported": "dense", **SMALL}
    found = compare(loaded, tmp_path / "table", **asked)
    assert found.rows[1].sparsity == found.rows[2].sparsity < 0.5
    assert torch.isfinite(torch.tensor([row.perplexity for row in found.rows])).all()


def test_a_scope_is_of_fractions(loaded, tmp_path):
    asked = {"methods": ("wanda", "feedback"), "sparsities": BOTH, "scope": "matrix", "steps": 1}
    found = compare(loaded, tmp_path / "table", **asked, **SMALL)
    assert [row.scope for row in found.rows] == [None, "matrix", None, "matrix", None]
    assert found.scopes == ["matrix"]


def test_one_sparsity_in_several_spellings_has_one_row(folder, tmp_path):
    compare(str(folder), tmp_path / "table", methods=("magnitude",), sparsities=(".5",), **SMALL)
    found = compare(str(folder), tmp_path / "table", methods=("magnitude",), sparsities=("0.50", "0.5"), resume=True, **SMALL)
    assert [row.sparsity for row in found.rows][1:] == [pytest.approx(0.5, abs=1e-3)]
    assert found.sparsities == ["0.5"]


def test_a_calibration_that_fails_is_not_tried_for_every_row(folder, tmp_path, monkeypatch):
    tried = []

    def fails(*given):
        tried.append(given)
        raise InputError("block 1 puts out NaN")

    monkeypatch.setattr(calibrations, "observed", fails)
    monkeypatch.setattr(calibrations, "scored", fails)
    asked = {"methods": ("wanda", "ria", "any"), "sparsities": ("0.5", "0.6", "2:4"), **SMALL}
    with pytest.raises(UniPruneError, match="9 of 10 rows"):
        compare(str(folder), tmp_path / "table", **asked)
    assert len(tried) == 2


def test_a_table_needs_room_for_its_calibrations_and_memory_for_pruned_models(folder, tmp_path, monkeypatch):
    asked, forecasts = [], []
    monkeypatch.setattr("uniprune.storage.files.check_disk_space", lambda path, size, held=0: asked.append((path, size)))
    needs = memory.needs
    monkeypatch.setattr(memory, "needs", lambda work: forecasts.append(work) or needs(work))
    compare(str(folder), tmp_path / "table", methods=("wanda",), sparsities=("2:4",), **SMALL)
    assert [path for path, _ in asked] == [tmp_path / "table"]
    assert [work.compared for work in forecasts] == [True]


def test_the_revision_is_of_the_model(capsys, monkeypatch, folder, tmp_path):
    """As for every other command."""
    for model, said in ((folder, "is of a model on the Hub"), ("owner/name@v1", "name two revisions")):
        words = ("compare", model, "--revision", "v2", "-m", "wanda", "-o", tmp_path / "table")
        code, _, errors = run(capsys, monkeypatch, *words)
        assert code == 2
        assert said in errors
