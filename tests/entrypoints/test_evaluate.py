"""The command ``evaluate`` on tasks, end to end on a tiny model, and what it refuses."""

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import uniprune
from command import run
from conftest import tiny_model
from task_rows import ROWS
from uniprune import InputError, Loaded, MismatchError, Recipe
from uniprune.cli import tables
from uniprune.cli.terminal import console
from uniprune.evaluation import answers
from uniprune.evaluation.lm_eval import HarnessRun
from uniprune.evaluation.results import Evaluation
from uniprune.models.loading import dtype_name, fast_dtype
from uniprune.reporting import model_card
from uniprune.tasks.catalogue import SUITES

COMPUTED = dtype_name(fast_dtype(torch.bfloat16, torch.device("cpu")))


@pytest.fixture
def tasks(tmp_path):
    """Two task files of several rows."""
    paths = []
    for name in ("arc", "rte"):
        rows = [ROWS[name] | {field: f"{number} {ROWS[name][field]}"} for number in range(6) for field in list(ROWS[name])[1:2]]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path) for path in paths]


def test_accuracy_against_the_dense_model(folder, tasks, tmp_path):
    uniprune.prune(str(folder), Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "pruned")
    found = uniprune.evaluate(str(tmp_path / "pruned"), tasks=tasks, limit=4, against=str(folder))
    assert found.perplexity is None
    assert "perplexity" not in found.record()
    assert (found.against, found.dtype, found.sparsity) == (str(folder), COMPUTED, 0.5)
    dense = uniprune.evaluate(str(folder), tasks=tasks, limit=4)
    for name in tasks:
        ours, theirs = found.tasks[name], dense.tasks[name]
        assert ours.questions == 4
        assert ours.sha256 == theirs.sha256
        for metric, compared in ours.against.items():
            assert compared.reference == getattr(theirs, metric)
            assert getattr(ours, metric) - getattr(theirs, metric) == pytest.approx((compared.gained - compared.lost) / 4)
    assert list(found.tasks[tasks[0]].against) == ["acc", "acc_norm"]


def test_perplexity_and_accuracy_at_once(loaded, tasks):
    found = uniprune.evaluate(loaded, text_source="builtin", windows=2, length=32, tasks=tasks)
    assert found.perplexity > 1
    assert found.tasks.keys() == set(tasks)


def test_a_model_as_a_training_loop_leaves_it_has_no_dropout(tokenizer, tasks):
    """``Trainer`` leaves a model in training mode; it is in the same mode afterwards, module by module."""
    model = tiny_model("gpt2")  # dropouts of 0.1
    asked = {"text_source": "builtin", "windows": 2, "length": 32, "tasks": tasks, "limit": 4}
    wanted = uniprune.evaluate(Loaded(model, tokenizer), **asked)
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    found = uniprune.evaluate(Loaded(model, tokenizer), against=Loaded(model, tokenizer), **asked)
    assert found.perplexity == wanted.perplexity
    assert found.closeness.kl == 0
    assert {name: module.training for name, module in model.named_modules()} == modes
    report = uniprune.prune_in_place(
        Loaded(model, tokenizer), Recipe(sparsity="2:4", windows=2, length=32, controller="feedback")
    )
    assert report.sparsity == 0.5
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_file_of_questions_may_be_a_path(loaded, tasks):
    found = uniprune.evaluate(loaded, tasks=[Path(name) for name in tasks])
    assert found.tasks.keys() == set(tasks)
    assert uniprune.evaluate(loaded, tasks=Path(tasks[0])).protocol.request.tasks == (tasks[0],)


def test_a_model_in_memory_is_not_moved_or_converted(loaded):
    with pytest.raises(InputError, match=r"the model is in memory, torch\.float32 on cpu: convert it there"):
        uniprune.evaluate(loaded, text_source="builtin", windows=2, length=32, dtype="bfloat16")
    with pytest.raises(InputError, match="convert it there, or give its folder"):
        uniprune.prune_in_place(loaded, Recipe(sparsity="2:4", windows=2, length=32, dtype="float16"))


def test_small_contexts_have_shorter_prompts_of_the_texts_own(tokenizer):
    small = Loaded(tiny_model(max_position_embeddings=48), tokenizer)
    found = uniprune.evaluate(small, against=small, text_source="builtin", windows=3, length=32)
    assert len(found.generations) == 3
    with pytest.raises(InputError, match="do not fit the model's context of 48"):
        uniprune.evaluate(small, against=small, prompts=["to be"], new_tokens=48)


