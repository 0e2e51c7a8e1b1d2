"""Masks exchanged with other tools, both ways, by their own code: SmolLM2 in float16 at 2:4.

    python -m venv OLD && OLD/bin/pip install torch==2.13.0 transformers==4.57.6 compressed-tensors==0.14.0 datasets==3.6.0
    python -m venv NEW && NEW/bin/pip install torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0
    NEW/bin/pip install nvidia-modelopt==0.47.0
    python benchmarks/peer_masks.py OLD/bin/python NEW/bin/python MASKLLM PATCH [TOOL ...]

MASKLLM: a checkout of github.com/NVlabs/MaskLLM at 50e50de8dc83; PATCH: scripts/release of github.com/Paramathic/patch at
809219719df3. compressed-tensors 0.14 is the last that compresses sparse models; the helpers for bitmasks are in the newest.

For each tool: masks that it wrote are imported, and compared bit by bit with what it holds them to be; masks of ours are
exported and applied by it. Both times the model that it makes of the dense one is compared with what `uniprune apply` makes,
weight by weight (-0.0 is 0). Then what was imported is exported and imported again: the same bytes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import uniprune
from common import load, save, smollm2_folder
from uniprune.artefacts.mask_conversion import export_masks, import_masks
from uniprune.artefacts.masks import MasksFile
from uniprune.models.matrices import find_matrices


class Peer(NamedTuple):
    """A tool: what names its version; its place among the environments; our format; the files that it writes, and reads."""

    title: str
    environment: int
    format: str
    written: tuple[str, ...]
    read: str | None
    scripts: int | None = None


PEERS = {
    "torch-prune": Peer("torch.nn.utils.prune, torch 2.13.0", 1, "torch-prune", ("masks.pt",), "ours.pt"),
    "modelopt": Peer("NVIDIA ModelOpt 0.47.0", 1, "modelopt", ("masks.pt", "folder"), "ours.safetensors"),
    "compressed-tensors": Peer(
        "compressed-tensors 0.14.0, sparse-bitmask", 0, "compressed-tensors", ("masks.safetensors",), "ours.safetensors"
    ),
    "sparse-24": Peer("compressed-tensors 0.14.0, sparse-24-bitmask", 0, "compressed-tensors", ("masks.safetensors",), None),
    "bitmasks": Peer(
        "compressed-tensors 0.20.0, its helpers", 1, "compressed-tensors", ("masks.safetensors",), "ours.safetensors"
    ),
    "maskllm": Peer("MaskLLM 50e50de", 0, "maskllm", ("masks.npz", "masks.pt"), "ours.npz", 0),
    "patch": Peer("PATCH 8092197", 0, "patch", ("masks.npz",), "ours.npz", 1),
}


def weights(folder: Path) -> dict[str, Tensor]:
    model = uniprune.load(folder, dtype="float16", device="cpu").model
    return {name: matrix.weight for name, matrix in find_matrices(model).items()}


def agreeing(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """How many matrices are equal in both."""
    return sum(name in other and torch.equal(tensor, other[name]) for name, tensor in one.items())


def without_zeros(folder: str) -> None:
    """Moves weights that are 0 already a little: some tools take the masks from the zeros."""
    for file in Path(folder).glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor[tensor == 0] = 2.0**-14
        save_file(tensors, file, metadata={"format": "pt"})


class Exchange:
    """What every exchange starts from: the dense model, our masks, and the checkpoint pruned by them."""

    def __init__(self, work: Path, environments: list[str], scripts: list[str]) -> None:
        self.work, self.environments, self.scripts = work, environments, scripts
        self.dense, self.pruned = work / "dense", work / "pruned"
        smollm2_folder(self.dense, "float16")
        without_zeros(str(self.dense))
        recipe = uniprune.Recipe(sparsity="2:4", metric="magnitude", controller="none", windows=1, length=16)
        uniprune.prune(str(self.dense), recipe, self.pruned)
        self.masks = self.pruned / "pruning" / "masks.safetensors"

    def run(self, tool: str, direction: str, given: Path, out: Path) -> None:
        peer = PEERS[tool]
        name = tool if peer.scripts is None else f"{tool}:{self.scripts[peer.scripts]}"
        script = Path(__file__).with_name("peer_masks_tool.py")
        command = [self.environments[peer.environment], str(script), name, direction, str(self.dense), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")

    def applied(self, masks: Path) -> dict[str, Tensor]:
        out = self.work / "applied"
        uniprune.apply(str(self.dense), masks, out, overwrite=True)
        return weights(out)

    def imports(self, tool: str) -> list[dict[str, Any]]:
        """Masks that the tool wrote."""
        out = self.work / f"{tool}-write"
        self.run(tool, "write", self.pruned, out)
        expected = {key.removesuffix(".weight"): mask for key, mask in load_file(out / "expected.safetensors").items()}
        rows = []
        for file in PEERS[tool].written:
            ours = self.work / f"{tool}-imported.safetensors"
            found = import_masks(out / file, str(self.dense), ours, overwrite=True)
            masks = dict(MasksFile(ours))
            rows.append(
                {
                    "tool": PEERS[tool].title,
                    "direction": "import",
                    "file": file,
                    "format": found["format"],
                    "pattern": found["pattern"],
                    "matrices": len(expected),
                    "masks_equal": agreeing(expected, masks),
                    "models_equal": agreeing(self.applied(ours), weights(out / "model")),
                    "round_trip": self.round_trip(tool, ours),
                }
            )
        return rows

    def round_trip(self, tool: str, masks: Path) -> bool:
        """Whether an export of masks comes back as the same bytes, but for a pattern that names a file."""
        peer = PEERS[tool]
        there = self.work / f"again{Path(peer.read or peer.written[0]).suffix}"
        export_masks(masks, there, peer.format, str(self.dense), overwrite=True)
        back = self.work / "back.safetensors"
        import_masks(there, str(self.dense), back, overwrite=True)
        one, other = MasksFile(masks), MasksFile(back)
        return one.facts.digests == other.facts.digests and agreeing(dict(one), dict(other)) == len(one) == len(other)

    def exports(self, tool: str) -> list[dict[str, Any]]:
        """Masks of ours, read by the tool."""
        peer = PEERS[tool]
        if peer.read is None:
            return []
        out, file = self.work / f"{tool}-read", self.work / f"{tool}-{peer.read}"
        export_masks(self.masks, file, peer.format, str(self.dense), overwrite=True)
        self.run(tool, "read", file, out)
        ours = weights(self.pruned)
        equal = agreeing(ours, weights(out / "model"))
        facts = {"tool": peer.title, "direction": "export", "file": peer.read, "format": peer.format, "pattern": "2:4"}
        return [{**facts, "matrices": len(ours), "models_equal": equal}]


def main() -> None:
    arguments = sys.argv[1:]
    environments, scripts, wanted = arguments[:2], arguments[2:4], arguments[4:] or [*PEERS]
    rows = [row for row in load("peer_masks").get("rows", []) if row["tool"] not in {PEERS[tool].title for tool in wanted}]
    with tempfile.TemporaryDirectory() as scratch:
        exchange = Exchange(Path(scratch), environments, scripts)
        for tool in wanted:
            for row in [*exchange.imports(tool), *exchange.exports(tool)]:
                rows.append(row)
                print(row, flush=True)
            save("peer_masks", {"model": "SmolLM2-135M-Instruct, float16", "rows": rows})


if __name__ == "__main__":
    main()
