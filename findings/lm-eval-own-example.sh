#!/usr/bin/env bash
# lm-eval 0.4.13: with --num_fewshot, a task without a training split draws its examples from the rows that it asks, and does not
#   leave out the question itself (RACE, LAMBADA; WinoGrande and PIQA, which have training rows, do leave it out).
# Guess: a solved example is never the question that follows it.
# Seen 2026-11-28: of 4 rows and 2 examples, questions that have their own answer above them.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 lm-eval==0.4.13 numpy==2.4.6
check <<'PY'
import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Deaf(LM):
    """Answers nothing; the prompts are what is looked at."""

    def loglikelihood(self, requests, **_):
        return [(0.0, False)] * len(requests)

    loglikelihood_rolling = generate_until = loglikelihood


def own(split):
    """How many of the questions of a task stand among their own examples."""
    folder = Path(tempfile.mkdtemp())
    rows = [{"text": f"Number {n} comes after number {n - 1}"} for n in range(1, 5)]
    files = {name: str(folder / f"{name}.jsonl") for name in ("test", split)}
    for name in files.values():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lambada = Path(lm_eval.__file__).parent / "tasks" / "lambada" / "lambada_openai.yaml"
    settings = {"include": str(lambada), "task": "own", "tag": None, "dataset_path": "json", "dataset_name": None}
    settings["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    if split == "validation":  # its configuration as it would be, had the data set labelled rows for validation alone
        settings |= {"validation_split": "validation", "training_split": "validation", "test_split": None}
    (folder / "own.yaml").write_text(json.dumps(settings))
    found = lm_eval.simple_evaluate(
        Deaf(), tasks=[str(folder / "own.yaml")], num_fewshot=2, task_manager=TaskManager(include_defaults=False), log_samples=True
    )
    (samples,) = found["samples"].values()
    prompts = [(sample["doc"]["text"].rpartition(" comes")[0], sample["arguments"][0][0]) for sample in samples]
    return sum(prompt.count(f"{question} comes") > 1 for question, prompt in prompts)


asked, other = own("test"), own("validation")
print(f"examples from the asked split: {asked} of 4 questions have themselves above them; with a validation split alone: {other}")
assert asked > 0 and other == 0
PY