@pytest.mark.parametrize("target", ["rows.jsonl", "model/config.json", "model/pruning.json", "model/tasks.json"])
def test_no_result_takes_the_place_of_what_is_read(capsys, monkeypatch, folder, tasks, tmp_path, target):
    uniprune.prune(str(folder), Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "model")
    mine = tmp_path / "model" / "tasks.json"
    mine.write_text(Path(tasks[0]).read_text())
    output = (tmp_path / target).with_suffix(".json")
    (tmp_path / "rows.json").write_text(json.dumps([ROWS["arc"]]))
    before = output.read_text()
    words = ["evaluate", tmp_path / "model", "--tasks", f"{tmp_path / 'rows.json'},{mine}", "--overwrite"]
    code, _, errors = run(capsys, monkeypatch, *map(str, words), "-o", str(output))
    assert (code, output.read_text()) == (2, before)
    assert "the input" in errors


def test_a_result_may_lie_in_the_models_folder_and_be_replaced(capsys, monkeypatch, folder, tmp_path):
    uniprune.prune(str(folder), Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "model")
    words = ["evaluate", tmp_path / "model", "--windows", "2", "--length", "32", "-o", tmp_path / "model" / "e.json"]
    for more in ([], ["--overwrite"]):
        assert run(capsys, monkeypatch, *map(str, words), *more)[0] == 0


@pytest.mark.parametrize("text", ["", " ", ("builtin", "")])
def test_an_empty_text_is_nothing_to_read(loaded, text):
    with pytest.raises(InputError, match="no text was given, or an empty one"):
        uniprune.evaluate(loaded, text_source=text, windows=2, length=32)


@pytest.mark.parametrize("asked", [{"windows": 0}, {"length": 1}, {"stride": 0}, {"windows": -1, "rolling": True}])
def test_numbers_that_nothing_can_have(loaded, asked):
    with pytest.raises(InputError, match=next(iter(asked))):
        uniprune.evaluate(loaded, text_source="builtin", **asked)


def test_masks_are_measured_without_a_pruned_checkpoint(folder, tokenizer, tmp_path):
    recipe, out = Recipe(sparsity="2:4", windows=2, length=32, controller="none"), tmp_path / "pruned"
    uniprune.prune(str(folder), recipe, out)
    masks, asked = out / "pruning" / "masks.safetensors", {"windows": 2, "length": 32}
    pruned, found = uniprune.evaluate(str(out), **asked), uniprune.evaluate(str(folder), masks=masks, **asked)
    assert (found.model, found.masks, found.sparsity) == (str(folder), str(masks), 0.5)
    assert found.perplexity == pruned.perplexity
    assert found.protocol.weights_sha256 == pruned.protocol.weights_sha256
    found.write(tmp_path / "result.json")
    assert uniprune.check(tmp_path / "result.json").reproduced
    with pytest.raises(InputError, match=r"is of .*model with masks\.safetensors, not of"):
        model_card.rewrite(out, [tmp_path / "result.json"])
    loaded = uniprune.load(folder)  # a caller's own model is dense again afterwards
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    again = uniprune.evaluate(loaded, masks=masks, against=loaded, **asked)
    assert again.closeness.kl > 0
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.state_dict().items())
    other = tmp_path / "other"
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    loaded.model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(MismatchError, match=r"has other weights in model\.layers\.1\.mlp\.up_proj"):
        uniprune.evaluate(str(other), masks=masks, **asked)
    tiny_model(intermediate_size=48).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"narrow has no matrix \S+ of shape \(64, 32\)"):
        uniprune.evaluate(str(tmp_path / "narrow"), masks=masks, **asked)


def test_the_command_line_shows_tables(capsys, monkeypatch, folder, tasks):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["evaluate", folder, "--tasks", ",".join(tasks), "--limit", 3, "--against", folder]
    code, printed, errors = run(capsys, monkeypatch, *command)
    assert (code, errors) == (0, "")
    assert "acc_norm" in printed
    assert "gained" in printed
    assert f"against {folder}" in printed
    result = json.loads(run(capsys, monkeypatch, *command, "--json")[1])
    assert result["tasks"][tasks[1]]["against"]["acc"]["p"] == 1  # against itself


