"""What stands in every report beside the result: realised sparsity, versions, seconds, hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def sparsity(removed: Mapping[str, float], shapes: Mapping[str, tuple[int, int]]) -> float:
    """The fraction of all weights that is removed, from that of each matrix."""
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    return sum(removed[name] * size for name, size in sizes.items()) / sum(sizes.values())


def versions() -> dict[str, str]:
    """The software that a result depends on."""
    names = ("uniprune", "torch", "transformers", "tokenizers")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its source, which is on the path
        return "unknown, not installed"


def processor() -> dict[str, str]:
    """What the system says of its processor, in its own words: ``model name``, ``flags``; nothing where it does not say it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}


class Stopwatch:
    """Wall-clock seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 3)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
