"""Which of PEFT's adapters keep the zeros of a pruned model when they are merged, and what keeping them costs.

    python benchmarks/adapters.py [LORA ...]

A small Llama of random weights, pruned to 2:4, is trained a few steps with each of PEFT's tuners, then merged:

- `zeros`: the share of the zeros that are left after PEFT's own merge_and_unload; `kept`: after uniprune.merge_adapters.
- `lost`: how far uniprune.merge_adapters moves the logits, over how far training had moved them: that part was learned for
  nothing. `lost_masked`: the same of an adapter that was trained with uniprune.KeepZeros.

The model is small, since where an adapter adds counts, not what it learned. Takes a minute.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, get_peft_model
from peft import __version__ as peft_version
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import uniprune
from common import save
from uniprune.errors import first_line
from uniprune.models import masking
from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.spelling import parse

STEPS, RATE = 20, 1e-2
TOKENS = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def of_kept_weights(layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """For SHiRA: as many weights as LoRA of this rank has, the first that are not zero."""
    weight = layer.weight
    chosen = torch.zeros(weight.numel())
    chosen[weight.flatten().nonzero()[: r * sum(weight.shape), 0]] = 1
    return chosen.view_as(weight)


class Variant(NamedTuple):
    tuner: PeftType
    settings: dict[str, Any]


SETTINGS: dict[PeftType, dict[str, Any]] = {  # what a tuner cannot do without on a model this small
    PeftType.ADALORA: {"total_step": STEPS},
    PeftType.C3A: {"block_size": 32},
    PeftType.IA3: {"feedforward_modules": ["down_proj"]},
    PeftType.LN_TUNING: {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    PeftType.TRAINABLE_TOKENS: {"token_indices": [*range(64)], "target_modules": ["embed_tokens"]},
    PeftType.VBLORA: {"vector_length": 32},
}
VARIANTS = {
    "LoRA, rank-stabilised": Variant(PeftType.LORA, {"use_rslora": True}),
    "LoRA, DoRA": Variant(PeftType.LORA, {"use_dora": True}),
    "LoRA, PiSSA": Variant(PeftType.LORA, {"init_lora_weights": "pissa"}),
    "SHiRA, a mask of kept weights": Variant(PeftType.SHIRA, {"mask_type": "custom", "r": 4}),
}


def variants() -> dict[str, Variant]:
    """Each tuner as it comes, then some of their settings."""
    plain = {config.__name__.removesuffix("Config"): Variant(kind, {}) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {
        name: variant
        for name, variant in (plain | VARIANTS).items()
        if hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(variant.tuner), "merge_and_unload")
    }


def pruned() -> tuple[Any, dict[str, Tensor]]:
    """A model, 2:4, and its masks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    matrices = find_matrices(model)
    masks = dict(parse("2:4")({name: matrix.weight.abs() for name, matrix in matrices.items()}))
    with torch.no_grad():
        masking.apply(matrices, masks.items())
    return model, masks


def adapted(model: nn.Module, variant: Variant) -> Any:
    torch.manual_seed(0)
    settings = {"target_modules": LAYERS, **SETTINGS.get(variant.tuner, {}), **variant.settings}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[variant.tuner](task_type="CAUSAL_LM", **settings)
    if settings.get("mask_type") == "custom":
        config.mask_fn = of_kept_weights
    return get_peft_model(model, config)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS[:4]).logits
    return found


def train(model: Any, *callbacks: TrainerCallback) -> Tensor:
    """Trains in place; returns the logits at the end."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=RATE,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=[*callbacks])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return logits(model)


def zeros(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """The share of the removed weights that are zero."""
    matrices = find_matrices(model)
    left = sum(int((matrices[name].weight[~mask] == 0).sum()) for name, mask in masks.items())
    return left / sum(int((~mask).sum()) for mask in masks.values())


def measured(variant: Variant) -> dict[str, float]:
    model, masks = pruned()
    start = logits(model)

    def moved(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm())

    def trained(*callbacks: TrainerCallback) -> tuple[Any, Tensor]:
        one = adapted(copy.deepcopy(model), variant)
        return one, train(one, *callbacks)

    one, end = trained()
    row = {"moved": moved(end, start) / float(start.norm()), "zeros": zeros(one.merge_and_unload(), masks)}
    one, end = trained()
    merged = uniprune.merge_adapters(one, masks)
    row |= {"kept": zeros(merged, masks), "lost": moved(logits(merged), end) / moved(end, start)}
    one, end = trained(uniprune.KeepZeros(masks))
    merged = uniprune.merge_adapters(one, masks)
    return row | {"kept_masked": zeros(merged, masks), "lost_masked": moved(logits(merged), end) / moved(end, start)}


def tried(work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:  # of other people's adapters, any: the row says which
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    warnings.simplefilter("ignore")
    rows = []
    for name, variant in variants().items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        rows.append({"adapter": name, **tried(lambda variant=variant: measured(variant))})
        print(rows[-1], flush=True)
    if len(sys.argv) == 1:
        save("adapters", {"peft": peft_version, "steps": STEPS, "learning_rate": RATE, "rows": rows})


if __name__ == "__main__":
    main()
