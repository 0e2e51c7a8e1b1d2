"""Corpora that do not fit into memory: where the windows come from, and what reading takes, beside counting the lines.

    python benchmarks/reading.py [--gigabytes 2] [--folder /tmp]

Files of random words in numbered lines are written to a folder, read and removed. A window tells by its numbers where it is
from. Memory is what reading takes at its peak beyond what the process had before; time is that of ``load_windows`` and of
``wc -l`` (or ``zstd -dc | wc -l``) in turn, the best of three.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

from common import save, smollm2
from uniprune.checkpoints.origin import resolve
from uniprune.checkpoints.tokenizer import load_tokenizer
from uniprune.data.windows import Windows, load_windows

WINDOWS, LENGTH, ROUNDS = 128, 512, 3
WORDS, BLOCK = 20_000, 10_000


def lines(size: int) -> Iterator[str]:
    """Lines of 5 to 200 random words, the number of each before it, ``size`` characters in all."""
    lots = random.Random(0)
    words = ["".join(lots.choices("etaoinshrdlucmfwyp", k=lots.randint(2, 9))) for _ in range(WORDS)]
    pool = [" ".join(lots.choices(words, k=lots.randint(5, 200))) for _ in range(100_000)]
    number = 0
    while size > 0:
        line = f"{number:09d} {pool[lots.randrange(len(pool))]}"
        size -= len(line) + 1
        number += 1
        yield line


def write_plain(path: Path, size: int) -> int:
    with path.open("w") as file:
        return sum(file.write(line + "\n") > 0 for line in lines(size))


def write_packed(path: Path, size: int) -> int:
    """JSON lines whose file is about ``size`` bytes when it is packed."""
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1, threads=2).stream_writer(file) as packed:
        every = (json.dumps({"text": line}) + "\n" for line in lines(1 << 60))
        number = 0
        while file.tell() < size:
            number += packed.write("".join(islice(every, BLOCK)).encode()) > 0
    return number * BLOCK


def peak_of(read: Callable[[], Windows]) -> tuple[Windows, float, int]:
    """What is read, the seconds it took, and the bytes that it had at its peak beyond those before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not there for this
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _status("VmRSS"), time.perf_counter()
    windows = read()
    return windows, time.perf_counter() - start, _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def counted(command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(path: Path, written: int, command: str, tokenizer: Any) -> dict[str, Any]:
    """How a file is read: where its windows begin, as the least, the most and each tenth of its lines, time and memory."""

    def read() -> Windows:
        return load_windows(path, tokenizer, use="calibration", length=LENGTH, count=WINDOWS)

    rounds = [(counted(command), *peak_of(read)) for _ in range(ROUNDS)]
    windows = rounds[0][1]
    texts = [tokenizer.decode(row) for row in windows.tokens]
    places = sorted(int(found[0]) / written for text in texts if (found := re.search(r"\d{9}", text)))
    tenths = [sum(tenth <= 10 * place < tenth + 1 for place in places) for tenth in range(10)]
    # Kolmogorov's distance from places that are as likely everywhere; 1.36 / sqrt(n) is exceeded by chance once in twenty.
    distance = max(max(place - i / len(places), (i + 1) / len(places) - place) for i, place in enumerate(places))
    seconds, count = min(row[2] for row in rounds), min(row[0] for row in rounds)
    return {
        "bytes": path.stat().st_size,
        "lines": written,
        "windows_by_tenth": tenths,
        "distance_from_uniform": distance,
        "seconds": seconds,
        "seconds_of_counting": count,
        "ratio": seconds / count,
        "peak_bytes": max(row[3] for row in rounds),
        "sample": dict(windows.sample),
        "sha256": windows.sha256,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    size, tokenizer, result = int(given.gigabytes * 1e9), load_tokenizer(resolve(smollm2())), {}
    tokenizer("what is made once is not reading")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for name, write, command in (
            ("corpus.txt", write_plain, "wc -l {}"),
            ("corpus.jsonl.zst", write_packed, "zstd -dc {} | wc -l"),
        ):
            path = Path(folder) / name
            written = write(path, size)
            result[name] = measure(path, written, command.format(path), tokenizer)
            path.unlink()
            print(name, json.dumps(result[name], indent=1))
    save("reading", {"windows": WINDOWS, "length": LENGTH, "rounds": ROUNDS, "files": result})


if __name__ == "__main__":
    main()
