"""What `uniprune pack` makes of SmolLM2-135M in bfloat16, pruned to 50 % and to 2:4 by Wanda: size, time, memory.

    python benchmarks/archive.py

Sizes are fractions of dense bytes: of the whole archive (masks, tokenizer and all) in the weights file and in the folder; of
the prunable matrices and of the other tensors in themselves. This model's embedding was eight bits once (Q8_0 in its GGUF
file), which the layout `scaled` finds; `unscaled` is without it, as for a model that never was.

Packing alternates with what people would do otherwise: copy the folder, then compress each file with zstd -3 on all cores.
`speed` is the median ratio of their seconds, above 1 where packing is faster; CPU seconds are given as well, because the
machine is shared. Every file that comes back is compared byte for byte.
"""

from __future__ import annotations

import filecmp
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from common import CALIBRATION, save, smollm2_folder
from uniprune.artefacts import archive, archive_codec, writer
from uniprune.artefacts import masks as masks_file
from uniprune.checkpoints.checkpoint import Files

PATTERNS = ("0.5", "2:4")
ROUNDS = 3
WINDOWS = 16  # of calibration text: enough for masks that are like Wanda's
WEIGHTS = "model.safetensors"
PEAK = """
import sys
from pathlib import Path
from uniprune import archive
memory = lambda what: 1024 * int(Path("/proc/self/status").read_text().split(what)[1].split()[0])
archive_codec.Zstd()
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
before = memory("VmRSS:")
getattr(archive, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]), overwrite=True)
print(memory("VmHWM:") - before)
"""


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        dense = Path(name) / "dense"
        smollm2_folder(dense)
        for pattern in PATTERNS:
            folder = prune(dense, pattern)
            results[pattern] = measure(folder, Path(name))
            print(pattern, results[pattern], flush=True)
    save("archive", {"patterns": results})


def prune(dense: Path, pattern: str) -> Path:
    folder = dense.parent / pattern.replace(":", "-")
    flags = ["--sparsity", pattern, "--controller", "none", "--text", str(CALIBRATION), "--windows", str(WINDOWS)]
    subprocess.run([sys.executable, "-m", "uniprune.cli.main", "prune", str(dense), "-o", str(folder), *flags], check=True)
    return folder


def measure(folder: Path, place: Path) -> dict[str, Any]:
    packed, back, copy = place / "x.upz", place / "back", place / "copy"
    rows = []
    for _ in range(ROUNDS):
        row = {"usual": timed(lambda: copy_and_compress(folder, copy))}
        row["pack"] = timed(lambda: archive.pack(folder, packed, overwrite=True))
        row["unpack"] = timed(lambda: archive.unpack(packed, back, overwrite=True))
        rows.append(row)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert filecmp.cmp(path, back / path.relative_to(folder), shallow=False), path
    total, size = sum(path.stat().st_size for path in files), packed.stat().st_size
    usual = sum(path.stat().st_size for path in copy.rglob("*.zst"))
    weights = (folder / WEIGHTS).stat().st_size
    matrices, others = by_kind(folder, packed)
    return {
        "bytes": {"folder": total, "weights": weights, "archive": size, "usual": usual},
        "of_weights": size / weights,
        "of_folder": size / total,
        "unscaled_of_weights": unscaled(folder, place) / weights,
        "usual_of_weights": usual / weights,
        "matrices": matrices,
        "other_tensors": others,
        "speed": statistics.median(row["usual"]["seconds"] / row["pack"]["seconds"] for row in rows),
        "cpu_speed": statistics.median(row["usual"]["cpu_seconds"] / row["pack"]["cpu_seconds"] for row in rows),
        "peak_bytes": {"pack": peak("pack", folder, packed), "unpack": peak("unpack", packed, back)},
        "rounds": rows,
    }


def timed(work: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def copy_and_compress(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    compressor = zstandard.ZstdCompressor(level=3, threads=-1)
    for path in [path for path in copy.rglob("*") if path.is_file()]:
        with path.open("rb") as source, Path(f"{path}.zst").open("wb") as target:
            compressor.copy_stream(source, target)


def by_kind(folder: Path, packed: Path) -> tuple[float, float]:
    """Archived bytes over dense bytes, of the prunable matrices and of all other tensors."""
    with packed.open("rb") as file:
        chunks = next(file.chunks for file in archive._read_index(file, packed) if file.name == WEIGHTS)
    stored, start = {}, 0
    for chunk in chunks:
        stored[start] = sum(chunk.pieces)
        start += chunk.size
    files = Files(folder)
    keys = files.entries
    pruned = {files.key(name) for name in masks_file.MasksFile(folder / writer.MASKS)}
    ratios = []
    for chosen in (pruned, keys.keys() - pruned):
        entries = [keys[key] for key in chosen]
        inside = sum(size for at, size in stored.items() if any(entry.start <= at < entry.stop for entry in entries))
        ratios.append(inside / sum(entry.stop - entry.start for entry in entries))
    return ratios[0], ratios[1]


def unscaled(folder: Path, place: Path) -> int:
    found, archive_codec.fit_scales = archive_codec.fit_scales, lambda words: None
    try:
        return int(archive.pack(folder, place / "unscaled.upz", overwrite=True)["archive_bytes"])
    finally:
        archive_codec.fit_scales = found


def peak(verb: str, source: Path, output: Path) -> int:
    """Bytes that a process of its own needs on top of its imports (on Linux)."""
    arguments = [sys.executable, "-c", PEAK, verb, str(source), str(output)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
