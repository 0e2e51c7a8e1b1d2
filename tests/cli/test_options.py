"""Options made from descriptions: every kind of field, names that other tools have, settings of controllers."""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from command import run
from uniprune import InputError, Recipe
from uniprune.cli.groups import RecipeOptions
from uniprune.cli.main import app
from uniprune.cli.options import Command, Only, described
from uniprune.common.options import Commas, Flag, Options, Positional, Several
from uniprune.controller.mirror_descent import MirrorDescent
from uniprune.job.settings import Settings

CALLS = []


class Fruit(Options):
    heading: ClassVar[str] = "Fruit"

    basket: Annotated[Path, Positional()] = Field(description="Where it is.")
    count: Annotated[int | None, Flag(("-n", "--number"), default="what there is")] = Field(
        default=None, description="How many.", ge=1
    )
    weight: float = Field(default=0.5, description="Of one.")
    kind: Literal["apple", "pear"] = Field(default="apple", description="Which.")
    washed: bool = Field(default=False, description="Clean?")
    counted: bool = Field(default=True, description="Count it?")


class Shopping(Options):
    shops: Annotated[tuple[str, ...], Flag(name="--shop"), Several] = Field(default=(), description="Where from.")
    prices: Annotated[tuple[float, ...], Commas] = Field(default=(1.0, 2.5), description="What it costs.")
    notes: Annotated[dict[str, str], Flag(name="--note", metavar="NAME=VALUE")] = Field(default={}, description="More.")
    budget: int = Field(description="At most.")


def buy(fruit: Fruit, shopping: Shopping) -> None:
    CALLS.append((fruit, shopping))


def weigh(fruit: Annotated[Fruit, Only("basket weight")]) -> None:
    CALLS.append(fruit)


def call(function, *arguments):
    CALLS.clear()
    result = CliRunner().invoke(Command("buy", "Buys fruit.", function), arguments, standalone_mode=False)
    if result.exception:
        raise result.exception
    return CALLS[0] if CALLS else result.output


