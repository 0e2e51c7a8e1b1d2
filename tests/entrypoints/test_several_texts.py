"""Several texts through the commands: calibrated on with their shares, recorded, resumed, and measured each by itself."""

import json

import pytest
import yaml

import processes
import uniprune
from command import run
from conftest import Stopped, Stops, prose_and_numbers
from uniprune import InputError, Recipe
from uniprune.artefacts.scores import ScoresFile
from uniprune.entrypoints.sweep import sweep
from uniprune.evaluation.results import Sweep
from uniprune.reporting import model_card

LENGTH = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    prose_and_numbers(folder)
    return str(folder / "prose.txt"), f"digits={folder / 'numbers.txt'}"


@pytest.fixture(scope="module")
def recipe(texts):
    return Recipe(text=(texts[0], f"{texts[1]}:0.25", "self:0.25"), windows=8, length=LENGTH, sparsity="0.5", controller="none")


@pytest.fixture(scope="module")
def pruned(folder, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("several") / "pruned"
    uniprune.prune(str(folder), recipe, out, save_tokens=out.with_name("tokens.safetensors"))
    return out


@pytest.fixture(scope="module")
def scores(folder, recipe, pruned):
    path = pruned.with_name("scores.safetensors")
    uniprune.calibrate(str(folder), Recipe(**dict(recipe) | {"sparsity": None}), path)
    return path


def test_the_shares_are_recorded(pruned, scores, recipe):
    report = json.loads((pruned / "pruning.json").read_text())
    assert report["recipe"]["text"] == list(recipe.text)
    assert Recipe(**report["recipe"]) == recipe
    facts = ScoresFile(scores).facts
    assert facts.recipe["text"] == list(recipe.text)
    for found in (report["calibration"]["sources"], facts.calibration.model_dump()["sources"]):
        shares = {name: (one["share"], one["windows"]) for name, one in found.items()}
        assert shares == {"prose.txt": (0.5, 4), "digits": (0.25, 2), "self": (0.25, 2)}
    card = (pruned / "README.md").read_text()
    assert "8 samples of 32 tokens of prose.txt (50%), digits (25%), self, what the dense model writes (25%)" in card


def test_the_same_tokens_again_are_the_same_masks(folder, pruned, tmp_path):
    again = Recipe(text=str(pruned.with_name("tokens.safetensors")), sparsity="0.5", controller="none")
    report = uniprune.prune(str(folder), again, tmp_path / "again")
    first = json.loads((pruned / "pruning.json").read_text())
    assert report.masks_sha256 == first["masks_sha256"]
    found = report.record()["calibration"]["sources"]
    assert found == first["calibration"]["sources"]


def test_an_interrupted_run_goes_on_with_the_same_samples(folder, recipe, tmp_path):
    settings = Recipe(**dict(recipe) | {"controller": "feedback", "tuning": {"batch_tokens": 64}, "steps": 3})
    whole = uniprune.prune(str(folder), settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        uniprune.prune(str(folder), settings, tmp_path / "out", progress=Stops(2))
    resumed = uniprune.prune(str(folder), settings, tmp_path / "out", resume=True)
    assert resumed.masks_sha256 == whole.masks_sha256
    assert resumed.calibration == whole.calibration
    other = Recipe(**dict(settings) | {"text": (*recipe.text[:2], "self:0.5")})
    with pytest.raises(Stopped):
        uniprune.prune(str(folder), settings, tmp_path / "again", progress=Stops(2))
    with pytest.raises(InputError, match="resume"):
        uniprune.prune(str(folder), other, tmp_path / "again", resume=True)


def test_in_memory_and_with_other_commands(loaded, recipe, tmp_path):
    assert uniprune.prune_in_place(loaded, recipe).calibration.sources["self"].windows == 2
    asked = {"windows": 8, "length": LENGTH, "text": recipe.text, "eval_length": LENGTH, "eval_windows": 2}
    found = uniprune.compare(loaded, tmp_path / "table", methods=["wanda"], sparsities=["0.5"], **asked)
    assert found.protocol.calibration.sources.keys() == {"prose.txt", "digits", "self"}
    again = uniprune.compare(loaded, tmp_path / "table", methods=["wanda"], sparsities=["0.5"], resume=True, **asked)
    assert again.rows == found.rows


def test_a_recipe_file_and_the_command_line_say_the_same(capsys, monkeypatch, folder, recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"dataset": list(recipe.text), "sparsity": 0.5}))
    assert Recipe.load(tmp_path / "recipe.yaml").text == recipe.text
    words = [word for text in recipe.text for word in ("--dataset", text)]
    small = ["--windows", 8, "--length", LENGTH, "--controller", "none", "-s", 0.5, "--json", "-o", tmp_path / "out"]
    code, printed, errors = run(capsys, monkeypatch, "prune", folder, *words, *small)
    assert code == 0, errors
    assert json.loads(printed)["recipe"]["text"] == list(recipe.text)
    assert Recipe(text=["c4"]).text == Recipe(text="c4").text == "c4"
    code, _, errors = run(capsys, monkeypatch, "prune", folder, "--text", "c4", "--text", "code:1", *small)
    assert (code, errors.count("\n")) == (2, 1)
    assert "leaves nothing for c4" in errors


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_each_text_is_measured_by_itself(folder, pruned, texts, tmp_path):
    asked = {"windows": 3, "length": LENGTH, "new_tokens": 0, "dtype": "float32"}
    found = uniprune.evaluate(str(pruned), text_source=texts, against=str(folder), **asked)
    assert found.text.text == "prose.txt + digits"
    assert (found.windows, found.text.sources["digits"].share) == (6, None)
    near = found.closeness.by_text
    for name, text in zip(("prose.txt", "digits"), texts, strict=True):
        alone = uniprune.evaluate(str(pruned), text_source=text, against=str(folder), **asked)
        assert found.by_text[name].perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert found.by_text[name].nats_stderr == pytest.approx(alone.nats_stderr, rel=1e-3)
        assert (found.by_text[name].tokens, found.by_text[name].windows) == (alone.tokens, 3)
        assert near[name].kl == pytest.approx(alone.closeness.kl, rel=1e-3)
        assert near[name].reference_perplexity == pytest.approx(alone.closeness.reference_perplexity, rel=1e-5)
        assert alone.by_text is None
    assert found.closeness.kl == pytest.approx(sum(one.kl for one in near.values()) / 2)
    found.write(tmp_path / "result.json")
    assert uniprune.check(tmp_path / "result.json").reproduced
    card = model_card.rewrite(pruned, [tmp_path / "result.json"])
    assert f"| digits, 3 samples of {LENGTH} tokens | {found.by_text['digits'].perplexity:.2f} |" in card


