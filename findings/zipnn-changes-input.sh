#!/usr/bin/env bash
# zipnn 0.5.4: compress() overwrites what it compresses: a bytes object, which Python promises never to change, or a model's own
#   tensor.
# Guess: lossless compression reads its input. (The archive itself is right: decompress() gives the original.)
# Seen 2026-11-28: after compress() a bytearray, a bytes object and a bfloat16 tensor hold other values; a NumPy array is left
#   alone.
source "$(dirname "$0")/environment"
packages torch==2.13.0 zipnn==0.5.4 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import torch
from zipnn import ZipNN

torch.manual_seed(0)
tensor = torch.randn(512, 512).bfloat16()
original = tensor.clone()
raw = original.view(torch.uint8).numpy().tobytes()
copy = bytes(bytearray(raw))

packed = ZipNN(input_format="torch").compress(tensor)
unpacked = ZipNN(input_format="torch").decompress(packed)
ZipNN(input_format="byte", bytearray_dtype="bfloat16").compress(raw)
changed = {"tensor": float((tensor != original).float().mean()), "bytes": sum(a != b for a, b in zip(raw, copy)) / len(raw)}
print("share changed by compress():", changed, "unpacked right:", torch.equal(unpacked, original))
assert min(changed.values()) > 0.1 and torch.equal(unpacked, original)
PY
