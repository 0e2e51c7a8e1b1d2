"""Which experts to remove: a small mixture, trained here, without a quarter and a half of its experts by several criteria.

    python benchmarks/experts.py [--steps N] [--model FOLDER]

Rewrites results/experts.json and the table in docs/experts.md. The mixture is small (3 layers of 16 experts, 2 a token): no
real one fits a test machine. The figures compare criteria, and say nothing of what a large model loses. It is trained on C4 and
WikiText-2's validation text, calibrated on C4, and evaluated on WikiText-2's test text. --model: where the mixture is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import uniprune
from common import CALIBRATION, DATA, EVALUATION, RESULTS, ROOT, save
from uniprune.artefacts.reports import ExpertLayer
from uniprune.experts.criteria import best
from uniprune.experts.removal import prepared
from uniprune.job.options import RunOptions

EXPERTS, VOCABULARY, LENGTH, BATCH = 16, 257, 128, 16
FRACTIONS = (0.25, 0.5)
DRAWS = 3
CALIBRATED: dict[str, Any] = {"text": str(CALIBRATION), "windows": 128, "length": LENGTH}
METHODS: dict[str, dict[str, Any]] = {
    "REAP": {"metric": "reap"},
    "magnitude": {"metric": "magnitude", "controller": "none"},
    "Wanda": {"metric": "wanda", "controller": "none"},
    "ours (Wanda, controller)": {"metric": "wanda", "tuning": {"batch_tokens": 1024}},
}
DOCUMENT = ROOT / "docs" / "experts.md"
BEGIN, END = "<!-- table: written by benchmarks/experts.py -->\n", "<!-- /table -->"


def training_text() -> str:
    rows = [json.loads(line)["text"] for line in (DATA / "c4" / "c4_short.jsonl").read_text().splitlines()]
    return "\n\n".join([*rows, (DATA / "wikitext2" / "wiki.valid.raw").read_text()])


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes: so the output head is small, and the experts have much to do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<eos>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def train(folder: Path, steps: int) -> None:
    """Writes a trained mixture. Its router's auxiliary loss has experts used about alike, as in published ones."""
    words = tokenizer()
    ids = torch.tensor(words(training_text(), verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.06,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def measured(folder: Path, dense: Path) -> dict[str, float]:
    found = uniprune.evaluate(
        folder, against=dense, text_source=str(EVALUATION), windows=64, length=LENGTH, new_tokens=0, dtype="float32"
    )
    assert found.perplexity is not None
    assert found.closeness is not None
    return {"perplexity": found.perplexity, "kl": found.closeness.kl}


def chosen_otherwise(dense: Path, fraction: float, kept: dict[str, list[int]], output: Path) -> None:
    """Writes the model with these experts, which no metric chose."""
    run = prepared(dense, uniprune.Recipe(experts=fraction, metric="reap", **CALIBRATED), output, RunOptions())
    output.mkdir()
    run.write({name: ExpertLayer(kept=one, tokens=[], scores=[], reap=[]) for name, one in kept.items()}, output)


def rows(dense: Path, folder: Path, fraction: float) -> Iterator[dict[str, Any]]:
    """What each criterion leaves."""
    kept, tokens = round(EXPERTS * (1 - fraction)), dict[str, list[int]]()
    for name, settings in METHODS.items():
        output = folder / f"{name}-{fraction}"
        report = uniprune.prune(dense, uniprune.Recipe(experts=fraction, **settings, **CALIBRATED), output)
        tokens = {layer: one.tokens for layer, one in report.layers.items()}  # type: ignore[union-attr]
        yield {"method": name, "experts": kept, **measured(output, dense)}
    choices = {"most tokens": {layer: best(torch.tensor(counts).double(), kept) for layer, counts in tokens.items()}}
    generator = torch.Generator().manual_seed(0)
    for draw in range(DRAWS):
        choices[f"draw {draw}"] = {layer: best(torch.rand(EXPERTS, generator=generator).double(), kept) for layer in tokens}
    found = {}
    for name, choice in choices.items():
        chosen_otherwise(dense, fraction, choice, folder / f"{name}-{fraction}")
        found[name] = measured(folder / f"{name}-{fraction}", dense)
    yield {"method": "most tokens", "experts": kept, **found.pop("most tokens")}
    means = {key: fmean(one[key] for one in found.values()) for key in ("perplexity", "kl")}
    yield {"method": f"at random, mean of {DRAWS}", "experts": kept, **means}


def table(found: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["method"] for row in found if row["method"] != "dense"))
    counts = sorted({row["experts"] for row in found if row["method"] != "dense"}, reverse=True)
    by = {(row["method"], row["experts"]): row for row in found}
    lines = [
        "| experts kept | " + " | ".join(f"{count} of {EXPERTS}: perplexity | KL" for count in counts) + " |",
        "| --- | " + " | ".join(["---: | ---:"] * len(counts)) + " |",
        f"| all (perplexity {by['dense', EXPERTS]['perplexity']:.1f}) | " + " | ".join([" | "] * len(counts)) + " |",
    ]
    for name in names:
        cells = [f"{by[name, count]['perplexity']:.1f} | {by[name, count]['kl']:.3f}" for count in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense = asked.model or folder / "dense"
        if not dense.exists():
            train(dense, asked.steps)
        found = [{"method": "dense", "experts": EXPERTS, **measured(dense, dense)}]
        for fraction in FRACTIONS:
            for row in rows(dense, folder, fraction):
                print(row, flush=True)
                found.append(row)
    save("experts", {"steps": asked.steps, "rows": found})
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(json.loads((RESULTS / 'experts.json').read_text())['rows'])}\n{END}{after}")


if __name__ == "__main__":
    main()
