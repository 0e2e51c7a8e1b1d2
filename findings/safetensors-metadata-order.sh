#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata, saved twice, are two different files.
# Guess: tensors are written in a fixed order, so metadata are too; equal input, equal bytes.
# Seen 2026-11-28: 5 saves in one process, 5 checksums: the keys of __metadata__ come in a new order each time. With one key
#   they agree.
source "$(dirname "$0")/environment"
packages torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
check <<'PY'
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

def checksums(metadata):
    found = set()
    for _ in range(5):
        save_file({"weight": torch.ones(4)}, "file.safetensors", metadata)
        found.add(hashlib.sha256(Path("file.safetensors").read_bytes()).hexdigest())
    return len(found)

one, six = checksums({"format": "pt"}), checksums({key: "x" for key in "abcdef"})
print(f"5 saves: {one} file with one key of metadata, {six} files with six keys")
assert one == 1 and six > 1
PY
