"""Readers of files that were mutated: a sample of what ``make fuzz`` runs, all that it ever found, and the fuzzer itself."""

import json
import mmap
import random
import tracemalloc
from pathlib import Path

import pytest

import fuzzing
from fuzzing import Reader, attempt, fuzz, guarded, readers

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*"))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "w"
    folder.mkdir()
    return folder, readers(folder)


def test_a_sample_of_mutated_files_does_no_harm(tmp_path):
    (tmp_path / "w").mkdir()
    outcomes = fuzz(tmp_path / "w", 2000, seed=7)
    assert {name: problem for name, one in outcomes.items() for problem in one.failures.values()} == {}
    for name, one in outcomes.items():
        assert one.refused > one.cases / 5, name  # a mutation that nobody notices tests nothing


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_did_harm_does_none(known, path):
    folder, found = known
    with guarded():
        assert attempt(folder, found[path.parent.name], path.read_bytes())[1] is None


@pytest.mark.parametrize("name", ["checkpoint", "masks", "scores", "tokens", "archive"])
def test_no_header_takes_memory_for_what_it_claims(known, name):
    """Every eight bytes at the front as every absurd size: never twice the file's bytes on top of what a valid file takes."""
    folder, found = known
    reader = found[name]

    def peak(content):
        tracemalloc.start()
        problem = attempt(folder, reader, content)[1]
        (_, most), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
        assert problem is None
        return most

    peak(reader.content)  # what is imported when it is first needed
    usual = peak(reader.content)
    for start in range(0, 40, 8):
        for size in fuzzing.SIZES:
            lie = reader.content[:start] + size.to_bytes(8, "little") + reader.content[start + 8 :]
            assert peak(lie) < usual + 2 * len(lie) + 20_000


def test_the_fuzzer_sees_crashes_hangs_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.3)
    (tmp_path / "work" / "bad").mkdir(parents=True)

    def trial(read):
        with guarded():
            return attempt(tmp_path, Reader("bad", "bytes", b"", read, "f"), b"{")[1]

    def forever(path):
        while True:
            pass

    assert trial(lambda path: json.loads(path.read_text())).startswith("JSONDecodeError in decoder.py")
    assert trial(forever).startswith("Hang")
    # Not a bytearray: what the suite freed before may lie in malloc's heap in one piece, and takes no addresses.
    assert trial(lambda path: mmap.mmap(-1, 2 * fuzzing.MEMORY)).startswith("OSError in test_fuzz.py:<lambda>: [Errno 12]")
    assert trial(lambda path: (tmp_path / "x").write_text("")).startswith("it left")
    assert trial(lambda path: None) is None


def test_mutations_are_the_same_for_a_seed_and_differ_within_one(known):
    _, found = known
    for reader in found.values():
        one, other = ([fuzzing.mutate(reader, rng) for _ in range(30)] for rng in (random.Random(0), random.Random(0)))
        assert one == other
        assert len({*one}) > 20
