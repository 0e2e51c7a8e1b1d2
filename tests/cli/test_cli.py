"""The command line as users meet it: a frozen set of flags, one-line errors, exit codes, JSON."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import click
import pytest
import torch

import uniprune
from command import run
from conftest import tiny_model
from uniprune.cli import main
from uniprune.cli.terminal import Bars
from uniprune.common.provenance import versions

RECIPE = "allow hardware unsupported misfits rule scope sparsity sparsity-type include exclude dtype"
SAMPLES = "text dataset windows num-samples length seq-len"
TEXT = f"{SAMPLES} field split bos"
CONTROLLER = "controller budget-tokens steps set"
FLAGS = {
    "plan": f"{RECIPE} {CONTROLLER} {TEXT} config device execution experts json revision max-memory metric refine seed"
    " sequential size",
    "calibrate": f"{RECIPE} {CONTROLLER} {TEXT} config device execution json max-memory metric output overwrite resume"
    " revision save-tokens seed",
    "mask": "allow hardware unsupported misfits rule json output overwrite scope sparsity sparsity-type",
    "apply": "force dtype json revision output overwrite push-to-hub",
    "prune": f"{RECIPE} {CONTROLLER} {TEXT} config device execution experts json revision max-memory metric output overwrite"
    " push-to-hub refine resume save-tokens seed sequential size",
    "permute": f"{TEXT} device dtype exclude include json revision max-memory metric output overwrite seed sparsity",
    "evaluate": f"{TEXT} stride rolling against check device dtype json limit lm-eval masks new-tokens num-fewshot output"
    " overwrite prompt revision suite tasks",
    "compare": f"{TEXT} methods sparsity scope rule unsupported misfits metric budget-tokens steps seed include exclude dtype"
    f" {' '.join(f'eval-{name}' for name in f'{TEXT} stride'.split())} tasks limit"
    " suite num-fewshot prompt new-tokens config device json output overwrite resume revision",
    "sweep": f"{TEXT} stride device dtype json revision output overwrite resume scope sparsities sparsity",
    "pack": "json level output overwrite runtime",
    "unpack": "json output overwrite",
    "card": "json overwrite push-to-hub",
    "bench": "batch device dtype json revision sparsity levels",
    "report": "format json output overwrite",
}
MASKS_FLAGS = {
    "verify": "dtype json model pruned",
    "diff": "force json",
    "intersect": "json output overwrite",
    "union": "json output overwrite",
    "stats": "json",
    "import": "check-bits dtype json model output overwrite",
    "export": "dtype format json model output overwrite",
}


def commands(group):
    context = click.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


def test_the_flags_are_frozen():
    """Adding a flag is a decision: it changes this table."""
    found = commands(main.app)
    for table, made in ((MASKS_FLAGS, commands(found.pop("masks"))), (FLAGS, found)):
        flags = {
            name: {o.removeprefix("--") for p in command.params for o in p.opts if o.startswith("--")}
            for name, command in made.items()
        }
        assert flags == {name: set(flags.split()) for name, flags in table.items()}


@pytest.mark.parametrize(("words", "unwanted"), [("--help", {"torch", "pydantic", "rich"}), ("prune --help", {"torch"})])
def test_help_loads_little(words, unwanted):
    """Nobody waits for PyTorch to read a help. benchmarks/help.py measures how long it takes."""
    code = f"""
import sys
from uniprune.cli.main import main
sys.argv = ["uniprune", *{words.split()!r}]
try:
    main()
