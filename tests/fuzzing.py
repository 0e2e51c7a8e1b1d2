"""Mutated files for every reader of ours: whatever a file holds, a reader gives a result or an error of ours, at once.

The files are small and valid before they are mutated: bits flip, pieces go, come and move, sizes become absurd, JSON inside
gets other values, names and types. Checksums that an attacker would set right are set right. ``make soak`` runs 100,000 cases,
the suite a few thousand; a file that ever did harm stays in ``tests/corpus``.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import made_up
from uniprune.artefacts import archive, mask_conversion, mask_formats, mask_tools, writer
from uniprune.artefacts import masks as masks_file
from uniprune.artefacts.binding import Binding, fingerprint
from uniprune.artefacts.scores import ScoresFacts, write_scores
from uniprune.checkpoints import checkpoint
from uniprune.checkpoints.origin import resolve
from uniprune.comparison import candidates, harness
from uniprune.comparison.request import ComparisonRequest
from uniprune.data import text
from uniprune.data import windows as windows_module
from uniprune.entrypoints import mask as entry_mask
from uniprune.entrypoints import prune as entry_prune
from uniprune.errors import LONGEST, UniPruneError
from uniprune.evaluation import reproduce
from uniprune.job.recipe import Recipe
from uniprune.models.matrices import Matrix
from uniprune.reporting import comparison, model_card, results
from uniprune.reporting.headline import verdict
from uniprune.reporting.summary import summarise
from uniprune.storage import runs, safetensors_index
from uniprune.storage.tensor_store import Store
from uniprune.tasks.loading import load_task

SECONDS = 5.0  # of processor time that a case may take: machines are busy
PATIENCE = 60.0  # seconds, whatever it does in them
MEMORY = 256 << 20  # bytes of addresses that a case may take on top of what the process has; the files have some thousands
SHAPE = (8, 16)
NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
SIZES = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *SIZES,
    *(None, True, False, -1, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "\0", "\ud800", "é" * 300),
    *("..", "../../x", "/etc/passwd", "a/b", "C:\\x", "NaN", "F32", "U8", "BF16", "2:4", "0.5 by row"),
    *([], [[]], [0], [-1], [2**60], [1, 2, 3], {}, {"a": 1}, [None], [2**30, 2**30], {"..": ".."}),
)


class Hang(BaseException):
    """More than SECONDS, or PATIENCE; no ``except Exception`` of a reader may take it for a damaged file."""


@dataclass
class Reader:
    """How a file is made, and read. ``kind``: how its inside is mutated."""

    name: str
    kind: str  # safetensors, archive, json, lines, yaml, bytes
    content: bytes
    read: Callable[[Path], Any]
    path: str  # in a folder of its own


@dataclass
class Outcome:
    """What the cases of one reader came to. failures: where it broke -> the first file that did it, and the error."""

    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: dict[str, tuple[bytes, str]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- readers


def readers(folder: Path) -> dict[str, Reader]:
    """All readers, with a valid file each, made in an empty folder that they go on to use."""
    made, work = folder / "made", folder / "work"
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(SHAPE, generator=generator) < 0.5 for name in NAMES}
    scores = {name: torch.rand(SHAPE, generator=generator) for name in NAMES}
    weights = {f"{name}.weight": (scores[name] * masks[name]).bfloat16() for name in NAMES}
    digests = dict.fromkeys(NAMES, f"BF16 {SHAPE} {'0' * 64}")
    binding = Binding(base=fingerprint(digests), base_name="m", digests=digests, transposed=[])
    shapes = dict.fromkeys(NAMES, SHAPE)

    model = made / "model"
    (model / "pruning").mkdir(parents=True)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    masks_file.write_masks(model / writer.MASKS, masks.items(), shapes, binding, "masks of x")
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 16}')
    facts = ScoresFacts(**binding.model_dump(), matrices=list(scores), comparable=False, recipe={})
    write_scores(made / "s.safetensors", scores.items(), shapes, facts)
    windows = windows_module.Windows(torch.arange(64).view(4, 16), "builtin", 9, "none")
    windows_module.save_windows(windows, made / "t.safetensors")
    archive.pack(model, made / "a.upz")
    np.savez(made / "p.npz", **{f"{name}.weight": mask.numpy() for name, mask in masks.items()})
    torch.save({f"{name}.weight_mask": mask for name, mask in masks.items()}, made / "p.pt")
    exported = mask_formats.ExportFacts(base=binding.base, base_name="m", pattern="x")
    stored_masks = {f"{name}.weight": mask for name, mask in masks.items()}
    mask_formats.write(
        made / "b.safetensors", "compressed-tensors", dict.fromkeys(stored_masks, SHAPE), stored_masks.items(), exported
    )
    with runs.open_run(made / "out", {"seed": 0}) as run:
        store = Store(run, "sweep")
        for name in NAMES:
            store[name] = {"total": scores[name].clone()}
        store.commit({"done": 1})
        shutil.copytree(run.folder, made / "run")
    stored = next((made / "run" / "sweep").iterdir())
    text_facts = {"windows": 2, "length": 8, "text": "t", "sha256": "0"}
    report = {
        "kind": "pruning",
        "format": 1,
        "model": {"name": "m", "fingerprint": "0" * 64},
        "recipe": Recipe(sparsity="2:4").record(),
        "pattern": "2:4",
        "structure": {"kind": "N:M", "spelling": "2:4", "sparsity": 0.5, "n": 2, "m": 4},
        "sparsity": 0.5,
        "matrices": {name: {"shape": SHAPE, "sparsity": 0.5} for name in NAMES},
        "calibration": text_facts,
        "controller": {"targets": ["2:4"], "steps": 1, "tokens": 16, "kl": [0.5], "flips": [0.1], "held_out_kl": [1.0, 0.5]},
        "versions": {"torch": "2"},
    }
    result = {
        "model": "m",
        "perplexity": 9.5,
        "windows": 2,
        "length": 8,
        "text": {"text": "t", "sha256": "0"},
        "tasks": {"a": {"questions": 2, "acc": 0.5, "against": {"acc": {"reference": 1.0, "gained": 0, "lost": 1, "p": 1.0}}}},
        "closeness": {"kl": 0.1, "kl_stderr": None, "agreement": 0.9, "agreement_stderr": 0.1, "tokens": 14},
        "generations": [{"prompt": "p", "model": "a", "against": "b", "same_tokens": 0, "tokens": 3}],
        "protocol": {"request": {"windows": 2, "tasks": ["a"], "dtype": "float32"}, "machine": {"threads": 1}},
    }
    swept = {
        "model": "m",
        "scores": {"name": "s", "sha256": "0"},
        "protocol": {"text": text_facts, "windows": 2, "length": 8, "scope": None, "machine": {"threads": 1}},
        "dense": {"perplexity": 9.5, "bytes": 100},
        "rows": [{"pattern": "0.5", "scope": "row", "sparsity": 0.5, "perplexity": 12.5, "bytes": None, "pareto": True}],
    }
    compared = {
        **{"kind": "comparison", "format": 1, "model": "m", "methods": ["wanda"], "sparsities": ["0.5"]},
        "protocol": {
            "text": text_facts,
            "windows": 2,
            "length": 8,
            "stride": 8,
            "tasks": {"a": "0"},
            "settings": {"limit": None},
        },
        "rows": [
            {"method": "dense", "sparsity": 0.0, "perplexity": 9.5, "measured": "2026-01-02T03:04:05+00:00"},
            {
                **{
                    "method": "wanda",
                    "pattern": "0.5",
                    "scope": "row",
                    "sparsity": 0.5,
                    "perplexity": 12.5,
                    "nats_stderr": 0.1,
                },
                **{"right": {"a": {"acc": "2"}}, "written": ["x"], "by_position": {"1-512": 12.5}, "matrices": {"m.0.q": 0.5}},
                **{"tasks": result["tasks"], "seconds": {"calibrate": 1.5, "evaluate": 0.5}, "updates_weights": False},
                "measured": "2026-01-02T03:04:06+00:00",
            },
        ],
    }
    index = {"metadata": {}, "weight_map": {f"{name}.weight": "model.safetensors" for name in NAMES}}
    row = {"goal": "to see", "sol1": "look", "sol2": "sleep", "label": 0}
    hella = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d [x] e", "f"], "label": "1"}
    arc = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    settings = "sparsity: 0.5\nscope: model\nmetric: ria:a=0.5\nwindows: 4\nexclude: [down_proj]\ntuning: {step_size: 0.01}\n"
    matrix = {name: Matrix(name, nn.Linear(SHAPE[1], SHAPE[0]), 0, False) for name in NAMES}

    def entries(path: Path) -> None:
        for entry in safetensors_index.entries([path]).values():
            for piece in entry.pieces():
                entry.finite(piece)

    def verify(path: Path) -> None:
        mask_tools.verify(path)
        mask_tools.stats(path)

    def cut(path: Path) -> None:
        entry_mask.mask(path, "0.5", path.parent / "out.safetensors", scope="model", overwrite=True)

    def tokens(path: Path) -> None:
        windows_module.load_windows(path, None, use="calibration", length=windows_module.token_file_shape(path)[1])

    def unpack(path: Path) -> None:
        archive.unpack(path, path.parent / "out")

    def foreign(path: Path) -> None:
        given = mask_formats.Foreign(path)
        for weight in given:
            name = weight.removesuffix(".weight")
            if name in matrix:
                mask_conversion._mask_of(given, weight, matrix[name])

    def finished(path: Path) -> None:
        entry_prune._finished(path.parent, Recipe(sparsity="2:4"), "m")

    def resumed(path: Path) -> None:
        folder = path.parents[0 if path.suffix == ".json" else 1]
        with suppress(Stop), runs.open_run(folder.parent / "out", {"seed": 0}, resume=True) as run:
            for tensors in Store(run, "sweep").values():
                tensors["total"].sum() if "total" in tensors else None
            raise Stop  # else the run is done, and its folder goes

    def lines(path: Path) -> None:
        text.read(path, "calibration").encode()

    def indexed(path: Path) -> None:
        assert all(shard.parent == path.parent for shard in checkpoint.Files(path.parent).shards)

    def carded(path: Path) -> None:
        model_card.rewrite(path.parent, [])
        (path.parent / model_card.CARD).unlink()

    def paged(path: Path) -> None:
        verdict(summarise([results.read(path)]))

    def tabulated(path: Path) -> None:
        paged(path)
        found = results.read(path).result
        for name, content in harness.files(found):
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_text(json.dumps(content))
            assert (path.parent / name).resolve().parent.parent == path.parent.resolve()
            shutil.rmtree((path.parent / name).parent)
        comparison.markdown(found), comparison.latex(found), comparison.readings(found), comparison.flips(found)

    def asked(path: Path) -> None:
        candidates.asked(ComparisonRequest.load(path))

    found = [
        Reader("checkpoint", "safetensors", (model / "model.safetensors").read_bytes(), entries, "model.safetensors"),
        Reader("index", "json", json.dumps(index).encode(), indexed, checkpoint.INDEX),
        Reader("config", "json", (model / "config.json").read_bytes(), lambda path: resolve(path.parent), "config.json"),
        Reader("masks", "safetensors", (model / writer.MASKS).read_bytes(), verify, "m.safetensors"),
        Reader("scores", "safetensors", (made / "s.safetensors").read_bytes(), cut, "s.safetensors"),
        Reader("tokens", "safetensors", (made / "t.safetensors").read_bytes(), tokens, "t.safetensors"),
        Reader("archive", "archive", (made / "a.upz").read_bytes(), unpack, "a.upz"),
        Reader("plain", "bytes", (made / "p.npz").read_bytes(), foreign, "p.npz"),
        Reader("pickled", "bytes", (made / "p.pt").read_bytes(), foreign, "p.pt"),
        Reader("bitmask", "safetensors", (made / "b.safetensors").read_bytes(), foreign, "b.safetensors"),
        Reader("recipe", "yaml", settings.encode(), Recipe.load, "r.yaml"),
        Reader("report", "json", json.dumps(report).encode(), finished, "pruning.json"),
        Reader("result", "json", json.dumps(result).encode(), reproduce.read, "result.json"),
        Reader("page", "json", json.dumps(result).encode(), paged, "result.json"),
        Reader("sweep", "json", json.dumps(swept | {"kind": "sweep", "format": 1}).encode(), paged, "sweep.json"),
        Reader("comparison", "json", json.dumps(compared).encode(), tabulated, "comparison.json"),
        Reader("speeds", "json", json.dumps(made_up.speeds()).encode(), paged, "bench.json"),
        Reader("packing", "json", json.dumps(made_up.packing()).encode(), paged, "packed.json"),
        Reader(
            "table", "yaml", b"model: m\nmethods: [wanda, 'feedback:checks=2']\nsparsities: ['0.5', '2:4']\n", asked, "t.yaml"
        ),
        Reader("pruning", "json", json.dumps(report).encode(), paged, "report.json"),
        Reader("card", "json", json.dumps(report).encode(), carded, "pruning.json"),
        Reader("text", "lines", b'{"text": "to be"}\n{"text": "or not \\u00e9"}\n', lines, "t.jsonl"),
        Reader("task", "lines", "".join(json.dumps(r) + "\n" for r in (row, row)).encode(), _task, "t.jsonl"),
        Reader("task-hellaswag", "lines", json.dumps(hella).encode(), _task, "t.jsonl"),
        Reader("task-arc", "lines", json.dumps(arc).encode(), _task, "t.jsonl"),
        Reader("identity", "json", (made / "run" / "identity.json").read_bytes(), resumed, ".run-out/identity.json"),
        Reader("commit", "json", (made / "run" / "sweep.json").read_bytes(), resumed, ".run-out/sweep.json"),
        Reader("state", "safetensors", stored.read_bytes(), resumed, f".run-out/sweep/{stored.name}"),
    ]
    for reader in found:  # what lies beside the file
        place = work / reader.name
        place.mkdir(parents=True)
        if reader.name == "config":
            shutil.copy(model / "model.safetensors", place)
        if reader.read is resumed:
            shutil.copytree(made / "run", place / ".run-out")
    return {reader.name: reader for reader in found}


def _task(path: Path) -> None:
    for question in load_task(str(path)).questions:
        for context, answer in question.choices:
            (context + answer).encode()


class Stop(Exception):
    pass


# ------------------------------------------------------------------------------------------------------------ mutations


def mutate(reader: Reader, rng: random.Random) -> bytes:
    """Another file: one to three changes, in the bytes or in what they say."""
    content = reader.content
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside = INSIDES.get(reader.kind)
        try:
            content = inside(content, rng) if inside and rng.random() < 0.6 else rng.choice(BYTES)(content, rng)
        except Exception:  # what was changed before left nothing to change inside
            content = rng.choice(BYTES)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    start, length = _span(content, rng, 16)
    return (
        content[:start]
        + bytes(rng.choice((0, 255, 127, rng.randrange(256))) for _ in range(length))
        + content[start + length :]
    )


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _drop(content: bytes, rng: random.Random) -> bytes:
    start, length = _span(content, rng)
    return content[:start] + content[start + length :]


def _splice(content: bytes, rng: random.Random) -> bytes:
    start, length = _span(content, rng)
    place = rng.randrange(len(content) + 1)
    return content[:place] + content[start : start + length] + content[place:]


def _length(content: bytes, rng: random.Random) -> bytes:
    """Eight bytes, mostly the first, become a number."""
    start = rng.choice((0, 0, 8, 16, 24, rng.randrange(len(content) + 1)))
    near = len(content) + rng.randrange(-16, 17)
    number = rng.choice((*SIZES, near, near - 8)) & (2**64 - 1)
    return content[:start] + struct.pack("<Q", number) + content[start + 8 :]


def _digits(content: bytes, rng: random.Random) -> bytes:
    """A number that is spelled out becomes another."""
    found = list(re.finditer(rb"\d+", content))
    if not found:
        return content
    match = rng.choice(found)
    return (
        content[: match.start()] + rng.choice((*map(str, SIZES), "-1", "1e999", "9" * 5000)).encode() + content[match.end() :]
    )


def _span(content: bytes, rng: random.Random, most: int = 1 << 30) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(rng.choice((1, 2, 4, 8, 64, 512)), most, len(content) - start)


BYTES = (_flip, _flip, _bytes, _cut, _drop, _splice, _length, _digits)


def _json(content: bytes, rng: random.Random) -> bytes:
    """One node of a JSON text gets another value, goes, comes twice, or gets another name."""
    found = json.loads(content)
    nodes = list(_nodes(found))
    holder, key = rng.choice(nodes)
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "..", str(key) + "x"))] = holder.pop(key)
    elif action == 2:
        other, place = rng.choice(nodes)
        holder[key] = json.loads(json.dumps(other[place]))
    else:
        holder[key] = rng.choice(VALUES)
    changed = json.dumps(found)
    if action == 3 and rng.random() < 0.3:
        changed = changed.replace("{", '{"a": 1, "a": 2, ', 1)
    elif action == 4 and rng.random() < 0.1:
        changed = changed.replace(": ", ": " + "[" * 20_000, 1)
    return changed.encode()


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and where."""
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inside):
        yield value, key
        yield from _nodes(item)


