"""One exchange of masks by the other tool, in its own virtual environment; started by peer_masks.py.

    python peer_masks_tool.py TOOL write DENSE PRUNED OUT      # OUT/masks.*: its masks; OUT/expected.safetensors, OUT/model
    python peer_masks_tool.py TOOL read DENSE MASKS OUT        # OUT/model: the dense model with the masks applied by it

TOOL: torch-prune, modelopt, compressed-tensors, sparse-24 (its 2:4 format), bitmasks (only its helpers), maskllm:FOLDER or
patch:FOLDER with their scripts. Everything that makes, packs, unpacks and applies a mask is the tool's own code.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

Masks = dict[str, Tensor]  # keys of weights -> booleans


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """What is pruned: the linear layers of the decoder blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def done(out: Path, model: Any, expected: Masks | None = None) -> None:
    model.save_pretrained(out / "model")
    if expected is not None:
        save_file({key: mask.bool().contiguous() for key, mask in expected.items()}, out / "expected.safetensors")


def replaced(model: Any, weights: Masks) -> Any:
    """The model with other weights."""
    model.load_state_dict(weights, strict=False)
    return model


# ---------------------------------------------------------------------------------------------------------- torch-prune


def write_torch_prune(dense: str, pruned: str, out: Path) -> None:
    model = load(dense)
    for _, layer in layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)
    expected = {f"{name}.weight": layer.weight_mask.clone() for name, layer in layers(model)}
    torch.save(model.state_dict(), out / "masks.pt")
    for _, layer in layers(model):
        prune.remove(layer, "weight")
    done(out, model, expected)


def read_torch_prune(dense: str, masks: str, out: Path) -> None:
    model = load(dense)
    for _, layer in layers(model):
        prune.identity(layer, "weight")
    state = torch.load(masks) if masks.endswith(".pt") else load_file(masks)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    for _, layer in layers(model):
        prune.remove(layer, "weight")
    done(out, model)


# ------------------------------------------------------------------------------------------------------------- modelopt


def sparsified(dense: str) -> Any:
    import modelopt.torch.sparsity as mts

    return mts.sparsify(load(dense), "sparse_magnitude")


def write_modelopt(dense: str, pruned: str, out: Path) -> None:
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts

    mto.enable_huggingface_checkpointing()
    model = sparsified(dense)
    expected = {f"{name}.weight": layer._weight_mask.clone() for name, layer in layers(model) if layer._weight_mask is not None}
    mto.save(model, out / "masks.pt")
    model.save_pretrained(out / "folder")
    done(out, mts.export(model), expected)


def read_modelopt(dense: str, masks: str, out: Path) -> None:
    import modelopt.torch.sparsity as mts

    model = sparsified(dense)
    state = torch.load(masks) if masks.endswith(".pt") else load_file(masks)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    done(out, mts.export(model))


# --------------------------------------------------------------------------------------------------- compressed-tensors


def write_compressed(dense: str, pruned: str, out: Path, two_of_four: bool = False) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import Sparse24BitMaskConfig

    kind = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"
    config = {"config": Sparse24BitMaskConfig()} if two_of_four else {}
    compressor = BaseCompressor.load_from_registry(kind, **config)
    model = load(pruned)
    names = {name for name, _ in layers(model)}
    packed = compressor.compress({f"{name}.weight": layer.weight.detach() for name, layer in layers(model)}, names)
    save_file({key: tensor.contiguous() for key, tensor in packed.items()}, out / "masks.safetensors")
    weights = dict(compressor.decompress(str(out / "masks.safetensors")))
    expected = unpacked(out / "masks.safetensors")
    done(out, replaced(model, weights), expected)


def unpacked(path: Path) -> Masks:
    from compressed_tensors.utils.helpers import unpack_bitmasks

    tensors = load_file(path)
    names = [key.removesuffix(".bitmask") for key in tensors if key.endswith(".bitmask")]
    return {
        f"{name}.weight": unpack_bitmasks(tensors[f"{name}.bitmask"], tensors[f"{name}.shape"].flatten().tolist())
        for name in names
    }


def read_compressed(dense: str, masks: str, out: Path) -> None:
    model, found = load(dense), unpacked(Path(masks))
    done(out, replaced(model, {key: weight * found[key] for key, weight in model.state_dict().items() if key in found}))


