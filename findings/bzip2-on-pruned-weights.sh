#!/usr/bin/env bash
# zipnn 0.5.4 and zstandard 0.25.0: on bfloat16 weights, 90 % of them zero, bzip2 beats both; ZipNN's archive is twice as large
#   as bzip2's.
# Guess: what was made for bfloat16 weights wins, zstd at its highest level comes next, bzip2 last.
# Seen 2026-11-28, share of the size: dense ZipNN 0.66, bzip2 0.69, zstd 19 0.77; 90 % zeros ZipNN 0.18, zstd 19 0.11, bzip2
#   0.09.
source "$(dirname "$0")/environment"
packages torch==2.13.0 zipnn==0.5.4 zstandard==0.25.0 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import bz2

import torch
import zstandard
from zipnn import ZipNN

torch.manual_seed(0)
dense = torch.randn(1024, 1024) * 0.02
pruned = dense.masked_fill(dense.abs() < dense.abs().flatten().kthvalue(int(0.9 * dense.numel())).values, 0)
share = {}
for name, weight in {"dense": dense, "90 % zeros": pruned}.items():
    raw = weight.bfloat16().view(torch.uint8).numpy().tobytes()
    packed = {
        "bzip2": bz2.compress(raw),
        "zstd 19": zstandard.ZstdCompressor(level=19).compress(raw),
        "ZipNN": ZipNN(input_format="torch").compress(weight.bfloat16()),
    }
    share[name] = {by: round(len(archive) / len(raw), 3) for by, archive in packed.items()}
print(share)
assert share["dense"]["ZipNN"] < share["dense"]["bzip2"] < share["dense"]["zstd 19"]
assert share["90 % zeros"]["bzip2"] < share["90 % zeros"]["zstd 19"] < share["90 % zeros"]["ZipNN"]
PY