def test_the_tokens_of_a_run_are_measured_by_text(folder, pruned):
    found = uniprune.evaluate(str(pruned), text_source=str(pruned.with_name("tokens.safetensors")), against=str(folder))
    assert {name: one.windows for name, one in found.by_text.items()} == {"prose.txt": 4, "digits": 2, "self": 2}
    assert found.closeness.by_text.keys() == found.by_text.keys()


def test_a_sweep_has_each_text(folder, scores, texts, tmp_path):
    asked = {"text_source": texts, "windows": 2, "length": LENGTH, "dtype": "float32"}
    found = sweep(str(folder), scores, tmp_path / "sweep.json", ["0.3", "0.7"], **asked)
    assert all(one.kl == 0 for one in found.dense.by_text.values())
    light, heavy = found.rows
    for name, one in light.by_text.items():
        assert 0 < one.kl < heavy.by_text[name].kl
    assert Sweep.read(tmp_path / "sweep.json") == found
    uniprune.mask(scores, "0.7", tmp_path / "masks.safetensors")
    masks = {"masks": tmp_path / "masks.safetensors", "against": str(folder), "new_tokens": 0}
    alone = uniprune.evaluate(str(folder), **masks, **asked)
    for name, one in heavy.by_text.items():
        assert one.perplexity == pytest.approx(alone.by_text[name].perplexity)
        assert one.kl == pytest.approx(alone.closeness.by_text[name].kl, rel=1e-4)
    more = sweep(str(folder), scores, tmp_path / "sweep.json", ["0.3", "0.5"], resume=True, **asked)
    assert [row.pattern for row in more.rows] == ["0.3", "0.7", "0.5"]
    assert more.rows[-1].by_text.keys() == {"prose.txt", "digits"}


def test_tables_and_reports_show_each_text(capsys, monkeypatch, folder, pruned, scores, texts, tmp_path):
    words = ["--text", texts[0], "--text", texts[1], "--windows", 2, "--length", LENGTH]
    result, swept = tmp_path / "result.json", tmp_path / "sweep.json"
    against = ["--against", folder, "--new-tokens", 0, "-o", result]
    code, printed, _ = run(capsys, monkeypatch, "evaluate", pruned, *words, *against)
    assert code == 0
    assert "Perplexity by text" in printed
    code, printed, _ = run(capsys, monkeypatch, "sweep", folder, scores, "-s", "0.5", *words, "-o", swept)
    assert code == 0
    assert "digits" in printed
    page = tmp_path / "report.html"
    assert run(capsys, monkeypatch, "report", result, swept, "-o", page)[0] == 0
    assert 'id="texts"' in page.read_text()
    assert page.read_text().count(">digits<") >= 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_source": ("builtin", "self")}, "is what the dense model writes"),
        ({"text_source": ("builtin", "TEXT:0.5")}, "is for calibration; leave it out"),
        ({"text_source": ("builtin", "TEXT"), "stride": 4}, "--stride is for one text"),
        ({"text_source": ("builtin", "TEXT"), "rolling": True}, "--rolling is for one text"),
        ({"text_source": ("builtin", "builtin")}, "two texts are called builtin"),
    ],
)
def test_what_is_not_measured(loaded, texts, settings, said):
    asked = {
        name: tuple(one.replace("TEXT", texts[0]) for one in value) if name == "text_source" else value
        for name, value in settings.items()
    }
    with pytest.raises(InputError, match=said):
        uniprune.evaluate(loaded, windows=2, length=LENGTH, **asked)


def test_one_text_may_have_a_name(folder, texts):
    asked = {"windows": 2, "length": LENGTH}
    named, plain = (
        uniprune.evaluate(str(folder), text_source=text, **asked) for text in (texts[1], texts[1].partition("=")[2])
    )
    assert named.perplexity == plain.perplexity
    assert uniprune.evaluate(str(folder), text_source=texts[1], rolling=True, **asked).perplexity > 1


def test_several_processes_calibrate_on_what_the_first_one_wrote(folder, pruned, recipe, tmp_path):
    words = [word for text in recipe.text for word in ("--text", text)]
    small = ["--windows", 8, "--length", LENGTH, "--controller", "none", "-s", 0.5, "-o", tmp_path / "out"]
    assert [done.code for done in processes.together(2, processes.command, "prune", folder, *words, *small)] == [0, 0]
    one, two = (json.loads((path / "pruning.json").read_text())["calibration"] for path in (pruned, tmp_path / "out"))
    assert one == two
