#!/usr/bin/env bash
# lm-eval 0.4.13: a model whose every logit is NaN scores 100 % on multiple choice whose right answer comes first, as in
#   truthfulqa_mc1.
# Guess: an error, a warning, or an accuracy of 0.
# Seen 2026-11-28: accuracy 1.0 and no warning; argmax over NaN is the first choice. With the right answer spread over 4 places,
#   0.25.
source "$(dirname "$0")/environment"
packages torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 datasets==5.2.0 lm-eval==0.4.13 numpy==2.4.6
check <<'PY'
import json
from importlib.resources import files
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

plain = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["</s>", *"abcdef"])}, unk_token="</s>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="</s>")
model = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)).eval()
model.lm_head.weight.data.fill_(float("nan"))
for task in ("first", "spread"):
    rows = [{"q": "a b", "choices": [" c", " d", " e", " f"], "gold": i % 4 if task == "spread" else 0} for i in range(40)]
    Path(f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    description = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(f"{task}.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    Path(f"{task}.yaml").write_text(json.dumps(description))
lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
results = lm_eval.simple_evaluate(lm, tasks=["first", "spread"], task_manager=TaskManager(include_path="."), bootstrap_iters=0)["results"]
seen = {task: results[task]["acc,none"] for task in ("first", "spread")}
truthful = (files("lm_eval") / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text()
print("accuracy:", seen, "truthfulqa_mc1 has", *(line for line in truthful.splitlines() if line.startswith("doc_to_target")))
assert seen == {"first": 1.0, "spread": 0.25} and "doc_to_target: 0" in truthful
PY
