"""Which experts to remove: a small mixture, trained here, without a quarter and a half of its experts by several criteria.

    python benchmarks/experts.py            # about ten minutes on a core; rewrites benchmarks/results/experts.json and docs/experts.md

The mixture is small (4 layers of 16 experts, 2 a token), since no real one fits a test machine: the figures compare criteria, and say
nothing of what a large model loses. It is trained on C4 and WikiText-2's validation text, calibrated on C4 and evaluated on WikiText-2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import uniprune
from common import CALIBRATION, DATA, EVALUATION, RESULTS, ROOT
from uniprune.common.provenance import versions
from uniprune.experts.criteria import best
from uniprune.models.loading import Loaded

LENGTH, BATCH = 128, 16
FRACTIONS = (0.25, 0.5)
CALIBRATED = {"text": str(CALIBRATION), "windows": 128, "length": LENGTH}
METHODS = {
    "REAP": {"metric": "reap"},
    "magnitude": {"metric": "magnitude", "controller": "none"},
    "Wanda": {"metric": "wanda", "controller": "none"},
    "ours (controller)": {"metric": "wanda", "tuning": {"batch_tokens": 1024}},
}
BEGIN, END = "<!-- table: written by benchmarks/experts.py -->", "<!-- /table -->"


def training_text() -> str:
    rows = [json.loads(line)["text"] for line in (DATA / "c4" / "c4_short.jsonl").read_text().splitlines()]
    return "\n\n".join([*rows, (DATA / "wikitext2" / "wiki.valid.raw").read_text()])


def tokenizer(text: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def train(folder: Path, steps: int) -> float:
    """Writes a trained mixture; returns its last loss."""
    text = training_text()
    words = tokenizer(text)
    ids = torch.tensor(words(text, verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=16, num_experts_per_tok=2, max_position_embeddings=512,
        router_aux_loss_coef=0.01, output_router_logits=True, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    loss = torch.tensor(0.0)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return float(loss)


def measured(folder: Path, dense: Path) -> dict[str, float]:
    found = uniprune.evaluate(folder, against=dense, text_source=str(EVALUATION), windows=64, length=LENGTH, new_tokens=0)
    return {"perplexity": found.perplexity, "kl": found.closeness.kl}


def without(dense: Path, kept: dict[str, list[int]], output: Path) -> None:
    """The checkpoint with these experts, chosen by something that is no metric."""
    from uniprune.experts.removal import prepared
    from uniprune.job.options import RunOptions

    fraction = 1 - len(next(iter(kept.values()))) / 16
    recipe = uniprune.Recipe(experts=fraction, metric="reap", **CALIBRATED)
    run = prepared(dense, recipe, output, RunOptions())
    output.mkdir()
    run.write({name: uniprune_layer(numbers) for name, numbers in kept.items()}, output)


def uniprune_layer(numbers: list[int]):
    from uniprune.artefacts.reports import ExpertLayer

    return ExpertLayer(kept=numbers, tokens=[], scores=[], reap=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", type=Path, help="a mixture that was trained before")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, began = asked.model or folder / "dense", time.perf_counter()
        loss = None if dense.exists() else train(dense, asked.steps)
        rows = [{"method": "dense", "experts": 16, **measured(dense, dense)}]
        print(rows[-1], flush=True)
        for fraction in FRACTIONS:
            kept = round(16 * (1 - fraction))
            for name, settings in METHODS.items():
                output = folder / f"{name}-{fraction}"
                report = uniprune.prune(dense, uniprune.Recipe(experts=fraction, **settings, **CALIBRATED), output)
                rows.append({"method": name, "experts": kept, **measured(output, dense)})
                print(rows[-1], flush=True)
            often = {layer: best(torch.tensor(one.tokens, dtype=torch.float64), kept) for layer, one in report.layers.items()}
            drawn = [
                {layer: best(torch.rand(16, generator=torch.Generator().manual_seed(10 * seed + index)), kept) for index, layer in enumerate(often)}
                for seed in range(3)
            ]
            for name, choice in [("most often chosen", often), *((f"at random {seed}", one) for seed, one in enumerate(drawn))]:
                output = folder / f"{name}-{fraction}"
                without(dense, choice, output)
                rows.append({"method": name, "experts": kept, **measured(output, dense)})
                print(rows[-1], flush=True)
        print(time.perf_counter() - began)
        print(json.dumps({"rows": rows, "loss": loss, "steps": asked.steps, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
