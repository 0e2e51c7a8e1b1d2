"""Every task against lm-evaluation-harness, row by row, on rows made up in its data set's format, few-shot included.

    pip install '.[lm-eval]' langdetect immutabledict nltk
    python benchmarks/tasks.py

Compared are the requests (contexts and continuations, to the letter), log-likelihoods and what is right, of a small random
model; answers that it writes; and judgements of texts that were written by hand. What the harness said is kept in
results/tasks.json, and tests hold the package to it where the harness is not installed. (zeroshot.py has a real model.)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import made_up_tasks as made_up
from common import save
from uniprune.data.text import read
from uniprune.evaluation.answers import Answers, answer, tokenise
from uniprune.tasks.loading import load_task

CONFIGS = {  # our formats -> the harness's own tasks
    "piqa": "piqa/piqa.yaml",
    "arc": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "race": "race/race.yaml",
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
SHOTS = (0, 5)
CONTEXT = 1024


def harness(model: HFLM, name: str, folder: Path, fewshot: int) -> list[dict[str, Any]]:
    """The harness's samples of its own task, which reads our rows; one for each row and filter, in order."""
    files = {path.stem: str(path) for path in sorted((folder / name).iterdir())}
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name]),
        "task": f"local_{name}_{fewshot}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    (folder / "task.yaml").write_text(json.dumps(settings))  # JSON is YAML
    manager = TaskManager(include_defaults=False)
    options = {"num_fewshot": fewshot, "task_manager": manager, "log_samples": True}
    found = lm_eval.simple_evaluate(model, tasks=[str(folder / "task.yaml")], **options)
    (samples,) = found["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


def compare(ours: Answers, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the two differ. Written answers have a sample for each filter."""
    theirs = [sample for sample in samples if sample["filter"] in ("none", "strict-match")]
    asked = [
        [list(arguments[: 1 if len(arguments) == 1 or isinstance(arguments[1], dict) else 2]) for arguments in one["arguments"]]
        for one in theirs
    ]
    mine = made_up.requests_of(ours.task)
    facts: dict[str, Any] = {
        "rows": len(theirs),
        "requests_that_differ": sum(a != b for a, b in zip(mine, asked, strict=True)),
        "requests_sha256": made_up.digest(asked),
    }
    if ours.scores:
        pairs = [
            (one.nats, float(other[0]), one.greedy, str(other[1]) == "True")
            for scores, sample in zip(ours.scores, theirs, strict=True)
            for one, other in zip(scores, sample["filtered_resps"], strict=True)
        ]
        facts["largest_difference_nats"] = max(abs(a - b) for a, b, _, _ in pairs)
        facts["greedy_that_differ"] = sum(a != b for _, _, a, b in pairs)
    if ours.written:
        facts["texts_that_differ"] = sum(a != b["resps"][0][0] for a, b in zip(ours.written, theirs, strict=True))
    right = {metric: (metric, "none") for metric in ours.right}
    if ours.judged:
        right = {"acc": ("exact_match", "strict-match"), "flexible": ("exact_match", "flexible-extract")}
    for metric, (name, filtered) in right.items():
        marks = ours.right[metric] if metric in ours.right else (ours.others or {})[metric]
        values = [bool(sample[name]) for sample in samples if sample["filter"] == filtered]
        facts[metric] = sum(values) / len(values)
        facts[f"{metric}_that_differ"] = sum(a != b for a, b in zip(marks, values, strict=True))
    return facts


def small_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, special_tokens=["<eos>", "<pad>"], show_progress=False
    )
    inner.train_from_iterator([read("builtin", "calibration")[:200_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def small_model(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model


def judged_numbers() -> list[list[bool]]:
    """What the harness's filters and exact match say of every pair of answers: strict, flexible."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / CONFIGS["gsm8k"]).read_text())
    metric = {k: v for k, v in config["metric_list"][0].items() if k.startswith(("ignore", "regexes"))}
    filters = []
    for one in config["filter_list"]:
        settings = {key: value for key, value in one["filter"][0].items() if key != "function"}
        filters.append(RegexFilter(**settings))
    found = []
    for expected in made_up.NUMBERS:
        for written in made_up.ANSWERS:
            texts = [next(iter(one.apply([[written]], [{}])))[0] for one in filters]
            found.append(
                [bool(exact_match_fn(predictions=[text], references=[expected], **metric)["exact_match"]) for text in texts]
            )
    return found


def judged_rules() -> list[list[bool]]:
    """What IFEval's own checks say of every rule and answer: strict, loose."""
    import nltk

    nltk.data.find = lambda *_, **__: ""  # its import looks for a sentence tokeniser, and would fetch it
    from lm_eval.tasks.ifeval.utils import process_results

    found = []
    for name, settings in made_up.RULES:
        row = {"key": 0, "prompt": "Say river.", "instruction_id_list": [name], "kwargs": [settings]}
        for written in made_up.WRITTEN:
            marks = process_results(row, [written])
            found.append([bool(marks["prompt_level_strict_acc"]), bool(marks["prompt_level_loose_acc"])])
    return found


def differing(theirs: list[list[bool]], ours: list[list[bool]]) -> dict[str, int]:
    return {"pairs": len(theirs), "differ": sum(a != b for a, b in zip(theirs, ours, strict=True))}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = small_tokenizer()
    model = small_model(tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=CONTEXT)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in CONFIGS:
            data = made_up.write(name, folder)
            for fewshot in SHOTS:
                task = load_task(str(data), fewshot=fewshot)
                (ours,) = answer(model, [task], [tokenise(task, tokenizer, CONTEXT)], tokenizer=tokenizer)
                facts = compare(ours, harness(theirs, name, folder, fewshot))
                rows.append({"task": name, "num_fewshot": fewshot, "cut": ours.cut, **facts})
                print(rows[-1], flush=True)
    numbers, rules = judged_numbers(), judged_rules()
    facts = {
        "lm_eval": lm_eval.__version__,
        "rows": rows,
        "judged": {"numbers": differing(numbers, made_up.our_numbers()), "rules": differing(rules, made_up.our_rules())},
        "numbers": made_up.bits(numbers),
        "rules": made_up.bits(rules),
    }
    print(facts["judged"])
    save("tasks", facts)


if __name__ == "__main__":
    main()