def _lines(content: bytes, rng: random.Random) -> bytes:
    rows = content.split(b"\n")
    number = rng.randrange(len(rows))
    rows[number] = _json(rows[number], rng)
    return b"\n".join(rows)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size]
    if rng.random() < 0.5 and b'"uniprune"' in header:
        parsed = json.loads(header)
        said = parsed["__metadata__"]["uniprune"].encode()
        parsed["__metadata__"]["uniprune"] = _json(said, rng).decode()
        header = json.dumps(parsed).encode()
    else:
        header = _json(header, rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _archive(content: bytes, rng: random.Random) -> bytes:
    magic, version, offset, size, _ = archive.HEADER.unpack(content[: archive.HEADER.size])
    index = _json(content[offset : offset + size], rng)
    head = archive.HEADER.pack(magic, version, offset, len(index), hashlib.sha256(index).digest())
    return head + content[archive.HEADER.size : offset] + index


def _yaml(content: bytes, rng: random.Random) -> bytes:
    """A setting gets another value, perhaps one of another setting, or stands somewhere else."""
    rows = [row for row in content.split(b"\n") if row]
    name, _, value = rows[rng.randrange(len(rows))].partition(b": ")
    other = rng.choice(rows).partition(b": ")[0]
    values = (
        "&a [*a]",
        "*x",
        "!!python/name:os.system",
        "[[[[[[",
        "{",
        "? x",
        "- 1",
        "|",
        "~",
        "\t",
        "inf",
        "nan",
        "(",
        "[",
        "1e999",
    )
    new = rng.choice((*values, value.decode(errors="replace"), json.dumps(rng.choice(VALUES))))
    known = (*Recipe.model_fields, other.decode(errors="replace"), name.decode(errors="replace"))
    rows.insert(rng.randrange(len(rows) + 1), f"{rng.choice(known)}: {new}".encode(errors="replace"))
    if rng.random() < 0.8:
        rows.pop(rng.randrange(len(rows)))
    return b"\n".join(rows) + b"\n"


INSIDES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "lines": _lines,
    "safetensors": _safetensors,
    "archive": _archive,
    "yaml": _yaml,
}

