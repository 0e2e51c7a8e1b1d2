"""Which windows a text gives: those with BOS, those that overlap, and samples of large texts, which are small ones here."""

import gzip
import json
import logging
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import uniprune
from conftest import Stopped, Stops
from uniprune.data import bos as bos_module
from uniprune.data import mixture, sampling
from uniprune.data.bos import bos_of
from uniprune.data.text import Text
from uniprune.data.windows import load_windows, save_windows
from uniprune.errors import InputError

zstandard = pytest.importorskip("zstandard")


class Letters:
    """Tokens are character codes, so that windows can be read with the eye; ``^`` is BOS, which it adds if it is told to."""

    bos_token_id, bos_token = ord("^"), "^"

    def __init__(self, adds=True):
        self.adds = adds

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [ord(letter) for letter in "^" * (self.adds and add_special_tokens) + text]}

    def decode(self, ids, skip_special_tokens=False, **options):
        return "".join(chr(id) for id in ids if not (skip_special_tokens and id == self.bos_token_id))


class NoBos(Letters):
    bos_token_id = bos_token = None


class OfType:
    def __init__(self, model_type):
        self.model_type = model_type

    def get_text_config(self):
        return self


def letters(windows):
    return ["".join(map(chr, row)) for row in windows.tokens.tolist()]


@pytest.fixture
def abc(tmp_path):
    file = tmp_path / "abc.txt"
    file.write_text("abcdefghijklm")
    return file


@pytest.fixture
def small(monkeypatch):
    """Texts of over a thousand characters are large."""
    monkeypatch.setattr(mixture, "WHOLE", 1000)
    monkeypatch.setattr(mixture.Wanted, "whole", 1000)
    monkeypatch.setattr(mixture.Wanted, "share", 1000)


# ----------------------------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize(
    ("adds", "bos", "expected", "with_bos"),
    [
        (True, None, ["^abcd", "efghi"], 1),
        (True, "first", ["^abcd", "efghi"], 1),
        (True, "each", ["^abcd", "^efgh", "^ijkl"], 3),
        (True, "none", ["abcde", "fghij"], 0),
        (False, None, ["abcde", "fghij"], 0),
        (False, "first", ["^abcd", "efghi"], 1),
        (False, "each", ["^abcd", "^efgh", "^ijkl"], 3),
    ],
)
def test_which_windows_begin_with_bos(abc, adds, bos, expected, with_bos):
    windows = load_windows(abc, Letters(adds), use="evaluation", length=5, bos=bos)
    assert letters(windows) == expected
    assert windows.available == len(expected)
    assert windows.describe().windows_with_bos == with_bos
    assert windows.describe().bos == (bos or ("first" if adds else "none"))


def test_a_tokenizer_may_have_no_bos(abc):
    assert letters(load_windows(abc, NoBos(False), use="evaluation", length=6, bos="none")) == ["abcdef", "ghijkl"]
    for bos in ("each", "first"):
        with pytest.raises(InputError, match=f"--bos {bos}: the tokenizer has no BOS token; use --bos none"):
            load_windows(abc, NoBos(False), use="evaluation", length=6, bos=bos)
    with pytest.raises(InputError, match="--bos all is none of each, first and none"):
        load_windows(abc, Letters(), use="evaluation", length=6, bos="all")


