"""Families of models as tiny random ones of the real architecture, and what each goes through: the table in docs/models.md.

``make models`` writes the table; tests/test_families.py goes through every row anew and compares.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import uniprune
from uniprune import artefacts, text
from uniprune.errors import UniPruneError
from uniprune.matrices import find_blocks
from uniprune.models import Origin

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: written by make models -->", "<!-- /table -->"
VOCABULARY = 64
EXCLUDED = {
    "mamba": "dt_proj",
    "falcon_mamba": "dt_proj",
    "jamba": "dt_proj",
}  # read past its layer's forward: see docs/models.md
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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WIDE = {"hidden_size": 64, "state_size": 4, "conv_kernel": 4, "expand": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
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
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        **EXPERTS,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": WIDE,
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 8, **WIDE},
    "falcon_mamba": WIDE,
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "use_mem_rope": False,
        "chunk_size": 8,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 8, **MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **MAMBA2,
    },
    "qwen3_next": {
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        **EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
    },
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
}


def tiny(family: str, **changes: object) -> torch.nn.Module:
    """A random model of a family, float32, on which every step takes a blink."""
    torch.manual_seed(0)
    settings = {key: value for key, value in (SMALL | FAMILIES[family] | changes).items() if value is not None}
    config = AutoConfig.for_model(family, **settings)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config).eval().requires_grad_(False)


class Walk:
    """One family through all steps; where uniprune refuses, a step raises UniPruneError, and else if something is wrong."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model, self.folder, self.source = tiny(family), folder, folder / "model"
        self.model.save_pretrained(self.source, max_shard_size="40KB")
        self.ids = torch.randint(0, VOCABULARY, (9, 32), generator=torch.Generator().manual_seed(0))
        text.save_windows(text.Windows(self.ids, "random", 9, False), folder / "tokens.safetensors")
        common = {"sparsity": "2:4", "text": str(folder / "tokens.safetensors"), "exclude": EXCLUDED.get(family, ())}
        self.recipes = {
            "local": uniprune.Recipe(controller="none", **common),
            "controller": uniprune.Recipe(tuning={"batch_tokens": 128}, **common),
        }
        self.outputs: dict[str, Path] = {}

    def plan(self) -> None:
        with mock.patch("uniprune.forecast._flops", return_value=1e9):  # how fast this machine is does not matter here
            check_plan(uniprune.plan(self.source, self.recipes["local"]), self.model)

    def prune(self, name: str) -> None:
        uniprune.prune(self.source, self.recipes[name], self.folder / name)
        self.outputs[name] = self.folder / name

    def mask_and_apply(self) -> None:
        scores, masks, applied = (self.folder / name for name in ("scores.safetensors", "masks.safetensors", "applied"))
        uniprune.calibrate(self.source, self.recipes["local"], scores)
        uniprune.mask(scores, "2:4", masks)
        uniprune.apply(self.source, masks, applied)
        assert same_files(applied, self.outputs["local"])

    def reload(self) -> None:
        for output in self.outputs.values():
            check_reload(output, self.ids)

    def by_key(self) -> None:
        for output in self.outputs.values():
            check_pattern(self.source, output)

    def streamed(self) -> None:
        for name, resident in self.outputs.items():
            with mock.patch("uniprune.job.choose", return_value="streamed"):  # models this small need no less memory that way
                uniprune.prune(self.source, self.recipes[name], self.folder / "streamed", overwrite=True)
            assert same_files(self.folder / "streamed", resident)


STEPS = {
    "plan": Walk.plan,
    "local metric": lambda walk: walk.prune("local"),
    "controller": lambda walk: walk.prune("controller"),
    "mask and apply": Walk.mask_and_apply,
    "reload": Walk.reload,
    "N:M by key": Walk.by_key,
    "streamed": Walk.streamed,
}


def walk(family: str, folder: Path) -> dict[str, str]:
    """What happened at each step: ``yes``, or why uniprune refused it. A family without a plan goes no further."""
    found: dict[str, str] = {}
    with mock.patch("os.fsync"):  # a thousand of them; whether files last is tested elsewhere
        walk = Walk(family, folder)
        for name, step in STEPS.items():
            try:
                step(walk)
                found[name] = "yes"
            except UniPruneError as error:
                found[name] = str(error).replace(str(walk.source), "M")
                if name == "plan":
                    break
    return found


def check_plan(plan, model):
    """Of the parameters in the blocks that have two dimensions or more, those neither planned nor shown as left are few."""
    assert plan.fits
    assert plan.execution == "resident"
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    blocks = find_blocks(model)[1]
    inside = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    assert plan.prunable == sum(rows * columns for rows, columns in plan.matrices.values())
    assert plan.prunable + sum(p.numel() for p in routers(blocks)) >= 0.9 * inside
    assert len(plan.left_dense) == len(routers(blocks))


def routers(blocks):
    """Written down by name here, to tell on what is found by structure."""
    return [p for name, p in blocks.named_parameters() if re.search(r"(gate|router)\.weight$", name) and p.dim() == 2]


def check_reload(folder, ids):
    """Plain transformers loads the output, misses nothing, and it computes."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert bool(torch.isfinite(model.eval()(ids[:1]).logits).all())


def check_pattern(source, output):
    """In the output's own files: under each key 2:4 zeros and the kept bits of the source; all else is the source's."""
    masks = artefacts.MasksFile(output / "pruning" / "masks.safetensors")
    before, after = tensors(source), tensors(output)
    assert before.keys() == after.keys()
    pruned = set()
    for name, mask in masks.items():
        key, dense = matrix_in(before, name)
        keep = mask.T if name in masks.transposed else mask
        rows, columns = mask.shape
        assert bool((mask.reshape(rows, columns // 4, 4).sum(-1) == 2).all())
        assert torch.equal(matrix_in(after, name)[1], torch.where(keep, dense, 0))
        pruned.add(key)
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - pruned)


def matrix_in(found, name):
    """The key that a matrix lies under, alone or as one of a stack of experts, and the matrix."""
    for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight"):
        if key in found:
            return key, found[key]
    stack, _, number = name.rpartition(".")
    key = stack if stack in found else f"{stack}.weight"
    return key, found[key][int(number)]


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
    cells = [found.get(step, "") if found.get(step, "yes") == "yes" else "refused" for step in STEPS]
    notes = [f"with `--exclude {EXCLUDED[family]}`"] if family in EXCLUDED else []
    notes += dict.fromkeys(reason for reason in found.values() if reason != "yes")
    return f"| {family} | {' | '.join(cells)} | {'; '.join(notes).replace('|', '/')} |"


def rows() -> dict[str, str]:
    """The table as it is committed."""
    table = TABLE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return {line.split("|")[1].strip(): line for line in lines}


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
