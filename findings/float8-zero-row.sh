#!/usr/bin/env bash
# torchao 0.18.0 and optimum-quanto 0.2.7: a row that was pruned whole comes back as NaN from float8 quantisation; from int8 as
#   zeros.
# Guess: zero is the one number that every format holds; a scale of 0 is guarded against, as in the same libraries' int8.
# Seen 2026-11-28: Float8WeightOnlyConfig and qfloat8: every weight of the row is NaN; Int8WeightOnlyConfig, qint8: zeros.
source "$(dirname "$0")/environment"
packages torch==2.13.0 torchao==0.18.0 optimum-quanto==0.2.7 numpy==2.4.6
check <<'PY'
import torch
from optimum.quanto import freeze, qfloat8, qint8, quantize
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

def row(change):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    model[0].weight.data[5] = 0
    change(model)
    return float(model[0].weight.dequantize()[5].sum())

def quanto(kind):
    return lambda model: (quantize(model, weights=kind), freeze(model))

seen = {
    "torchao float8": row(lambda model: quantize_(model, Float8WeightOnlyConfig())),
    "torchao int8": row(lambda model: quantize_(model, Int8WeightOnlyConfig())),
    "quanto float8": row(quanto(qfloat8)),
    "quanto int8": row(quanto(qint8)),
}
print("a row of zeros sums to", seen)
assert all((value != value) == name.endswith("float8") for name, value in seen.items())
assert seen["torchao int8"] == seen["quanto int8"] == 0
PY