finally:
    print(*({unwanted!r} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("Usage: uniprune")
    assert done.stderr.split() == []


def test_versions_are_those_that_reports_have(capsys, monkeypatch):
    code, printed, _ = run(capsys, monkeypatch, "--version")
    assert code == 0
    assert dict(line.split() for line in printed.splitlines()) == versions()
    assert printed.splitlines()[0] == f"uniprune {uniprune.__version__}"


def test_masks_are_cut_without_transformers():
    """Importing it takes longer than the cut."""
    code = "import sys; import uniprune.entrypoints.mask; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("words", "meant"), [("prunee", "prune"), ("eval", "evaluate"), ("masks verfy", "verify")])
def test_a_misspelled_command_is_told_what_is_like_it(capsys, monkeypatch, words, meant):
    code, _, errors = run(capsys, monkeypatch, *words.split())
    assert code == 2
    assert errors.endswith(f"Did you mean {meant!r}?\n")


@pytest.mark.parametrize("words", ["", "prune", "masks", "masks verify"])
def test_h_is_help(capsys, monkeypatch, words):
    code, printed, _ = run(capsys, monkeypatch, *words.split(), "-h")
    assert code == 0
    assert printed == run(capsys, monkeypatch, *words.split(), "--help")[1]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("masks stats mas", "file,mas"),
        ("prune --config rec", "file,rec"),
        ("prune --text cor", "file,cor"),
        ("prune --scope m", "plain,matrix\nplain,model"),
        ("swe", "plain,sweep"),
    ],
)
def test_shells_complete_names_of_files_and_choices(typed, offered):
    words = ["uniprune", *typed.split()]
    asked = {"_UNIPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['uniprune']; from uniprune.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, check=True, capture_output=True, text=True)
    assert done.stdout == f"{offered}\n"


@pytest.mark.parametrize("words", [[], ["masks"]])
def test_a_command_is_missing(capsys, monkeypatch, words):
    code, printed, errors = run(capsys, monkeypatch, *words)
    assert (code, printed) == (2, "")
    assert errors.startswith(" ".join(["Usage: uniprune", *words]))
    assert "Commands:" in errors


def test_names_in_brackets_are_no_markup(capsys, monkeypatch, folder, tmp_path):
    model, out, archive = (tmp_path / name for name in ("model[red]", "[bold]:bug:[0]", "[v2].upz"))
    shutil.copytree(folder, model)
    small = ["--sparsity", "2:4", "--windows", 4, "--length", 32]
    for name, command in (
        (model.name, ["plan", model, *small]),
        (out.name, ["prune", model, *small, "-o", out]),
        (archive.name, ["pack", out, "-o", archive]),
    ):
        code, printed, _ = run(capsys, monkeypatch, *command)
        assert (code, name in "".join(printed.split())) == (0, True), printed  # a title may go on in the next line


def test_a_result_is_shown_in_any_encoding(monkeypatch, folder):
    """That of a redirected output is the locale's; a title or a token may have letters that it lacks."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["uniprune", "evaluate", str(folder), "--windows", "2", "--length", "32"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    stdout.flush()
    assert (stop.value.code, b"\\xb1 error" in stdout.buffer.getvalue()) == (0, True)


def test_a_narrow_terminal_cuts_no_names(capsys, monkeypatch, folder):
    monkeypatch.setenv("COLUMNS", "60")
    code, printed, _ = run(capsys, monkeypatch, "plan", folder, "--sparsity", "3:7", "--unsupported", "dense")
    assert (code, "…" in printed) == (0, False), printed
    names = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert all(f"{name}_proj" in names for name in ("q", "k", "v", "o", "gate", "up", "down"))


def test_all_verbs_speak_json(capsys, monkeypatch, folder, tmp_path):
    small = ["--windows", 4, "--length", 32]
    scores, masks, out = tmp_path / "s.safetensors", tmp_path / "m.safetensors", tmp_path / "out"
    for arguments in (
        ["plan", folder, "--sparsity", "2:4"],
        ["calibrate", folder, "--metric", "ria:a=0.5", *small, "-o", scores],
        ["mask", scores, "--sparsity", "0.6", "--scope", "model", "-o", masks],
        ["apply", folder, masks, "-o", out],
        ["prune", folder, "--sparsity", "2:4", *small, "-o", out, "--overwrite"],
        ["evaluate", out, *small],
    ):
        code, printed, errors = run(capsys, monkeypatch, *arguments, "--json")
        assert (code, errors) == (0, ""), arguments
        result = json.loads(printed)
        assert printed.count("\n") == 1
    assert result["perplexity"] > 1
    assert (result["windows"], result["length"], result["tokens"]) == (4, 32, 4 * 31)


def test_tables_for_people(capsys, monkeypatch, folder, tmp_path):
    code, printed, _ = run(capsys, monkeypatch, "plan", folder, "--sparsity", "2:5")
    assert code == 0
    assert "prune refuses" in printed.replace("\n", " ")
    code, printed, _ = run(
        capsys, monkeypatch, "prune", folder, "-s", "2:4", "--windows", 2, "--length", 32, "-o", tmp_path / "o"
    )
    assert code == 0
    assert "sparsity 0.5000 in 21 matrices" in printed.replace("\n", " ")
    assert "dense with zeros" in printed  # nobody is to find out later that it is no faster
    assert "On a CPU with" in printed


def test_the_recipe_of_a_report_is_a_recipe_file(capsys, monkeypatch, folder, tmp_path):
    """It says null where a setting has no value, as YAML files of people may."""
    again = ("prune", folder, "--config", tmp_path / "recipe.json", "--json", "-o")
    (tmp_path / "recipe.json").write_text(
        '{"sparsity": "2:4", "controller": "none", "windows": 4, "length": 32, "field": null}'
    )
    code, printed, _ = run(capsys, monkeypatch, *again, tmp_path / "first")
    assert code == 0
    recipe = json.loads((tmp_path / "first" / "pruning.json").read_text())["recipe"]
    assert recipe["scope"] is None
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    code, printed, _ = run(capsys, monkeypatch, *again, tmp_path / "second")
    assert code == 0
    assert json.loads(printed)["recipe"] == recipe


def test_recipe_files_and_flags_over_them(capsys, monkeypatch, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 2:4\nmetric: magnitude\nwindows: 4\nlength: 32\nexclude: [down_proj]\nsequential: true\n")
    command = ["prune", folder, "--config", recipe, "--metric", "wanda", "-o", tmp_path / "o", "--json"]
    code, printed, _ = run(capsys, monkeypatch, *command)
    assert code == 0
    used = json.loads(printed)["recipe"]
    assert used["sparsity"] == "2:4"  # and not the sexagesimal 124 that YAML 1.1 makes of it
    assert (used["metric"], used["windows"], used["exclude"], used["sequential"]) == ("wanda", 4, ["down_proj"], True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "MISSING", "-s", "2:4"], "missing/model"),
        (["prune", "FOLDER", "-s", "1.2"], "sparsity 1.2 is not between 0 and 1"),
        (["prune", "FOLDER", "-s", "4:2"], "4:2 is impossible"),
        (["prune", "FOLDER", "-s", "0:4"], "0:4 is impossible"),
        (["prune", "FOLDER", "-s", "2:5"], "not divisible by 5"),
        (["prune", "FOLDER", "-s", "2:4", "--metric", "wnada"], "metric 'wnada' is unknown"),
        (["prune", "FOLDER", "-s", "2:4", "--include", "nope"], "'nope' matches none"),
        (["prune", "FOLDER", "-s", "2:4", "--text", "EMPTY"], "is empty"),
        (["prune", "FOLDER", "-s", "2:4", "--text", "SHORT"], "less than one window"),
        (["prune", "FOLDER", "-s", "2:4", "--text", "nowhere.txt"], "'nowhere.txt' is neither"),
        (["prune", "FOLDER", "-s", "2:4", "--windows", "0"], "windows = 0"),
        (["prune", "FOLDER", "-s", "2:4", "--controller", "magic"], "controller = 'magic'"),
        (["prune", "FOLDER", "-s", "2:4", "--dtype", "int4"], "dtype = 'int4'"),
        (["prune", "FOLDER", "-s", "2:4", "--device", "abacus"], "device 'abacus'"),
        (["prune", "FOLDER", "-s", "2:4", "--scope", "row"], "scope 'row' does not go with 2:4"),
        (["prune", "FOLDER", "-s", "0.5", "--scope", "model", "--sequential"], "needs all scores"),
        (["prune", "FOLDER", "-s", "0.5", "--scope", "matrix", "--refine"], "0.5 by matrix has no budget by row"),
        (["prune", "FOLDER", "-s", "0.5", "--scope", "model", "--refine"], "0.5 by model has no budget by row"),
        (["prune", "FOLDER", "-s", "2:4", "--controller", "feedback", "--refine"], "--refine and --controller feedback"),
        (["prune", "FOLDER"], "no sparsity given"),
        (["prune", "FOLDER", "-s", "0.5", "--size", "1MB"], "drop --sparsity, or --size"),
        (["prune", "FOLDER", "--size", "9GB"], "out of reach"),
        (["prune", "FOLDER", "-s", "2:4", "--config", "RECIPE"], "sparsty"),
        (["prune", "NAN", "-s", "2:4"], "contain NaN"),
        (["evaluate", "FOLDER", "--text", "SHORT"], "less than one window"),
        (["evaluate", "FOLDER", "--tasks", "piqaa"], "task 'piqaa' is neither one of"),
        (["evaluate", "FOLDER", "--tasks", "RECIPE"], "line 1: not JSON"),
        (["evaluate", "FOLDER", "--limit", "5"], "give --tasks"),
        (["mask", "SHORT", "-s", "2:4"], "not a complete safetensors file"),
        (["mask", "FOLDER", "-s", "2:4"], "is a folder; give a file"),
        (["frobnicate"], "No such command"),
        (["prune", "FOLDER", "--wat"], "--wat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, monkeypatch, folder, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "recipe.yaml").write_text("sparsty: 0.5\n")
    names = {
        "FOLDER": folder,
        "MISSING": "missing/model/here",
        "EMPTY": tmp_path / "empty.txt",
        "SHORT": tmp_path / "short.txt",
        "RECIPE": tmp_path / "recipe.yaml",
        "NAN": tmp_path / "nan",
    }
    if "NAN" in arguments:
        model = tiny_model()
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        model.save_pretrained(tmp_path / "nan")
        for file in folder.glob("tokenizer*"):
            (tmp_path / "nan" / file.name).write_bytes(file.read_bytes())
    output = {"prune": ["-o", tmp_path / "out"], "mask": ["-o", tmp_path / "out.safetensors"]}.get(arguments[0], [])
    before = set(tmp_path.rglob("*"))
    code, printed, errors = run(capsys, monkeypatch, *[names.get(word, word) for word in arguments], *output)
    assert code == 2, errors
    assert printed == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert set(tmp_path.rglob("*")) == before


def test_existing_outputs_are_kept(capsys, monkeypatch, folder, tmp_path):
    out = tmp_path / "out"
    command = ["prune", folder, "-s", "2:4", "--windows", 2, "--length", 32, "-o", out]
    assert run(capsys, monkeypatch, *command)[0] == 0
    before = (out / "pruning.json").read_bytes()
    code, _, errors = run(capsys, monkeypatch, *command)
    assert code == 2
    assert "--overwrite" in errors
    assert (out / "pruning.json").read_bytes() == before
    assert run(capsys, monkeypatch, *command, "--overwrite")[0] == 0
    assert (out / "pruning.json").read_bytes() != before  # the timings differ


def test_a_full_disk_is_bad_input(capsys, monkeypatch, folder, tmp_path):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    command = ["prune", folder, "-s", "2:4", "--windows", 2, "--length", 32, "-o", tmp_path / "out"]
    code, _, errors = run(capsys, monkeypatch, *command)
    assert code == 2
    assert "of disk" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB"),
            "Tried to allocate 20.00 GiB",
        ),
        (MemoryError(), "out of memory"),
        (None, f"you tried to allocate {1 << 50} bytes"),  # what torch says of a CPU's
    ],
)
def test_memory_that_runs_out_is_said_in_a_line(capsys, monkeypatch, error, said):
    def fail(*_, **__):
        torch.empty(1 << 50, dtype=torch.uint8)
        raise AssertionError

    monkeypatch.setattr(main.app, "main", Mock(side_effect=error or fail))
    code, _, errors = run(capsys, monkeypatch, "plan")
    assert code == 1
    assert errors.startswith("error: out of memory (")
    assert said in errors
    assert errors.endswith("lower --length, --max-memory or the tokens of a step (--set batch_tokens=N)\n")


def test_progress_shows_the_speed_and_the_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    with Bars() as progress:
        for index in progress(range(4), "descending", 4):
            time.sleep(0.01)
            progress.note(f"KL {index}", 1000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    (speed,) = {found[1] for found in re.finditer(r"descending .* 4/4 0:00:00 KL 3, ([\d,]+) tokens/s", shown)}
    assert 0 < int(speed.replace(",", "")) <= 4000 / 0.04


def test_progress_says_nothing_where_nobody_looks(capsys):
    with Bars() as progress:
        assert list(progress(range(3), "descending", 3)) == [0, 1, 2]
        progress.note("KL 1", 1000)
    assert capsys.readouterr() == ("", "")


def test_masks_stats_shows_each_block(capsys, monkeypatch, folder, tmp_path):
    command = ["prune", folder, "-s", "2:4", "--controller", "none", "--windows", 2, "--length", 32, "-o", tmp_path / "out"]
    assert run(capsys, monkeypatch, *command)[0] == 0
    code, printed, _ = run(capsys, monkeypatch, "masks", "stats", tmp_path / "out" / "pruning" / "masks.safetensors")
    assert code == 0
    assert [line for line in printed.splitlines() if line.startswith("model.layers.")] == [
        f"model.layers.{block}: 50.0%, 0 empty rows, 0 empty columns" for block in range(3)
    ]
    assert "at_most.2:4: True" in printed
    assert "{" not in printed


@pytest.mark.parametrize("words", [["-s", "2:4"], ["--metric", "wanda", "--metric", "ria"], ["--controller", "none"] * 2])
def test_options_that_other_commands_take_several_of_are_refused_twice(capsys, monkeypatch, folder, words):
    """The last one counted, and a run was made of another sparsity than the first."""
    code, _, errors = run(capsys, monkeypatch, "plan", folder, "-s", "0.5", *words)
    assert code == 2
    assert "given 2 times, and takes one value" in errors
