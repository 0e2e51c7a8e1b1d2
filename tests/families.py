"""Families of models as tiny random ones of the real architecture, and what each goes through: the table in docs/models.md.

``make models`` writes the table; tests/test_families.py goes through every row anew and compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import uniprune
from uniprune import artefacts, shards, text
from uniprune.errors import UniPruneError
from uniprune.forecast import Plan
from uniprune.models import Origin

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: written by make models -->", "<!-- /table -->"
STEPS = ("plan", "local metric", "controller", "mask and apply", "reload", "N:M by key", "streamed")
VOCABULARY = 64
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {  # transformers' name of the family -> what its configuration needs beside SMALL; None: leaves that out
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "olmo2": {},
    "stablelm": {},
    "cohere": {},
    "granite": {},
    "smollm3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
}


def tiny(family: str, **changes: object) -> torch.nn.Module:
    """A random model of a family, float32, on which every step takes a blink."""
    torch.manual_seed(0)
    settings = {key: value for key, value in (SMALL | FAMILIES[family] | changes).items() if value is not None}
    config = AutoConfig.for_model(family, **settings)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config).eval().requires_grad_(False)


def walk(family: str, folder: Path) -> dict[str, str]:
    """What happened at each step: ``yes``, or why uniprune refused it. Anything else that goes wrong is raised."""
    model = tiny(family)
    source, tokens = folder / "model", folder / "tokens.safetensors"
    model.save_pretrained(source, max_shard_size="40KB")
    ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
    text.save_windows(text.Windows(ids, "random", 9, False), tokens)
    recipe = uniprune.Recipe(sparsity="2:4", text=str(tokens), controller="none")
    corrected = uniprune.Recipe(sparsity="2:4", text=str(tokens), tuning={"batch_tokens": 128})
    scores, masks, outputs = folder / "scores.safetensors", folder / "masks.safetensors", {}
    planned: list[Plan] = []

    def prune(step: str, *arguments: object, **options: object) -> None:
        outputs[step] = folder / step
        uniprune.prune(*arguments, outputs[step], **options)

    def mask_and_apply() -> None:
        uniprune.calibrate(source, recipe, scores)
        uniprune.mask(scores, "2:4", masks)
        uniprune.apply(source, masks, folder / "applied")
        assert same_files(folder / "applied", outputs["local metric"])

    def plan() -> None:
        planned.append(uniprune.plan(source, recipe))
        check_plan(planned[0], model)

    def streamed() -> None:
        most = planned[0].memory_streamed
        for step, settings in (("local metric", recipe), ("controller", corrected)):
            prune("streamed", source, settings, max_memory=most + 10**6, overwrite=True)
            assert same_files(outputs["streamed"], outputs[step])

    actions = [
        plan,
        lambda: prune("local metric", source, recipe),
        lambda: prune("controller", source, corrected),
        mask_and_apply,
        lambda: check_reload(outputs["controller"], ids),
        lambda: [check_pattern(source, outputs[step]) for step in ("local metric", "controller")],
        streamed,
    ]
    found: dict[str, str] = {}
    for step, action in zip(STEPS, actions, strict=True):
        try:
            action()
            found[step] = "yes"
        except UniPruneError as error:
            found[step] = str(error).replace(str(source), "M").replace(str(folder), "")
            if step == STEPS[0]:
                break
    return found


def check_plan(plan, model):
    """Everything in the blocks that is a matrix is planned, or shown as left dense."""
    assert plan.execution == "resident"
    assert plan.fits
    assert plan.parameters == sum(p.numel() for p in model.parameters())


def check_reload(folder, ids):
    """Plain transformers loads the output, misses nothing, and it computes."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert bool(torch.isfinite(model.eval()(ids[:1]).logits).all())


def check_pattern(source, output):
    """In the output's own files: each planned key has the 2:4 zeros and the kept bits of the source; the rest is the source's."""
    masks = artefacts.MasksFile(output / "pruning" / "masks.safetensors")
    before, after = tensors(source), tensors(output)
    assert before.keys() == after.keys()
    pruned = set()
    for name, mask in masks.items():
        key = shards.find_key(f"{name}.weight", before)
        keep = mask.T if name in masks.transposed else mask
        rows, columns = mask.shape
        assert bool((mask.reshape(rows, columns // 4, 4).sum(-1) == 2).all())
        assert torch.equal(after[key], torch.where(keep, before[key], 0))
        pruned.add(key)
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - pruned)


def tensors(folder):
    found = {}
    for file in Origin("", folder).shards:
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def same_files(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    return files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


# ------------------------------------------------------------------------------------------------------------ the table


def row(family: str, found: dict[str, str]) -> str:
    """A line of the table; why something was refused stands in its last column."""
    cells = ["refused" if found.get(step, "").strip() not in ("yes", "") else found.get(step, "") for step in STEPS]
    reasons = dict.fromkeys(reason for reason in found.values() if reason != "yes")
    return f"| {family} | {' | '.join(cells)} | {'; '.join(reasons).replace('|', '/')} |"


def rows() -> dict[str, str]:
    """The table as it is committed."""
    table = TABLE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {line.split("|")[1].strip(): line for line in re.findall(r"^\| \w+ \|.*$", table, re.MULTILINE)}


def main() -> None:
    lines = [f"| family | {' | '.join(STEPS)} | why |", f"| --- |{' :-: |' * len(STEPS)} --- |"]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(family, walk(family, Path(folder))))
    page = TABLE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    table = "\n".join(lines)
    TABLE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