# -------------------------------------------------------------------------------------------------------------- running


@contextmanager
def guarded() -> Iterator[None]:
    """Inside ``with``, the process may take MEMORY bytes of addresses more than it has, and alarms end what hangs.

    Memory that malloc holds free counts as what it has: a case may take that as well.
    """

    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s of processor time, or {PATIENCE} s")

    (pages,) = (int(Path("/proc/self/statm").read_text().split()[0]),)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    previous = {alarm: signal.signal(alarm, stop) for alarm in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        for alarm, handler in previous.items():
            signal.signal(alarm, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def place_of(folder: Path, reader: Reader, content: bytes) -> Path:
    """Where a reader's file lies, with this content."""
    place = folder / "work" / reader.name
    shutil.rmtree(place / "out", ignore_errors=True)
    path = place / reader.path
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def attempt(folder: Path, reader: Reader, content: bytes) -> tuple[bool, str | None]:
    """Whether the reader refused the file, and what went wrong if it neither read nor refused it, nor left its folder alone."""
    path = place_of(folder, reader, content)
    refused, problem = False, None
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        reader.read(path)
    except UniPruneError as error:
        refused = True
        if "\n" in str(error) or len(str(error)) > LONGEST:
            problem = f"its message is no line: {str(error)[:200]!r}"
    except (Exception, Hang) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.name}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    left = [*folder.glob(".partial-*"), *folder.glob("work/*/.partial-*"), *(folder / "x", folder.parent / "x")]
    if found := [item for item in left if item.exists()]:
        problem = f"it left {found[0]}"
        for item in found:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    return refused, problem


def fuzz(folder: Path, cases: int, seed: int = 0, only: str | None = None) -> dict[str, Outcome]:
    """So many cases, shared out evenly among the readers, by seed."""
    found = readers(folder)
    outcomes = {name: Outcome() for name in found if only in (None, name)}
    with guarded():
        for number, name in enumerate(outcomes):
            rng, outcome = random.Random(f"{seed} {name}"), outcomes[name]
            assert attempt(folder, found[name], found[name].content) == (False, None), name
            for _ in range(cases // len(outcomes) + (number < cases % len(outcomes))):
                content = mutate(found[name], rng)
                start = time.perf_counter()
                refused, problem = attempt(folder, found[name], content)
                spent = time.perf_counter() - start
                outcome.cases += 1
                outcome.refused += refused
                outcome.seconds += spent
                outcome.slowest = max(outcome.slowest, spent)
                if problem:
                    outcome.failures.setdefault(problem.partition(":")[0], (content, problem))
    return outcomes
