"""Every type of model that transformers has a causal class or one of images and text for; writes results/families.json.

python benchmarks/every_type.py plan [TYPE ...]    `plan` on its default configuration, files of that size without content
python benchmarks/every_type.py walk [TYPE ...]    a tiny random model through every step of tests/families.py

Either keeps what the file has of other types, and writes the table of docs/families.md from all of it.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

import uniprune
from common import ROOT, load, save
from uniprune.checkpoints.layout import as_saved
from uniprune.errors import UniPruneError

sys.path.insert(0, str(ROOT / "tests"))

import catalogue
import families

PAGE = ROOT / "docs" / "families.md"
SHARD = 1 << 40  # bytes
LONGEST = 160  # characters of a reason in the table


def empty_checkpoint(config: PretrainedConfig, folder: Path) -> None:
    """A checkpoint as transformers would save it, in bfloat16, whose tensors are holes in its files: it takes no room."""
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = kind.from_config(config)
    shapes, _ = as_saved(model)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if end + size > SHARD:
            shards, end = [*shards, {}], 0
        shards[-1][key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, header in zip(names, shards, strict=True):
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(item["data_offsets"][1] for item in header.values()))
    index = {"weight_map": {key: name for name, header in zip(names, shards, strict=True) for key in header}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def plan(kind: str, folder: Path) -> dict[str, Any]:
    """What ``plan`` says of a type's default configuration."""
    began = time.process_time()
    try:
        config = AutoConfig.for_model(kind)
        if not config.is_encoder_decoder:
            empty_checkpoint(config, folder)
        else:
            config.save_pretrained(folder)
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    except Exception as error:
        if not (folder / "config.json").exists():  # transformers itself cannot make it: the reason is the row
            return {"made": reason(error)}
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")  # what is said of its configuration
    made = time.process_time()
    try:
        found = uniprune.plan(folder, uniprune.Recipe(sparsity="2:4"), max_memory=1 << 50)
    except UniPruneError as error:
        return {"refused": str(error).replace(str(folder), "M")}
    left = Counter(why for why in found.left_dense.values())
    return {
        "parameters": found.parameters,
        "prunable": found.prunable,
        "matrices": len(found.matrices),
        "left": dict(left.most_common(5)),
        "seconds": [round(made - began, 2), round(time.process_time() - made, 2)],
    }


def walk(kind: str, folder: Path) -> dict[str, str]:
    """What a tiny model of a type does at each step."""
    try:
        config = catalogue.small(kind)
        if config.is_encoder_decoder:
            return {"made": "an encoder-decoder"}
        saved = catalogue.saved(kind, folder)
    except Exception as error:
        return {"made": reason(error)}
    return families.steps(families.Walk(*saved, folder))


class Counts(NamedTuple):
    """How many types can be pruned, how many were made small, and how many of those go through every step."""

    planned: int
    tried: int
    whole: int

    @classmethod
    def of(cls, known: dict[str, dict[str, Any]]) -> Counts:
        walks = known["walk"].values()
        return cls(
            planned=sum("matrices" in row for row in known["plan"].values()),
            tried=sum("made" not in row for row in walks),
            whole=sum(all(row.get(step) == "yes" for step in families.STEPS) for row in walks),
        )


def page(known: dict[str, dict[str, Any]]) -> str:
    """docs/families.md: a line for each type."""
    plans, walks = known["plan"], known["walk"]
    planned, tried, whole = Counts.of(known)
    return "\n".join(
        [
            "# Every type of transformers",
            "",
            f"All {len(plans)} types that transformers {known['versions']['transformers']} has a causal class or one of",
            "images and text for; written by `python benchmarks/every_type.py` from benchmarks/results/families.json.",
            "",
            "- `plan`, with the controller, on the default configuration, by files of that size without content:",
            f"  {planned} can be pruned, the others are refused with the reason; some transformers itself cannot make.",
            "- A tiny random model of each that transformers can make here, through the steps of [models.md](models.md):",
            f"  {whole} of {tried} go through all (yes); of others the steps that do not are named, with the reason.",
            "",
            "| type | parameters | prunable | matrices | tiny model | why not, and what stays dense |",
            "| --- | ---: | ---: | ---: | --- | --- |",
            *(_row(kind, plans.get(kind, {}), walks.get(kind, {})) for kind in sorted(plans.keys() | walks.keys())),
            "",
        ]
    )


def _row(kind: str, planned: dict[str, Any], walked: dict[str, str]) -> str:
    sizes = [f"{planned[name] / 1e9:.2f} B" if name in planned else "" for name in ("parameters", "prunable")]
    failed = [step for step in families.STEPS if walked.get(step, "yes") != "yes"]
    steps = ", ".join(failed) or ("yes" if families.STEPS.keys() <= walked.keys() else "")
    reasons = [planned.get(name) for name in ("made", "refused", "crash")] + [walked.get("made"), walked.get("crash")]
    reasons += [walked[step] for step in failed]
    reasons += [f"{count} x {why}" for why, count in planned.get("left", {}).items()]
    why = "; ".join(dict.fromkeys(" ".join(reason.split()).replace("|", "/")[:LONGEST] for reason in reasons if reason))
    return f"| {kind} | {sizes[0]} | {sizes[1]} | {planned.get('matrices', '')} | {steps} | {why} |"


def _frames(error: Exception) -> list[str]:
    """The last lines that an error came through, by the names of their files."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


def main(command: str, wanted: list[str]) -> None:
    warnings.filterwarnings("ignore")
    for kind in wanted or catalogue.TYPES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = {"plan": plan, "walk": walk}[command](kind, Path(folder))
            except Exception as error:
                row = {"crash": f"{type(error).__name__}: {error}"[:300], "where": _frames(error)}
        print(kind, row, flush=True)
        known = {name: load("families").get(name, {}) for name in ("plan", "walk")}
        known[command] = dict(sorted((known[command] | {kind: row}).items()))
        save("families", known)
    PAGE.write_text(page(load("families")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