def test_what_a_family_needs(caplog):
    for family in ("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "recurrent_gemma"):
        assert bos_of(None, OfType(family), Letters()) == "each"
    for family in ("llama", "opt", "qwen3", None):
        assert bos_of(None, OfType(family), Letters()) is None
        assert bos_of("none", OfType(family), Letters()) == "none"
    assert not caplog.records
    assert bos_of("first", OfType("gemma2"), Letters()) == "first"
    assert "--bos first: models of type gemma2 are far off" in caplog.text
    assert bos_of(None, OfType("gemma2"), NoBos()) is None
    assert "need BOS in each window, but the tokenizer has none" in caplog.text


def test_it_is_said_where_default_and_tokenizer_disagree(abc, caplog):
    for tokenizer, bos in ((Letters(), "each"), (Letters(), "none"), (Letters(False), None)):
        load_windows(abc, tokenizer, use="calibration", length=5, count=2, bos=bos)
        assert not caplog.records
    load_windows(abc, Letters(), use="calibration", length=5, count=2)
    assert "begins a text with BOS: as in papers, at most one window" in caplog.text


def test_a_token_file_knows_its_bos(abc, tmp_path):
    windows = load_windows(abc, Letters(), use="calibration", length=5, count=3, bos="each")
    save_windows(windows, tmp_path / "t.safetensors")
    again = load_windows(tmp_path / "t.safetensors", None, use="calibration", length=5)
    assert again.describe() == windows.describe()
    assert load_windows(tmp_path / "t.safetensors", None, use="calibration", length=5, count=2).with_bos == 2
    with pytest.raises(InputError, match="has its tokens; leave out --bos"):
        load_windows(tmp_path / "t.safetensors", None, use="calibration", length=5, bos="none")
    with pytest.raises(InputError, match="has its tokens; leave out --field, --split"):
        load_windows(Text(str(tmp_path / "t.safetensors"), "a", "b"), None, use="calibration", length=5)


def test_a_token_file_knows_its_tokenizer(abc, tmp_path):
    """Token numbers of one tokenizer are other words to another, whether or not it has as many."""

    class Shifted(Letters):
        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) + 1 for letter in text]}

    file = tmp_path / "t.safetensors"
    windows = load_windows(abc, Letters(), use="calibration", length=3, count=3)
    save_windows(windows, file)
    for tokenizer in (Letters(), None):  # saved again, by whomever, it is known as well
        again = load_windows(file, tokenizer, use="calibration", length=3)
        assert torch.equal(again.tokens, windows.tokens)
        save_windows(again, file)
    with pytest.raises(InputError, match="made with another tokenizer than the model's; give the text itself"):
        load_windows(file, Shifted(), use="calibration", length=3)
    for _ in range(2):  # by an older version, or of numbers that no tokenizer made
        save_windows(replace(windows, tokenizer=None), file)
        windows = load_windows(file, Shifted(), use="calibration", length=3)
        assert torch.equal(windows.tokens, again.tokens)


# -------------------------------------------------------------------------------------------------------------- stride


def test_windows_overlap_by_stride(abc):
    windows = load_windows(abc, Letters(False), use="evaluation", length=5, stride=2)
    assert letters(windows) == ["abcde", "cdefg", "efghi", "ghijk", "ijklm"]
    assert windows.scored == [4, 2, 2, 2, 2]
    predicted = [row[-scored:] for row, scored in zip(letters(windows), windows.scored, strict=True)]
    assert "".join(predicted) == "bcdefghijklm"
    assert (windows.words, windows.size) == (5, 12)


def test_some_of_the_overlapping_windows_predict_as_many_tokens_each(abc):
    """Those that the window before them in the text would not."""
    all_of_them = load_windows(abc, Letters(False), use="evaluation", length=5, stride=2)
    some = load_windows(abc, Letters(False), use="evaluation", length=5, stride=2, count=3)
    assert all_of_them.scored == [4, *[2] * (len(all_of_them.tokens) - 1)]
    assert some.scored == [2, 2, 2]


def test_stride_with_bos_in_each_window(abc):
    windows = load_windows(abc, Letters(), use="evaluation", length=5, stride=3, bos="each")
    assert letters(windows) == ["^abcd", "^defg", "^ghij", "^jklm"]
    assert windows.scored == [4, 3, 3, 3]
    with pytest.raises(InputError, match="--stride 5 is not within 1 and 4"):
        load_windows(abc, Letters(), use="evaluation", length=5, stride=5, bos="each")


def test_words_and_bytes_of_what_is_predicted(tmp_path):
    (tmp_path / "t.txt").write_text("é is a letter, b one more.")
    windows = load_windows(tmp_path / "t.txt", Letters(), use="evaluation", length=26, bos="each")
    assert letters(windows) == ["^é is a letter, b one more"]
    assert (windows.words, windows.size) == (7, 26)
    windows = load_windows(tmp_path / "t.txt", Letters(), use="evaluation", length=26, bos="none")
    assert (windows.words, windows.size) == (7, 25)  # the first letter is given: "", is, a, ...


# ------------------------------------------------------------------------------------------------------------- samples


def marked(name, count, width=40):
    """Numbered lines of one source: ``a0012 a0012 a00``."""
    return [(f"{name}{number:04d} " * width)[:width] for number in range(count)]


