"""Ours against llm-compressor's Wanda: same model, same calibration tokens, same evaluation, each in a process of its own.

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install llmcompressor==0.14.0.1
    python benchmarks/peer.py PEER/bin/python ["50% by row"] [2:4]

llm-compressor needs an older transformers than ours, hence the second environment. Each run loads the model from disk, prunes
it and saves it; wall time and peak memory are those of the whole process, as the operating system counts them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import CALIBRATION, EVALUATION, load, relative, save, smollm2

TASKS = {"50% by row": ("0.5", "0:0"), "2:4": ("0.5", "2:4")}
# A process inherits the peak of the one that starts it, so the measured ones are started by one that has done nothing.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
json.dump({"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "status": status}, open(sys.argv[1], "w"))
"""
UNIPRUNE = [sys.executable, "-m", "uniprune.cli.main"]


def measured(command: list[str], note: Path) -> dict[str, float]:
    """Wall seconds and peak resident bytes of a command."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, str(note), *command], capture_output=True, text=True, check=False
    )
    result: dict[str, float] = json.loads(note.read_text())
    if result.pop("status"):
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    return result


def verb(*arguments: str) -> dict[str, Any]:
    """The JSON that a verb prints."""
    done = subprocess.run([*UNIPRUNE, *arguments, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    peer, *wanted = sys.argv[1:]
    rows = {(row["pattern"], row["system"]): row for row in load("peer").get("rows", [])}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        dense, tokens = work / "dense", work / "tokens.safetensors"
        text = ["--text", str(CALIBRATION), "--windows", "64", "--length", "512", "--save-tokens", str(tokens)]
        nothing = ["--sparsity", "0", "--controller", "none", "--metric", "magnitude"]
        calibration = verb("prune", smollm2(), *nothing, *text, "-o", str(dense))["calibration"]
        for name in wanted or TASKS:
            sparsity, structure = TASKS[name]
            ours = [*UNIPRUNE, "prune", str(dense), "--controller", "none", "--metric", "wanda", "--text", str(tokens)]
            ours += ["--sparsity", sparsity if structure == "0:0" else structure, "-o"]
            script = Path(__file__).with_name("peer_llmcompressor.py")
            theirs = [peer, str(script), str(dense), str(tokens), sparsity, structure]
            for system, command in {
                "uniprune": ours,
                "uniprune --sequential": [*ours[:-1], "--sequential", "-o"],
                "llm-compressor 0.14.0.1": theirs,
            }.items():
                out = work / f"{system}-{name}".replace(" ", "_")
                cost = measured([*command, str(out)], work / "cost.json")
                found = verb("evaluate", str(out), "--text", str(EVALUATION), "--windows", "24", "--length", "512")
                row = {"pattern": name, "system": system, **cost}
                rows[name, system] = row | {"perplexity": found["perplexity"], "sparsity": found["sparsity"]}
                print(rows[name, system], flush=True)
                facts = {
                    "calibration": relative(CALIBRATION),
                    "evaluation": relative(EVALUATION),
                    "tokens": calibration["sha256"],
                }
                save("peer", {"protocol": "24 windows of 512, float32", "text": facts, "rows": list(rows.values())})


if __name__ == "__main__":
    main()
