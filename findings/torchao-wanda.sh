#!/usr/bin/env bash
# torchao 0.18.0: WandaSparsifier's score is |weight| times the *squared* norm of the input, compared over the whole layer: not
#   Wanda's masks.
# Guess: |weight| * norm, compared within each output, as in the paper that it names.
# Seen 2026-11-28: 10 % of the mask differs at 50 %, 12 % at 2:4; with the norm squared (and over the layer at 50 %) none does.
source "$(dirname "$0")/environment"
packages torch==2.13.0 torchao==0.18.0 numpy==2.4.6
check <<'PY'
import torch
from torchao.sparsity import WandaSparsifier

torch.manual_seed(0)
weight = torch.randn(128, 256)
inputs = torch.randn(512, 256) * torch.exp(0.7 * torch.randn(256))
norm = inputs.norm(dim=0)

def torchao(**settings):
    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    model[0].weight.data.copy_(weight)
    sparsifier = WandaSparsifier(sparsity_level=0.5, **settings)
    sparsifier.prepare(model, None)
    model(inputs)
    sparsifier.step()
    sparsifier.squash_mask()
    return model[0].weight != 0

def best_half(score, group):
    rows = score.reshape(-1, group)
    return torch.zeros_like(rows, dtype=torch.bool).scatter(1, rows.topk(group // 2).indices, True).view_as(score)

def differing(mask, other):
    return round(float((mask != other).float().mean()), 4)

half, two_four = torchao(), torchao(semi_structured_block_size=4)
paper, squared = weight.abs() * norm, weight.abs() * norm**2
seen = {
    "50 %, paper": differing(half, best_half(paper, 256)),
    "50 %, squared, over the layer": differing(half, best_half(squared, weight.numel())),
    "2:4, paper": differing(two_four, best_half(paper, 4)),
    "2:4, squared": differing(two_four, best_half(squared, 4)),
}
print("share of the mask that differs:", seen)
assert min(seen["50 %, paper"], seen["2:4, paper"]) > 0.05
assert seen["50 %, squared, over the layer"] == seen["2:4, squared"] == 0
PY
