#!/usr/bin/env bash
# huggingface_hub 2.4.0: `allow_patterns="*.json"` downloads the JSON files of all folders.
# Guess: a pattern without a slash means the files at the top, as in a shell, or names anywhere, as in .gitignore; then "onnx/*" and
#   "*/x" are their opposites.
# Seen 2026-11-28: * matches slashes, so "*.safetensors" takes every copy in every folder, and "model*" takes model/readme.txt.
source "$(dirname "$0")/environment"
packages huggingface_hub==2.4.0
check <<'PY'
from huggingface_hub.utils import filter_repo_objects

files = ["model.safetensors", "fp32/model.safetensors", "model/readme.txt", "onnx/config.json", "config.json"]
found = {pattern: list(filter_repo_objects(files, allow_patterns=pattern)) for pattern in ("*.safetensors", "model*", "*.json")}
for pattern, names in found.items():
    print(pattern, names)
assert "fp32/model.safetensors" in found["*.safetensors"] and "model/readme.txt" in found["model*"]
assert list(filter_repo_objects(files, allow_patterns="*.json", ignore_patterns="*/*")) == ["config.json"]
PY
