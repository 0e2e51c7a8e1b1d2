"""Against lm-evaluation-harness itself, where it is installed: prompts of every format, scores and accuracies row by row."""

import json
from pathlib import Path

import pytest

import uniprune
from command import run
from conftest import tiny_model
from task_rows import ROWS
from uniprune import InputError
from uniprune.data.tasks import load_task
from uniprune.evaluation.zero_shot import answer, tokenise

lm_eval = pytest.importorskip("lm_eval")

CONFIGS = {
    "piqa": "piqa/piqa.yaml",
    "arc": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
FIRST = {"question_stem", "question", "goal", "ctx_a", "sentence", "sentence1", "text"}  # where a row can be made longer


@pytest.fixture
def local(tmp_path):
    """Writes rows, and a task of the harness that is its own of that format, but reads them; both paths."""

    def write(name, rows):
        data, config = tmp_path / f"{name}.jsonl", tmp_path / f"local_{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name]),
            "task": f"local_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        config.write_text(json.dumps(settings))  # JSON is YAML
        return str(data), str(config)

    return write


@pytest.mark.parametrize("name", CONFIGS)
def test_native_scores_are_those_of_the_harness(local, tokenizer, name):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    field = next(iter(ROWS[name].keys() & FIRST))
    data, config = local(name, [ROWS[name] | {field: "So " * number + ROWS[name][field]} for number in range(5)])
    model, task = tiny_model(), load_task(data)
    (ours,) = answer(model, [task], [tokenise(task, tokenizer, 128)])
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = lm_eval.simple_evaluate(harness, tasks=[config], task_manager=TaskManager(include_defaults=False), log_samples=True)
    (samples,) = found["samples"].values()
    samples.sort(key=lambda sample: sample["doc_id"])
    assert len(samples) == 5
    for row, sample in enumerate(samples):
        assert task.questions[row].choices == tuple(tuple(argument[:2]) for argument in sample["arguments"])
        for mine, theirs in zip(ours.scores[row], sample["filtered_resps"], strict=True):
            assert mine.nats == pytest.approx(float(theirs[0]), abs=1e-4)
            assert str(mine.greedy) == str(theirs[1])
        assert {metric: float(right[row]) for metric, right in ours.right.items()} == {
            metric: float(sample[metric]) for metric in ours.right
        }
    (values,) = found["results"].values()
    record = ours.result()
    assert record.acc_stderr == pytest.approx(float(values["acc_stderr,none"]))
    assert (record.acc_norm is not None) == ("acc_norm,none" in values)


def test_the_verb_runs_the_harness(capsys, monkeypatch, folder, local):
    data, config = local("arc", [ROWS["arc"]] * 3)
    command = ["evaluate", folder, "--tasks", data, "--lm-eval", config, "--limit", 2]
    code, printed, _ = run(capsys, monkeypatch, *command, "--json")  # the harness shows bars on stderr
    assert code == 0
    found = json.loads(printed)
    assert found["lm_eval"]["local_arc"]["acc"] == found["tasks"][data]["acc"]
    assert found["versions"]["lm_eval"]


def test_unknown_tasks_are_refused(loaded):
    with pytest.raises(InputError, match="--lm-eval no_such_task: a task cannot be loaded"):
        uniprune.evaluate(loaded, lm_eval=["no_such_task"])
