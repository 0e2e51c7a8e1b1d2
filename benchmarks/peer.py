"""Ours against llm-compressor's Wanda: same model, same calibration tokens, same evaluation, each in a process of its own.

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/peer.py PEER/bin/python

llm-compressor needs an older transformers than ours, hence the second environment. Each run loads the model from disk, prunes
it and saves it; wall time and peak memory are those of the whole process, as the operating system counts them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uniprune
from common import CALIBRATION, EVALUATION, relative, save, smollm2

TASKS = {"50% by row": ("0.5", "0:0"), "2:4": ("0.5", "2:4")}


def measured(command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read().decode()[-3000:]}")
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    peer = sys.argv[1]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        dense, tokens = work / "dense", work / "tokens.safetensors"
        recipe = uniprune.Recipe(sparsity="0", controller="none", text=str(CALIBRATION), windows=64, length=512)
        calibration = uniprune.prune(smollm2(), recipe, dense, save_tokens=tokens)["calibration"]
        for name, (sparsity, structure) in TASKS.items():
            ours = [sys.executable, "-m", "uniprune.cli", "prune", str(dense), "--controller", "none", "--metric", "wanda"]
            ours += ["--sparsity", sparsity if structure == "0:0" else structure, "--text", str(tokens), "-o"]
            theirs = [
                peer,
                str(Path(__file__).with_name("peer_llmcompressor.py")),
                str(dense),
                str(tokens),
                sparsity,
                structure,
            ]
            for system, command in {
                "uniprune": ours,
                "uniprune --sequential": [*ours[:-1], "--sequential", "-o"],
                "llm-compressor 0.14.0.1": theirs,
            }.items():
                out = work / f"{system}-{name}".replace(" ", "_")
                row = {"pattern": name, "system": system, **measured([*command, str(out)])}
                result = uniprune.evaluate(str(out), text_source=EVALUATION, windows=24, length=512)
                rows.append(row | {"perplexity": result["perplexity"], "sparsity": result["sparsity"]})
                print(rows[-1], flush=True)
    text = {"calibration": relative(CALIBRATION), "evaluation": relative(EVALUATION), "tokens": calibration["sha256"]}
    save("peer", {"protocol": "24 windows of 512, float32", "text": text, "rows": rows})


if __name__ == "__main__":
    main()
