"""One pruning run by llm-compressor, in its own virtual environment; started by peer.py.

python peer_llmcompressor.py MODEL TOKENS SPARSITY MASK_STRUCTURE OUT
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, tokens_file, sparsity, structure, out = sys.argv[1:]
    tokens = load_file(tokens_file)["tokens"].tolist()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=WandaPruningModifier(
            sparsity=float(sparsity), mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"]
        ),
        num_calibration_samples=len(tokens),
        max_seq_length=len(tokens[0]),
        shuffle_calibration_samples=False,
        batch_size=4,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