def test_a_function_gets_its_groups():
    words = "--shop a,b --shop c --prices 3 --note x=1 --prices 4.5,5 --note y=a=b --budget 7 -n 2 --kind pear"
    words += " --washed --no-counted here"
    fruit, shopping = call(buy, *words.split())
    assert fruit == Fruit(basket=Path("here"), count=2, kind="pear", washed=True, counted=False)
    assert shopping == Shopping(shops=("a,b", "c"), prices=(3, 4.5, 5), notes={"x": "1", "y": "a=b"}, budget=7)
    assert fruit.given() == {"basket": Path("here"), "count": 2, "kind": "pear", "washed": True, "counted": False}


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    """A shell leaves ``--output=~/x`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(weigh, "~/here").basket == tmp_path / "here"
    assert call(weigh, "~nobody-of-this-name/here").basket == Path("~nobody-of-this-name/here")


def test_what_is_left_out_is_not_given():
    fruit, shopping = call(buy, "here", "--budget", "0")
    assert (fruit.given(), shopping.given()) == ({"basket": Path("here")}, {"budget": 0})
    assert (fruit.weight, shopping.prices) == (0.5, (1.0, 2.5))
    assert call(buy, *["here", "--budget", "1", "--prices"], "")[1].prices == ()  # not the default


def test_a_part_of_a_group():
    assert call(weigh, "here", "--weight", "2").given() == {"basket": Path("here"), "weight": 2.0}
    with pytest.raises(click.NoSuchOption):
        call(weigh, "here", "--kind", "pear")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("here", click.MissingParameter, "--budget"),
        ("--budget 1", click.MissingParameter, "BASKET"),
        ("here --budget 1 --number 0", InputError, "--count = 0: Input should be greater than or equal to 1"),
        ("here --budget 1 --count x", click.BadParameter, "'x' is not a valid integer"),
        ("here --budget 1 --kind plum", InputError, "--kind = 'plum': Input should be 'apple' or 'pear'"),
        ("here --budget 1 --prices 1,x", InputError, "--prices = 'x': Input should be a valid number"),
        ("here --budget 1 --note x", click.BadParameter, "'x' is not NAME=VALUE"),
    ],
)
def test_errors_name_the_option(words, error, message):
    with pytest.raises(error) as found:
        call(buy, *words.split())
    assert message in (found.value.format_message() if isinstance(found.value, click.ClickException) else str(found.value))


def test_settings_may_be_a_part_of_a_record():
    """A record of a later version may have settings that this one does not know."""

    class Record(BaseModel):
        fruit: Fruit | dict[str, str] = Field(union_mode="left_to_right")

    assert Record(fruit={"basket": "here", "number": "2"}).fruit == Fruit(basket=Path("here"), count=2)
    assert Record(fruit={"basket": "here", "mood": "good"}).fruit == {"basket": "here", "mood": "good"}
    with pytest.raises(InputError, match=r"mood = .good.: .*; known settings: basket, count"):
        Fruit.of(basket="here", mood="good")


def test_the_help_has_every_description_under_its_heading():
    lines = [line.strip() for line in call(buy, "--help").splitlines()]
    assert [line for line in lines if line.endswith(":") and line != "Buys fruit."] == ["Arguments:", "Fruit:", "Options:"]
    text = " ".join(" ".join(lines).split())
    for expected in (
        "BASKET Where it is.",
        "-n, --count, --number N How many. [default: what there is]",
        "--weight X Of one. [default: 0.5]",
        "--kind apple|pear Which. [default: apple]",
        "--washed Clean?",
        "--counted / --no-counted Count it?",
        "--shop TEXT Where from. May be repeated.",
        "--prices TEXT What it costs. May be repeated. [default: 1.0,2.5]",
        "--note NAME=VALUE More. May be repeated.",
        "--budget N At most. [required]",
    ):
        assert expected in text


def test_every_setting_of_a_recipe_is_an_option_of_prune_and_described():
    prune = app.get_command(click.Context(app), "prune")
    options = {option.name: option for option in prune.params}
    for name, field in Settings.model_fields.items():
        assert len(field.description) > 20, name
        assert (options[name].help or "").startswith(field.description)
    assert [*Recipe.model_fields] == [*Settings.model_fields]


# ------------------------------------------------------------------------------------------------- names of other tools


def test_names_that_other_tools_have():
    own = Recipe(sparsity=0.5, text="c4", windows=4, length=32, rules=("a=dense",), tuning={"checks": 2})
    assert Recipe(sparsity=0.5, dataset="c4", num_samples=4, seq_len=32, rule="a=dense", set={"checks": 2}) == own


def test_one_setting_has_one_value():
    with pytest.raises(InputError, match="'text' and 'dataset' both set 'text'; leave one of them out"):
        Recipe(text="c4", dataset="builtin")


def test_a_flag_overrides_the_file_under_either_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: c4\nnum-samples: 8\nseq_len: 64\n")
    assert RecipeOptions(config=recipe, windows=4, text="builtin").recipe() == Recipe(text="builtin", windows=4, length=64)
    recipe.write_text("text: c4\ndataset: builtin\n")
    with pytest.raises(InputError, match="both set 'text'"):
        Recipe.load(recipe)


def test_a_report_replays_its_run(capsys, monkeypatch, folder, tmp_path):
    """pruning.json holds the recipe, so it is one."""
    words = ("prune", folder, "-s", "2:4", "--controller", "none", "--windows", 2, "--length", 16, "--rule", "down_proj=dense")
    assert run(capsys, monkeypatch, *words, "-o", tmp_path / "one")[0] == 0
    report = tmp_path / "one" / "pruning.json"
    assert run(capsys, monkeypatch, "prune", folder, "--config", report, "-o", tmp_path / "two")[0] == 0
    one, two = (json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("one", "two"))
    assert one["recipe"] == two["recipe"]
    assert one["masks_sha256"] == two["masks_sha256"]
    recipe = Recipe.load(report)
    assert (recipe.sparsity, recipe.rules, recipe.windows) == ("2:4", ("down_proj=dense",), 2)
    report.write_text(json.dumps({"kind": "pruning", "recipe": {"text": "\N{SLIGHTLY SMILING FACE}.txt"}}))
    assert Recipe.load(report).text == "\N{SLIGHTLY SMILING FACE}.txt"
    report.write_text('{"kind": "pruning", "recipe": {"windows": 1, "windows": 2}}')
    with pytest.raises(InputError, match="is not a recipe"):
        Recipe.load(report)


@pytest.mark.parametrize(
    ("sparsity", "kind", "expected"),
    [
        ("0.5", "2:4", "2:4"),
        (0.5, "4:8", "4:8"),
        ("0.75", "1:4", "1:4"),
        (None, "2:4", "2:4"),
        ("2:4", "2:4", "2:4"),
        ("0.6", "unstructured", "0.6"),
        (None, "unstructured", None),
    ],
)
def test_the_sparsity_type_of_wandas_scripts(sparsity, kind, expected):
    recipe = Recipe(sparsity=sparsity, sparsity_type=kind)
    assert recipe == Recipe(sparsity=expected)
    assert "sparsity_type" not in recipe.record()


@pytest.mark.parametrize(
    ("sparsity", "kind", "message"),
    [
        ("0.6", "2:4", "--sparsity 0.6 and --sparsity-type 2:4, which removes 0.5 of the weights, contradict each other"),
        ("0.25", "1:4", "removes 0.75"),
        ("4:8", "2:4", "contradict"),
        ("2:4", "unstructured", "contradict"),
        ("0.8@16x16", "unstructured", "contradict"),
        ("0.8@16x16", "2:4", "contradict"),
        ("0.5", "structured", "neither unstructured nor N:M"),
        ("0.5", "0.5", "neither unstructured nor N:M"),
        ("0.5", "4:2", "4:2 is impossible"),
        ("half", "2:4", "'half' is neither"),
    ],
)
def test_a_sparsity_type_that_contradicts(sparsity, kind, message):
    with pytest.raises(InputError, match=message):
        Recipe(sparsity=sparsity, sparsity_type=kind)


def test_a_sparsity_type_over_a_recipe_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.5\n")
    assert RecipeOptions(config=recipe, sparsity_type="2:4").recipe().sparsity == "2:4"
    recipe.write_text("sparsity: 2:4\n")
    with pytest.raises(InputError, match="contradict"):
        RecipeOptions(config=recipe, sparsity_type="unstructured").recipe()


def test_other_names_give_the_same_masks(capsys, monkeypatch, folder, tmp_path):
    commands = (
        "--sparsity 2:4 --text builtin --windows 4 --length 32 --controller none",
        "--sparsity 0.5 --sparsity-type 2:4 --dataset builtin --num-samples 4 --seq-len 32 --controller none",
    )
    for index, words in enumerate(commands):
        assert run(capsys, monkeypatch, "prune", folder, *words.split(), "-o", tmp_path / f"{index}")[0] == 0
    first, second = ((tmp_path / name / "pruning" / "masks.safetensors").read_bytes() for name in "01")
    assert first == second
    scores = tmp_path / "scores.safetensors"
    assert run(capsys, monkeypatch, "calibrate", folder, *commands[0].split()[2:], "-o", scores)[0] == 0
    files = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for file, words in zip(files, ("-s 2:4", "--sparsity-type 2:4 -s 0.5"), strict=True):
        assert run(capsys, monkeypatch, "mask", scores, *words.split(), "-o", file)[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------------------------------- settings of the controller


def tuned(*pairs, **more):
    words = [word for pair in pairs for word in ("--set", pair)]
    found = []

    def collect(recipe: RecipeOptions) -> None:
        found.append(recipe.recipe())

    collect.__annotations__ = {"recipe": RecipeOptions}
    options = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    command = Command("prune", "", collect)
    result = CliRunner().invoke(command, [*words, *options], standalone_mode=False)
    if result.exception:
        raise result.exception
    return found[0]


def test_settings_of_the_controller_have_types():
    recipe = tuned("step_size=0.006", "even_tokens=false", "batch_tokens=4096", "focus=True", "held_out=8.0")
    settings = recipe.parsed_controller()
    assert settings == MirrorDescent(step_size=0.006, even_tokens=False, batch_tokens=4096, focus=True, held_out=8)
    assert [type(getattr(settings, name)) for name in ("step_size", "even_tokens", "batch_tokens")] == [float, bool, int]
    assert recipe.record()["tuning"]["even_tokens"] is False
    assert Recipe(**recipe.record()).record() == recipe.record()


@pytest.mark.parametrize(("value", "expected"), [(True, True), ("true", True), ("0", False), (1, True), (0.0, False)])
def test_truth_values_in_recipes(value, expected):
    assert Recipe(tuning={"even_tokens": value}).parsed_controller().even_tokens is expected


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stepsize=1", "'stepsize' is not a setting of MirrorDescent; it has: step_size, mean_decay, .*even_tokens"),
        ("batch_tokens=64.5", "batch_tokens = 64.5"),
        ("even_tokens=maybe", "even_tokens = maybe"),
        ("step_size=fast", "step_size = fast"),
        ("step_size=nan", "step_size = nan"),
        ("labels=2", "labels = 2"),
    ],
)
def test_a_setting_that_cannot_be_is_named(pair, message):
    with pytest.raises(InputError, match=message):
        tuned(pair)


def test_one_setting_over_a_recipe_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tuning: {step_size: 0.006, even_tokens: false, checks: 2}\n")
    settings = tuned("checks=3", "checks=8", config=recipe).parsed_controller()
    assert settings == MirrorDescent(step_size=0.006, even_tokens=False, checks=8)


def test_defaults_are_described():
    assert described(Settings.model_fields["windows"]).endswith("[default: 128; all of a token file]")
    assert described(Settings.model_fields["seed"]).endswith("[default: 0]")
    assert "default" not in described(Settings.model_fields["sparsity"])