def test_text_and_names_of_others_are_shown_as_they_are():
    out = console(width=200, record=True, file=io.StringIO())
    texts = {"prompt": "[INST] a [/INST]", "model": "[/b]", "against": "[red]"}
    result = {"model": "m[/x]", "dtype": "float32", "sparsity": 0.5, "against": "n[/y]"}
    result |= {"tasks": {"../data/own.jsonl": {"questions": 2, "acc": 0.5}}}
    result |= {"generations": [texts | {"same_tokens": 0, "tokens": 1}]}
    for item in tables.evaluation_tables(Evaluation(**result)):
        out.print(item, highlight=False)
    shown = out.export_text()
    for text in ("[INST] a [/INST]", "[/b]", "[red]", "m[/x]", "n[/y]", " own "):
        assert text in shown
    assert "data" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 3}, "--limit is a number of questions; give --tasks, --suite or --lm-eval"),
        ({"num_fewshot": 3}, "--num-fewshot is for tasks; give --tasks"),
        ({"suite": "wandas"}, "suite 'wandas' is none of wanda, llm-pruner, roi, leap, slidesparse"),
        ({"against": "other/model"}, "does not exist here, nor in the Hub's cache"),
        ({"tasks": ["picqa"]}, "'picqa' is neither one of"),
    ],
)
def test_bad_requests(monkeypatch, folder, options, message):
    monkeypatch.setattr("uniprune.evaluation.model.load_weights", None)  # refused before any weight is loaded
    with pytest.raises(InputError, match=message):
        uniprune.evaluate(str(folder), **options)


def test_a_suite_is_the_tasks_of_a_published_table(monkeypatch, loaded, capsys):
    """Each with its own number of examples, unless one is given for all."""
    splits = []

    def load_dataset(path, split, name=None, **options):
        splits.append((path, name, split))
        form = {"allenai/ai2_arc": "arc", "cais/mmlu": "mmlu", "aps/super_glue": "boolq"}.get(path) or path.split("/")[1]
        field = {"winogrande": "sentence", "openbookqa": "question_stem", "hellaswag": "ctx_a", "piqa": "goal"}.get(
            form, "question"
        )
        return iter([ROWS[form] | {field: f"{number} {ROWS[form][field]}"} for number in range(6)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    loaded.model.config.max_position_embeddings = 1024
    found = uniprune.evaluate(loaded, suite="slidesparse", limit=2)
    assert found.suite == "slidesparse"
    assert {name: task.num_fewshot for name, task in found.tasks.items()} == dict.fromkeys(SUITES["slidesparse"].tasks, 0) | {
        "mmlu": 5
    }
    assert ("cais/mmlu", "all", "dev") in splits
    assert ("allenai/ai2_arc", "ARC-Easy", "train") not in splits
    assert set(found.capabilities) == {"knowledge", "reasoning", "language"}
    assert sorted(name for one in found.capabilities.values() for name in one.tasks) == sorted(SUITES["slidesparse"].tasks)
    found = uniprune.evaluate(loaded, suite="slidesparse", tasks=["piqa"], limit=1, num_fewshot=1)
    assert {task.num_fewshot for task in found.tasks.values()} == {1}
    assert len(found.tasks) == 8


def test_tasks_need_a_tokenizer(loaded, tasks):
    loaded.tokenizer = None
    for options in ({"tasks": tasks}, {"lm_eval": ["piqa"]}):
        with pytest.raises(InputError, match="has no tokenizer"):
            uniprune.evaluate(loaded, **options)


def test_each_model_has_its_own_answers_to_the_harness(monkeypatch, folder):
    runs = [
        HarnessRun({"t": {"acc": 0.5}}, {"t": {"acc": {3: True, 4: False}}}, ["a note"]),
        HarnessRun({"t": {"acc": 1.0}}, {"t": {"acc": {3: True, 4: True}}}, ["another"]),
    ]
    harness = types.SimpleNamespace(version="0", run=lambda loaded, request: runs.pop(0))
    monkeypatch.setattr(sys.modules[uniprune.evaluate.__module__], "Harness", lambda names: harness)
    found = uniprune.evaluate(str(folder), against=str(folder), lm_eval=["t"])
    assert (found.lm_eval, found.lm_eval_reference, found.lm_eval_notes) == (
        {"t": {"acc": 0.5}},
        {"t": {"acc": 1.0}},
        ["a note"],
    )
    assert found.lm_eval_against == {"t": {"acc": answers.compared([True, False], [True, True])}}


def test_the_harness_is_an_extra(monkeypatch, loaded):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install lm_eval"):
        uniprune.evaluate(loaded, lm_eval=["piqa"])
