"""A checkpoint of random weights, as large as is asked for: what the benchmarks of memory and disk run on.

    python benchmarks/shards.py FOLDER --size {8b,1b,3b,width,tiny} [--blocks N] [--seed N] [--shard-gb X] [--overwrite]

Llama's architecture, bfloat16, several safetensors files with an index; the tokenizer is SmolLM2's. All matrices are stretches
of one buffer of normal values, each from a place of its own, so 3e9 weights take as long as the disk does, and little memory.
The same size, blocks and seed give the same weights, however they are cut into files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import LlamaConfig

from common import smollm2
from uniprune.checkpoints.origin import Origin, resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.errors import InputError
from uniprune.models.loading import skeleton
from uniprune.storage.files import check_disk_space, new_folder

SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv_heads": 8, "blocks": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "heads": 32, "kv_heads": 8, "blocks": 22},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "heads": 24, "kv_heads": 8, "blocks": 28},
    "width": {"hidden_size": 1024, "intermediate_size": 2816, "heads": 16, "kv_heads": 4, "blocks": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "heads": 4, "kv_heads": 2, "blocks": 2},
}
VOCABULARY = 49_152
STD = 0.02
SHARD = 10**9
BUFFER = 16_777_213  # a prime: where a tensor goes round the buffer, its rows begin elsewhere
ITEM = 2  # bytes of a bfloat16
MARK = "shards.json"  # what the weights are; a folder without it is not ours to replace


def write(
    folder: Path, size: str, blocks: int | None = None, *, seed: int = 0, shard: int = SHARD, overwrite: bool = False
) -> None:
    """Writes the checkpoint, whole or not at all; ``shard``: bytes that no file exceeds unless one tensor does."""
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists; give another name, or --overwrite")
    if folder.exists() and not (folder / MARK).is_file():
        raise InputError(f"{folder} was not written by shards.py; give another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as partial:
        tokenizer = load_tokenizer(resolve(smollm2()))
        config(size, blocks, tokenizer).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shapes = {name: tuple(p.shape) for name, p in skeleton(Origin("random", partial)).named_parameters()}
        total = sum(map(bytes_of, shapes.values()))
        check_disk_space(folder, total + (1 << 24))
        files = cut(shapes, min(shard, -(-total // 2)))
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        buffer = torch.empty(BUFFER).normal_(0, STD, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for name, tensors in zip(names, files, strict=True):
            with (partial / name).open("wb") as file:
                write_shard(file, tensors, buffer, seed)
        index = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (partial / "model.safetensors.index.json").write_text(text + "\n")
        (partial / MARK).write_text(json.dumps({"size": size, "blocks": blocks, "seed": seed}) + "\n")


def config(size: str, blocks: int | None, tokenizer: Any) -> LlamaConfig:
    wanted = SIZES[size]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=wanted["hidden_size"],
        intermediate_size=wanted["intermediate_size"],
        num_hidden_layers=blocks or wanted["blocks"],
        num_attention_heads=wanted["heads"],
        num_key_value_heads=wanted["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )


def bytes_of(shape: tuple[int, ...]) -> int:
    return ITEM * torch.Size(shape).numel()


def cut(shapes: dict[str, tuple[int, ...]], limit: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in the model's order."""
    files: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        if not files or bytes_of(shape) > room:
            files.append({})
            room = limit
        files[-1][name] = shape
        room -= bytes_of(shape)
    return files


def write_shard(file: BinaryIO, tensors: dict[str, tuple[int, ...]], buffer: torch.Tensor, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + bytes_of(shape)]}
        offset += bytes_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape in tensors.items():
        for piece in pieces(name, shape, buffer, seed):
            file.write(piece.view(torch.int16).numpy().data)


def pieces(name: str, shape: tuple[int, ...], buffer: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """The values of one tensor, flat: ones for a norm, else the buffer, from a place that seed and name decide, and round."""
    left = torch.Size(shape).numel()
    if len(shape) == 1:
        yield torch.ones(left, dtype=torch.bfloat16)
        return
    start = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") % len(buffer)
    while left:
        piece = buffer[start : start + left]
        yield piece
        left -= len(piece)
        start = 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=SHARD / 1e9)
    parser.add_argument("--overwrite", action="store_true")
    chosen = parser.parse_args()
    shard = int(chosen.shard_gb * 1e9)
    try:
        write(chosen.folder, chosen.size, chosen.blocks, seed=chosen.seed, shard=shard, overwrite=chosen.overwrite)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
