"""Whether two versions of uniprune prune alike: the same masks and the same bytes, of the real model and of every tiny family.

    git worktree add ../before COMMIT
    python benchmarks/compare_installs.py ../before/src

What a change that should change nothing has to show. Each version runs in a process of its own, on one thread; what they differ
in is printed, and results/compare_installs.json has what was compared. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
TINY = {"2:4": {"sparsity": "2:4", "controller": "none"}, "feedback": {"sparsity": "2:4", "tuning": {"batch_tokens": 128}}}
REAL = {
    "wanda 2:4": {"sparsity": "2:4", "controller": "none"},
    "wanda 0.5 by row": {"sparsity": "0.5", "scope": "row", "controller": "none"},
    "sequential": {"sparsity": "2:4", "sequential": True},
    "feedback, 8,192 tokens": {"sparsity": "2:4", "budget_tokens": 8192},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path, help="The other version's src folder.")
    parser.add_argument("--families", action="store_true", help="Only the tiny families.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        run(ROOT / "src", "make", inputs, chosen.families)
        before, after = (run(source, "prune", inputs, chosen.families) for source in (chosen.before, ROOT / "src"))
    refused = sorted(name for name, found in before.items() if len(found) == 1 < len(after.get(name, ())))
    differing = sorted(name for name in before | after if before.get(name) != after.get(name) and name not in refused)
    for name in differing:
        print(f"{name}: {before.get(name)} -> {after.get(name)}")
    print(f"{len(after) - len(differing) - len(refused)} of {len(before | after)} runs give the same masks and the same bytes")
    if refused:
        print(f"{len(refused)} were refused, or failed, before: {', '.join(refused)}")
    if not chosen.families:
        from common import save

        save("compare_installs", {"runs": after, "differing": differing})
    sys.exit(bool(differing))


def run(source: Path, step: str, inputs: Path, families: bool) -> dict[str, Any]:
    """One step in the version whose ``src`` folder is given."""
    paths = os.pathsep.join(map(str, (source.resolve(), ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, HERE, "--step", step, str(inputs), *(["--families"] if families else [])]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------ in a process of its own


def make(inputs: Path, families: bool) -> dict[str, Any]:
    """Writes the models: both versions are to read the same files."""
    from small_models import FAMILIES, save

    for family in FAMILIES:
        save(family, inputs / family)
    if not families:
        from common import smollm2_folder

        smollm2_folder(inputs / "SmolLM2-135M")
    return {}


def prune(inputs: Path, families: bool) -> dict[str, Any]:
    """Name of a run -> its masks' hash and that of its weight files, or the error's kind."""
    return {name: outcome(*arguments) for name, *arguments in runs(inputs, families)}


def runs(inputs: Path, families: bool) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    from safetensors.torch import save_file
    from torch import Generator, int32, randint

    from small_models import EXCLUDED, FAMILIES, VOCABULARY

    ids = randint(0, VOCABULARY, (9, 32), generator=Generator().manual_seed(0)).to(int32)
    facts = json.dumps({"format": 1, "kind": "tokens", "source": "random", "available": 9, "bos": False})
    save_file({"tokens": ids}, inputs / "tokens.safetensors", {"uniprune": facts})
    for family in FAMILIES:
        for name, settings in TINY.items():
            more = {"text": str(inputs / "tokens.safetensors"), "exclude": EXCLUDED.get(family, ())}
            yield f"{family}: {name}", inputs / family, settings | more
    for name, settings in {} if families else REAL.items():
        yield f"SmolLM2-135M: {name}", inputs / "SmolLM2-135M", settings | {"windows": 16, "length": 512}


def outcome(source: Path, settings: dict[str, Any]) -> list[str]:
    import uniprune

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        try:
            report = uniprune.prune(str(source), uniprune.Recipe(**settings), output)
        except Exception as error:  # the version before may fail on what this one takes
            return [type(error).__name__]
        digest = hashlib.sha256()
        for file in sorted(output.glob("*.safetensors")):
            digest.update(file.name.encode() + file.read_bytes())
        masks = report["masks_sha256"] if isinstance(report, dict) else report.masks_sha256
        return [masks, digest.hexdigest()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        _, _, step, folder, *more = sys.argv
        print(json.dumps({"make": make, "prune": prune}[step](Path(folder), bool(more))))
    else:
        main()