def write_bitmasks(dense: str, pruned: str, out: Path) -> None:
    from compressed_tensors.utils.helpers import pack_bitmasks

    model = load(pruned)
    packed = {}
    for name, layer in layers(model):
        packed |= {f"{name}.bitmask": pack_bitmasks(layer.weight != 0), f"{name}.shape": torch.tensor(layer.weight.shape)}
    save_file(packed, out / "masks.safetensors")
    done(out, model, {f"{name}.weight": layer.weight != 0 for name, layer in layers(model)})


# -------------------------------------------------------------------------------------------------------------- MaskLLM


def run(script: Path, *arguments: object, **names: Any) -> dict[str, Any]:
    """A script as its author runs it, but for some of its names."""
    sys.argv = [str(script), *map(str, arguments)]
    found = runpy.run_path(str(script), run_name="__main__" if not names else "loaded")
    if names:
        main: Callable[[], None] = found["main"]
        main.__globals__.update(names)
        main()
    return found


def write_maskllm(scripts: Path, dense: str, pruned: str, out: Path) -> None:
    run(scripts / "tool_compute_mask_hf.py", "--dense", dense, "--sparse", pruned, "--save", out / "masks.pt")
    run(scripts / "tool_compress_mask.py", "--mask_ckpt", out / "masks.pt", "--output", out / "masks.npz")
    expected = {key.removesuffix(".mask"): mask for key, mask in torch.load(out / "masks.pt").items()}
    read_maskllm(scripts, dense, str(out / "masks.npz"), out)
    save_file({key: mask.bool() for key, mask in expected.items()}, out / "expected.safetensors")


class NoTokenizer:
    """In place of the tokenizer and the perplexity on a GPU, which masks have nothing to do with."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> NoTokenizer:
        return NoTokenizer()

    def save_pretrained(self, folder: str) -> None:
        pass


def read_maskllm(scripts: Path, dense: str, masks: str, out: Path) -> None:
    others = {"get_llm": lambda folder, _: load(folder), "AutoTokenizer": NoTokenizer, "eval_ppl": lambda *_: 0.0}
    wanted = ["--model", dense, "--mask", masks, "--save_model", out / "model"]
    run(scripts / "eval_llama_ppl.py", *wanted, **others)


# ---------------------------------------------------------------------------------------------------------------- PATCH


def write_patch(scripts: Path, dense: str, pruned: str, out: Path) -> None:
    sys.path.insert(0, str(scripts))
    import build_release

    torch.save(load(pruned).state_dict(), out / "pruned.pt")
    packed, shapes, stats = build_release.extract_masks(out / "pruned.pt")
    build_release.save_mask_npz(out / "masks.npz", packed, shapes, stats)
    read_patch(scripts, dense, str(out / "masks.npz"), out)
    masks, _ = loader(scripts).load_mask_npz(out / "masks.npz")
    save_file({key: torch.from_numpy(np.ascontiguousarray(mask)) for key, mask in masks.items()}, out / "expected.safetensors")


def loader(scripts: Path) -> Any:
    sys.path.insert(0, str(scripts))
    import load_patch_mask

    return load_patch_mask


def read_patch(scripts: Path, dense: str, masks: str, out: Path) -> None:
    done(out, loader(scripts).apply_patch_mask(load(dense), masks))


def main() -> None:
    tool, direction, dense, other, folder = sys.argv[1:]
    tool, _, scripts = tool.partition(":")
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    work: dict[tuple[str, str], Callable[[], None]] = {
        ("torch-prune", "write"): lambda: write_torch_prune(dense, other, out),
        ("torch-prune", "read"): lambda: read_torch_prune(dense, other, out),
        ("modelopt", "write"): lambda: write_modelopt(dense, other, out),
        ("modelopt", "read"): lambda: read_modelopt(dense, other, out),
        ("compressed-tensors", "write"): lambda: write_compressed(dense, other, out),
        ("compressed-tensors", "read"): lambda: read_compressed(dense, other, out),
        ("sparse-24", "write"): lambda: write_compressed(dense, other, out, two_of_four=True),
        ("bitmasks", "write"): lambda: write_bitmasks(dense, other, out),
        ("bitmasks", "read"): lambda: read_compressed(dense, other, out),
        ("maskllm", "write"): lambda: write_maskllm(Path(scripts), dense, other, out),
        ("maskllm", "read"): lambda: read_maskllm(Path(scripts), dense, other, out),
        ("patch", "write"): lambda: write_patch(Path(scripts), dense, other, out),
        ("patch", "read"): lambda: read_patch(Path(scripts), dense, other, out),
    }
    work[tool, direction]()


if __name__ == "__main__":
    main()
