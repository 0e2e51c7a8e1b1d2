#!/usr/bin/env bash
# PyYAML 6.0.3: `sparsity: 2:4` in a recipe is the number 124, `1:4` is 64, `8:16` is 496; `0:4` and `8:128` are text.
# Guess: text, for a colon with no space after it makes no mapping and 2:4 is no number.
# Seen 2026-11-28: YAML 1.1 reads digits with colons as base 60, as long as each part but the first is under 60. Quote it.
source "$(dirname "$0")/environment"
packages PyYAML==6.0.3
check <<'PY'
import yaml

seen = {text: yaml.safe_load(f"sparsity: {text}")["sparsity"] for text in ("2:4", "1:4", "8:16", "0:4", "8:128", "'2:4'")}
print(seen)
assert seen == {"2:4": 124, "1:4": 64, "8:16": 496, "0:4": "0:4", "8:128": "8:128", "'2:4'": "2:4"}
PY