def numbers(windows, name):
    return [int(word[1:]) for row in letters(windows) for word in row.split() if word[:1] == name and len(word) == 5]


LARGE = {
    "text": ("a.txt", lambda rows: "\n".join(rows).encode()),
    "text.gz": ("a.txt.gz", lambda rows: gzip.compress("\n".join(rows).encode())),
    "jsonl": ("a.jsonl", lambda rows: "\n".join(json.dumps({"text": row}) for row in rows).encode()),
    "jsonl.zst": ("a.jsonl.zst", lambda rows: zstandard.compress("\n".join(json.dumps({"text": r}) for r in rows).encode())),
    "json": ("a.json", lambda rows: json.dumps([{"text": row} for row in rows]).encode()),
    "csv": ("a.csv", lambda rows: "\n".join(["text", *rows]).encode()),
    "long documents": (
        "a.jsonl.gz",
        lambda rows: gzip.compress("\n".join(json.dumps({"text": "\n".join(rows[i::4])}) for i in range(4)).encode()),
    ),
}


@pytest.mark.parametrize("kind", LARGE)
def test_windows_of_a_large_file_are_from_all_over_it(tmp_path, small, caplog, kind):
    name, write = LARGE[kind]
    (tmp_path / name).write_bytes(write(marked("a", 2000)))
    options = {"use": "calibration", "length": 50, "count": 24}
    windows = load_windows(tmp_path / name, Letters(False), **options)
    tenths = Counter(number // 200 for number in numbers(windows, "a"))
    assert len(tenths) >= 7
    assert max(tenths.values()) <= 0.45 * tenths.total()
    assert "is more than 24 windows need: they come from" in caplog.text
    sample = windows.describe().sample
    assert (sample.whole, sample.files, sample.files_read) == (False, 1, 1)
    assert 24 * 40 < sample.characters < 5000
    again, other = (load_windows(tmp_path / name, Letters(False), **options, seed=seed) for seed in (0, 1))
    assert torch.equal(again.tokens, windows.tokens)
    assert not torch.equal(other.tokens, windows.tokens)


def test_evaluation_windows_of_a_large_text_are_from_all_over_it(tmp_path, small):
    (tmp_path / "a.txt").write_text("\n".join(marked("a", 2000)))
    windows = load_windows(tmp_path / "a.txt", Letters(False), use="evaluation", length=50, count=24)
    assert len({number // 200 for number in numbers(windows, "a")}) >= 9


def test_a_long_text_is_tokenised_in_pieces(tmp_path, small, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(marked("a", 100)))
    monkeypatch.setattr(bos_module, "PIECE", 300)
    for bos in ("each", "first", "none"):
        pieces = load_windows(tmp_path / "a.txt", Letters(), use="evaluation", length=50, bos=bos)
        with monkeypatch.context() as patch:
            patch.setattr(mixture.Wanted, "whole", 10**6)
            whole = load_windows(tmp_path / "a.txt", Letters(), use="evaluation", length=50, bos=bos)
            patch.setattr(bos_module, "WHOLE", 300)
            at_once = load_windows(tmp_path / "a.txt", Letters(), use="evaluation", length=50, bos=bos)
        assert letters(pieces) == letters(whole) == letters(at_once)


def test_pieces_end_where_lines_do(monkeypatch):
    monkeypatch.setattr(bos_module, "PIECE", 10)
    encoder = bos_module.Encoder(Letters(), None, "a text")
    blocks = ["one\ntwo", "\nthree\n", "a line of more than ten letters\n", "end"]
    pieces = ["".join(map(chr, piece)) for piece in encoder.pieces(blocks)]
    assert pieces == ["one\ntwo\n", "three\n", "a line of ", "more than ", "ten letter", "s\nend"]


@pytest.mark.parametrize("large", [False, True])
def test_each_file_of_a_folder_has_an_even_share(tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr(mixture.Wanted, "whole", 1000)
        monkeypatch.setattr(mixture.Wanted, "share", 3000)
    folder = tmp_path / "mix"
    folder.mkdir()
    (folder / "code.txt").write_text("\n".join(marked("a", 3000)))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in marked("b", 600, 90)))
    (folder / "german.jsonl.zst").write_bytes(
        zstandard.compress("\n".join(json.dumps({"text": row}) for row in marked("c", 900)).encode())
    )
    windows = load_windows(folder, Letters(False), use="calibration", length=100, count=128)
    sources = [max("abc", key=row.count) for row in letters(windows)]
    assert all(abs(sources.count(name) - 128 / 3) < 0.05 * 128 / 3 for name in "abc")
    assert sum(sum(name in row for name in "abc") > 1 for row in letters(windows)) <= 1  # a window is of one file
    assert len({*letters(windows)}) == 128
    assert windows.describe().sample.files_read == 3
    for name, count in (("a", 3000), ("b", 600), ("c", 900)):
        assert len({10 * number // count for number in numbers(windows, name)}) >= 8
    other = load_windows(folder, Letters(False), use="calibration", length=100, count=128, seed=1)
    assert {*letters(other)} != {*letters(windows)}


def test_small_files_leave_their_share_to_others_and_are_joined(tmp_path):
    folder = tmp_path / "mix"
    folder.mkdir()
    (folder / "large.txt").write_text("L" * 3000)
    (folder / "medium.txt").write_text("M" * 250)
    for number in range(30):
        (folder / f"tiny{number}.txt").write_text("t" * 8)
    windows = load_windows(folder, Letters(False), use="calibration", length=100, count=20)
    counts = Counter(max("LMt", key=row.count) for row in letters(windows))
    assert (counts["M"], counts["t"]) == (2, 3)  # 250 letters; 30 files of 8 and a joint, 50 letters of M among them
    assert counts["L"] == 15
    with pytest.raises(InputError, match=r"has 3\d windows of 100 tokens, 60 were asked for"):
        load_windows(folder, Letters(False), use="calibration", length=100, count=60)


def test_of_many_files_no_more_are_read_than_are_needed(tmp_path, small):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(50):
        (folder / f"{number:02d}.txt").write_text("\n".join(marked("a", 100)))
    sample = load_windows(folder, Letters(False), use="calibration", length=50, count=10).sample
    assert (sample.files, sample.files_read) == (50, 10)


def test_even_shares_against_the_definition():
    """Pour, drop by drop, into vessels of those sizes."""
    draw = random.Random(0)
    for _ in range(50):
        sizes = [draw.randrange(1, 30) for _ in range(draw.randrange(1, 6))]
        total = draw.randrange(1, sum(sizes) + 20)
        level = 0
        while sum(min(size, level + 1) for size in sizes) <= total and level < max(sizes):
            level += 1
        share = mixture.even_share(sizes, total)
        assert min(share, max(sizes)) == pytest.approx(level, abs=1)


def test_lots_are_fair():
    """Every passage has the same chance, whatever the document it is in."""
    documents = ["s" * 50, *(f"{number}" * 50 for number in range(10)), "".join(letter * 50 for letter in "abcdefghij")]
    met = Counter()
    for seed in range(3000):
        for passage in sampling.draw(documents, 50, 200, f"{seed}"):
            met[passage[25]] += 1
    assert len(met) == 21
    mean = met.total() / 21
    assert sum((count - mean) ** 2 / mean for count in met.values()) < 45  # chi squared, 20 degrees of freedom: 1 in 1000


SHAPES = {
    "short lines": [f"{number:05d} " + "x" * (number % 90) for number in range(4000)],
    "long lines": [" ".join(f"{number:05d} xxx" for number in range(first, first + 1000)) for first in range(0, 4000, 1000)],
    "both": [
        *(f"{number:05d} xxxx" for number in range(2000)),
        " ".join(f"{number:05d} xxxx" for number in range(2000, 4000)),
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_are_drawn_from_all_over_a_stream(shape):
    """Every tenth of the text has the same chance, in blocks of any size; and those that were passed over are not looked at."""
    lines = [line.encode() + b"\n" for line in SHAPES[shape]]
    blocks = [b"".join(lines[start : start + 40]) for start in range(0, len(lines), 40)]
    whole = b"".join(lines)
    length, met, looked = len(whole), Counter(), 0

    def text(found):
        nonlocal looked
        looked += 1
        return found.decode()

    for seed in range(60):
        for passage in sampling.draw_lines(blocks, text, 300, 3000, f"{seed}"):
            assert passage.encode() in whole
            met[10 * whole.find(passage.encode()) // length] += 1
    mean = met.total() / 10
    assert sum((count - mean) ** 2 / mean for count in met.values()) < 28  # chi squared, 9 degrees of freedom: 1 in 1000
    assert looked < 60 * 80  # of 400 places and more


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_are_found_all_over_a_file(tmp_path, shape):
    whole = b"".join(line.encode() + b"\n" for line in SHAPES[shape])
    (tmp_path / "lines").write_bytes(whole)
    met = Counter()
    for offset in range(0, len(whole), 97):
        start, found, index, count = sampling.lines_at(tmp_path / "lines", offset, 300)
        assert found
        assert whole[start : start + len(found)] == found
        assert (start, found[-1:]) in ((start, b"\n"), (0, b"\n"))
        assert start == 0 or whole[start - 1 : start] == b"\n"
        assert 0 <= index < count
        at = start + len(found) * index // count  # where the passage is
        assert abs(at - offset) <= 700 or len(whole) - offset < 700
        met[10 * at // len(whole)] += 1
    assert max(met.values()) <= 1.25 * min(met.values())


def test_short_documents_are_enough(tmp_path, small):
    """A place in many short documents gives as many of them as make a window."""
    for name, write in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        rows = "".join(json.dumps({"text": row}) + "\n" for row in marked("a", 400, 12)).encode()
        (tmp_path / name).write_bytes(write(rows))
        windows = load_windows(tmp_path / name, Letters(False), use="calibration", length=100, count=25)
        assert len({number // 40 for number in numbers(windows, "a")}) >= 8


def test_places_are_evenly_spread_however_many_are_taken():
    for taken in (3, 10, 37, 100):
        offsets = [offset for offset, _ in zip(sampling.places(10**6, 10, 2000, "7"), range(taken), strict=False)]
        steps = [b - a for a, b in zip(sorted(offsets), sorted(offsets)[1:], strict=False)]
        assert max(steps) < 3 * 10**6 / taken
        assert min(steps) > 10**6 / taken / 3


def test_a_passage_of_any_alphabet_begins_and_ends_with_whole_characters(tmp_path):
    text = "".join(chr(0x4E00 + number % 500) + "é🙂a"[number % 3] for number in range(300))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for offset in range(200):
        passage = sampling.plain_at(tmp_path / "a.txt", offset, 100)
        assert passage in text
        assert 20 < len(passage) < 100


def test_more_than_there_is(tmp_path, small):
    (tmp_path / "a.txt").write_text("\n".join(marked("a", 40)))  # large, but of less than is wanted
    with pytest.raises(InputError, match="windows of 500 tokens, 90 were asked for"):
        load_windows(tmp_path / "a.txt", Letters(False), use="calibration", length=500, count=90)


def test_rows_without_text_are_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{"text": null}\n{"text": null}\n')
    load_windows(tmp_path / "a.jsonl", Letters(False), use="calibration", length=4, count=1)
    assert "2 rows have no text (null) and are left out" in caplog.text


def test_a_chat_template_that_is_missing_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    row = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    windows = load_windows(Text(str(tmp_path / "a.jsonl")), Letters(False), use="evaluation", length=9)
    assert letters(windows) == ["How?\n\nSo."]
    assert caplog.text.count("no chat template") == 1


def test_a_run_that_goes_on_finds_its_own_tokens(folder, tmp_path):
    """What is started again with --resume after an interruption may have written them before."""
    tokens, output = tmp_path / "tokens.safetensors", tmp_path / "scores.safetensors"
    recipe = uniprune.Recipe(controller="none", windows=8, length=32)

    def start(recipe=recipe, **options):
        return uniprune.calibrate(str(folder), recipe, output, save_tokens=tokens, execution="streamed", **options)

    with pytest.raises(Stopped):
        start(progress=Stops(1), resume=True)
    written = tokens.stat().st_mtime_ns
    start(resume=True)
    assert tokens.stat().st_mtime_ns == written
    output.unlink()
    with pytest.raises(InputError, match="exists; give another name"):
        start()
    with pytest.raises(InputError, match="exists, and has other tokens; give another name, or --overwrite"):
        start(uniprune.Recipe(**{**dict(recipe), "seed": 1}), resume=True)
