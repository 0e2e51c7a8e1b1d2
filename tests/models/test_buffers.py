"""Blocks read from a checkpoint, against those of the model that transformers loads.

Of families that keep more than parameters in their files, as routers do that have a bias for every expert.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from small_models import EXPERTS, SMALL
from uniprune.checkpoints.origin import resolve
from uniprune.errors import InputError
from uniprune.models.matrices import find_blocks
from uniprune.models.replay.replay import Replay
from uniprune.models.residency.streaming import open_streamed

LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS}
FAMILIES = {  # with persistent buffers; what their configuration needs beside SMALL
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED,
    "glm4_moe_lite": ROUTED | LATENT,
    "axk1": ROUTED | LATENT,
    "hy_v3": ROUTED | {"num_local_experts": 4, "num_experts": 4},
    "exaone_moe": ROUTED | {"num_experts": 4},
    "mimo_v2_flash": ROUTED | {"num_experts": 4},
    "solar_open": ROUTED,
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_unified_text": {},
    "apertus": {},
}
CPU = torch.device("cpu")


def persistent(model):
    """The buffers that are saved, by name."""
    buffers, saved = dict(model.named_buffers()), model.state_dict()
    return {name: buffers[name] for name in buffers if name in saved}


def saved(family, folder):
    """A checkpoint whose buffers are not what a new model has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | FAMILIES[family])))
    buffers = persistent(model)
    assert buffers
    for buffer in buffers.values():
        buffer.add_(torch.rand(buffer.shape))
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_what_those_of_the_dense_model_compute(family, tmp_path):
    """Bit for bit, with the weights of the same files."""
    saved(family, folder := tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    loaded = open_streamed(resolve(folder), None, torch.float32, CPU)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = Replay.probed(dense, find_blocks(dense)[1], ids)
    ours = Replay.probed(loaded.model, find_blocks(loaded.model)[1], ids, loaded.residency)
    flow = theirs.enter(ids)
    assert torch.equal(ours.enter(ids).hidden, flow.hidden)
    for index in range(len(theirs)):
        with torch.no_grad(), ours.residency(index):
            expected = theirs.run(index, flow, ids)
            assert torch.equal(ours.run(index, flow, ids).hidden, expected.hidden), index
        flow = expected
    assert torch.equal(ours.leave(flow.hidden, ids), theirs.leave(flow.hidden, ids))


@pytest.mark.parametrize("family", ["deepseek_v3", "axk1"])
def test_a_file_without_them_is_refused_where_transformers_wants_them(family, tmp_path):
    saved(family, tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("e_score_correction_bias")}
    save_file(kept, file, {"format": "pt"})
    if family == "axk1":  # says that its files may lack them
        open_streamed(resolve(tmp_path), None, torch.float32, CPU)
    else:
        with pytest.raises(InputError, match=r"its files lack 1 tensors, e.g. .*e_score_correction_bias"):
            open_streamed(resolve(tmp_path), None, torch.float32, CPU)
