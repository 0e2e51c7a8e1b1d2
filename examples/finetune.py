"""Prune to 2:4, then train the weights that are left: zeros stay zeros, and much of the quality comes back.

    python examples/finetune.py [MODEL] [FOLDER] [TEXT] [--lora]

This changes weights, which the pruner itself never does (docs/finetuning.md). Writes FOLDER/pruned and FOLDER/tuned; with
--lora (pip install peft) a LoRA adapter is trained instead of the weights, and merged into FOLDER/merged.
"""

import sys
from pathlib import Path

from transformers import PrinterCallback, Trainer, TrainingArguments

import uniprune
from uniprune.data.windows import load_windows

lora = "--lora" in sys.argv
given = [argument for argument in sys.argv[1:] if argument != "--lora"]
model, folder, text = [*given, *("HuggingFaceTB/SmolLM2-135M", "finetune", "builtin")[len(given) :]]
pruned, tuned = Path(folder) / "pruned", Path(folder) / ("merged" if lora else "tuned")

recipe = uniprune.Recipe(sparsity="2:4", text=text, windows=16, length=128, controller="none")
uniprune.prune(model, recipe, pruned, resume=True)  # if it is there already, it is taken
masks = pruned / "pruning" / "masks.safetensors"

loaded = uniprune.load(pruned, dtype="float32")
if lora:
    from peft import LoraConfig, get_peft_model

    layers = ["q_proj", "v_proj", "down_proj"]
    network = get_peft_model(loaded.model, LoraConfig(r=8, target_modules=layers, task_type="CAUSAL_LM"))
else:
    network = loaded.model.requires_grad_(True)

samples = load_windows(text, loaded.tokenizer, use="calibration", length=128, count=100).tokens
arguments = TrainingArguments(
    str(Path(folder) / "trainer"),
    max_steps=100,
    per_device_train_batch_size=1,
    learning_rate=1e-3 if lora else 1e-4,
    warmup_steps=10,
    dataloader_pin_memory=False,
    disable_tqdm=True,
    logging_strategy="no",
    save_strategy="no",
    report_to=[],
)
rows = [{"input_ids": row, "labels": row} for row in samples]
trainer = Trainer(network, arguments, train_dataset=rows, callbacks=[uniprune.KeepZeros(masks)])
trainer.remove_callback(PrinterCallback)
trainer.train()

(uniprune.merge_adapters(network, masks) if lora else network).save_pretrained(tuned)
loaded.tokenizer.save_pretrained(tuned)

for name in (model, pruned, tuned):
    found = uniprune.evaluate(name, text_source=text, windows=8, length=128)
    print(f"{Path(name).name}: perplexity {found.perplexity:.1f}, {found.sparsity:.1%} zeros")
