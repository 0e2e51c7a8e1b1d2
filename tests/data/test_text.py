"""Token windows, with gold cases by hand: this is where off-by-one lives."""

import gzip
import json
import os
import re

import pytest
import torch

from uniprune.data import mixture, sources, text
from uniprune.data import rows as rows_module
from uniprune.data.documents import Reader
from uniprune.data.rows import read_rows
from uniprune.data.text import read
from uniprune.data.windows import load_windows, save_windows
from uniprune.errors import InputError
from uniprune.tasks.loading import load_task


class Letters:
    """A tokenizer whose tokens are character codes, so that windows can be read with the eye."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


def letters(windows):
    return ["".join(map(chr, row)) for row in windows.tokens.tolist()]


@pytest.fixture
def abc(tmp_path):
    file = tmp_path / "abc.txt"
    file.write_text("abcdefghijklm")  # 13 letters: 4 windows of 3 and a rest
    return file


def test_evaluation_takes_every_whole_window(abc):
    windows = load_windows(abc, Letters(), use="evaluation", length=3)
    assert letters(windows) == ["abc", "def", "ghi", "jkl"]
    assert windows.available == 4


def test_evaluation_spreads_fewer_windows_from_first_to_last(abc):
    assert letters(load_windows(abc, Letters(), use="evaluation", length=3, count=3)) == ["abc", "def", "jkl"]
    assert letters(load_windows(abc, Letters(), use="evaluation", length=3, count=1)) == ["abc"]


def test_calibration_draws_without_replacement_by_seed(abc):
    first, again, other = (load_windows(abc, Letters(), use="calibration", length=3, count=4, seed=s) for s in (0, 0, 1))
    assert sorted(letters(first)) == ["abc", "def", "ghi", "jkl"]
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256


def test_short_documents_are_joined(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("ab", "c", "de")))
    assert read(file, "calibration") == "ab\n\nc\n\nde"


def test_folders_are_read_in_order_of_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read(tmp_path, "calibration") == "first\n\nsecond\n\nthird"


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", "calibration") == "one\n\ntwo"


def test_wikitext_raw_rows_are_those_of_datasets(tmp_path):
    file = tmp_path / "wiki.raw"
    file.write_text(" \n = Title = \n \n Text @-@ here \n")
    assert read(file, "evaluation") == "\n\n = Title = \n\n\n\n\n Text @-@ here \n"


@pytest.mark.parametrize("written", ["{}", "\ufeff{}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_marks_are_no_text(tmp_path, written, end):
    content = " \n = Title = \n Text \u2028 here \n"
    (tmp_path / "wiki.raw").write_bytes(written.format(content).replace("\n", end).encode())
    assert read(tmp_path / "wiki.raw", "evaluation") == "\n\n = Title = \n\n\n Text \u2028 here \n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_of_a_file_that_passages_are_drawn_from(tmp_path, monkeypatch, name):
    """Of files put together there are several."""
    monkeypatch.setattr(mixture.Wanted, "whole", 100)
    monkeypatch.setattr(mixture.Wanted, "share", 400)
    lines = "".join(json.dumps({"text": f"row {number} " * 9}) + "\n" for number in range(60)).encode("utf-8-sig") * 2
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    for seed in range(9):
        load_windows(tmp_path / name, Letters(), use="calibration", length=20, count=9, seed=seed)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("form", ["{0}\n{0}\n", "[{0},\n{0}]", "\n{0}\n\n{0}", "[{0}]\n[{0}]"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_messages_is_a_conversation(tmp_path, form, indent):
    class Chat(Letters):
        chat_template = bos_token = ""

        def apply_chat_template(self, messages, **options):
            return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    (tmp_path / "a.jsonl").write_text(form.format(json.dumps(TURNS, indent=indent)))
    rows = read_rows(tmp_path / "a.jsonl", "text")
    assert list(Reader(tokenizer=Chat())(rows)) == ["<user>q<assistant>a"] * 2


def test_conversations_over_several_blocks_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("uniprune.data.rows.BLOCK", 256)
    blocks = rows_module.blocks_of
    monkeypatch.setattr("uniprune.data.rows.blocks_of", lambda stream: blocks(stream, 64))
    turns = [TURNS] * 50 + [[{"role": "user", "content": "é" * 20}]] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, turns)))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl", "text")] == turns


def test_other_arrays_are_taken_apart(tmp_path):
    for content in ('["a",\n"b"]\n[{"text": "c"}]', '[["a", "b"],\n["c"]]\n', '[[["a"]], [{"text": "b"}, {"text": "c"}]]'):
        (tmp_path / "a.json").write_text(content)
        assert read(tmp_path / "a.json", "calibration") == "a\n\nb\n\nc"
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path / "a.json", "calibration")


def test_an_empty_list_beside_the_rows_is_not_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "one"}, {"text": "two"}], "warnings": []}))
    assert read(tmp_path / "a.json", "calibration") == "one\n\ntwo"
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "choices": []}))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl", "task")] == [{"question": "q", "choices": []}]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_field_that_is_asked_for_makes_a_row(tmp_path, rows):
    """Of a file with one, too, in which another field has a list of objects."""
    row = {"turns": TURNS, "meta": {"text": "inner"}, "more": "said"}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row)] * rows))
    for field, expected in (("more", "said"), ("meta.text", "inner"), ("turns", "q\n\na")):
        assert read(text.Text(str(tmp_path / "a.jsonl"), field), "calibration").count(expected) == rows


def test_builtin_parts_are_disjoint(monkeypatch):
    monkeypatch.setitem(text.NAMED, "builtin", text._builtin)  # the whole of it
    calibration, evaluation = read("builtin", "calibration"), read("builtin", "evaluation")
    assert len(evaluation) > 50_000
    assert len(calibration) > 200_000
    assert not set(calibration.split("\n\n")) >= set(evaluation.split("\n\n"))


def test_bos_stands_once_at_the_start(abc):
    class WithBos(Letters):
        bos_token_id = ord("^")

        def __call__(self, text, **options):
            return super().__call__("^" + text)

    windows = load_windows(abc, WithBos(), use="evaluation", length=7)
    assert letters(windows) == ["^abcdef", "ghijklm"]
    assert (windows.describe().bos, windows.describe().windows_with_bos) == ("first", 1)


def test_token_file_round_trip(abc, tmp_path):
    windows = load_windows(abc, Letters(), use="calibration", length=3, count=3)
    save_windows(windows, tmp_path / "tokens.safetensors")
    again = load_windows(tmp_path / "tokens.safetensors", None, use="calibration", length=3)
    assert again.describe() == windows.describe()
    with pytest.raises(InputError, match="windows of 3 tokens, not 4"):
        load_windows(tmp_path / "tokens.safetensors", None, use="calibration", length=4)
    with pytest.raises(InputError, match="3 windows, 9"):
        load_windows(tmp_path / "tokens.safetensors", None, use="calibration", length=3, count=9)


def test_a_token_file_may_lie_at_home(abc, tmp_path, monkeypatch):
    windows = load_windows(abc, Letters(), use="calibration", length=3, count=3)
    save_windows(windows, tmp_path / "tokens.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.common_shape(sources.parse("~/tokens.safetensors"), None, None, (9, 7)) == (3, 3)
    assert load_windows("~/tokens.safetensors", None, use="calibration", length=3).describe().sha256 == windows.sha256


def test_hash_sees_the_shape(abc):
    one = load_windows(abc, Letters(), use="evaluation", length=6)
    two = load_windows(abc, Letters(), use="evaluation", length=12)
    assert one.tokens.flatten().tolist() == two.tokens.flatten().tolist()
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "e.txt", "empty"),
        (" \n \n", "e.txt", "empty"),
        ("ab", "e.txt", "2 tokens, less than one window of 3"),
        ('{"txt": "a"}', "e.jsonl", 'line 1: no string field "text"'),
        ("{", "e.jsonl", "line 1: not JSON"),
        ("abc", "e.docx", "no"),
    ],
)
def test_bad_text_is_refused(tmp_path, content, name, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_windows(tmp_path / name, Letters(), use="evaluation", length=3)


def test_more_bad_requests(abc, tmp_path):
    with pytest.raises(InputError, match="4 windows of 3 tokens, 5 were asked for"):
        load_windows(abc, Letters(), use="calibration", length=3, count=5)
    with pytest.raises(InputError, match="neither one of builtin"):
        load_windows("nowhere", Letters(), use="calibration", length=3)
    with pytest.raises(InputError, match="no tokenizer"):
        load_windows(abc, None, use="calibration", length=3)
    with pytest.raises(InputError, match="too short"):
        load_windows(abc, Letters(), use="evaluation", length=1)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_windows(tmp_path / "latin.txt", Letters(), use="evaluation", length=3)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_passages_of_an_object_around_rows_on_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(mixture.Wanted, "whole", 100)
    monkeypatch.setattr(mixture.Wanted, "share", 100)
    content = json.dumps({"version": 1, "data": [{"text": f"row {number} " * 9} for number in range(99)]}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    windows = load_windows(tmp_path / name, Letters(), use="calibration", length=20, count=9)
    assert all("row " in window and "{" not in window for window in letters(windows))


def test_conversations_that_the_template_refuses_are_counted(tmp_path, caplog):
    class Refusing(Letters):
        chat_template = bos_token = ""

        def apply_chat_template(self, messages, **options):
            if messages[0]["content"] == "no":
                raise ValueError("roles must alternate")
            return messages[0]["content"]

    rows = [{"messages": content and [{"role": "user", "content": content}]} for content in ("yes", "no", None, "no")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_windows(tmp_path / "a.jsonl", Refusing(), use="calibration", length=3, count=1)
    assert "1 rows have no text (null) and are left out" in caplog.text
    assert "2 conversations are left out, which the chat template refuses" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_of_several_forms_are_read_each_in_its_own(tmp_path, caplog, name):
    """A file that is put together from several sources: the first row does not say what the others have."""
    rows = [{"content": "ab"}, {"text": "cde"}, {"question": "f?", "answer": "g"}, {"text": None}]
    rows += [{"text": None, "content": "hi"}, {"prompt": "j", "completion": "k"}, {"prompt": "l", "response": "m"}]
    form = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (tmp_path / name).write_text(form)
    (whole,) = letters(load_windows(tmp_path / name, Letters(), use="evaluation", length=30))
    assert whole == "ab\n\ncde\n\nf?\n\ng\n\nhi\n\nj\n\nk\n\nl\n\nm"
    (tmp_path / name).write_text(json.dumps([{"text": "a"}, {"content": {"x": 1}}]))
    with pytest.raises(InputError, match='no string field "content", it is an object'):
        load_windows(tmp_path / name, Letters(), use="evaluation", length=3)
    assert "1 rows have no text (null) and are left out" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_rows_without_text_are_counted_once(tmp_path, monkeypatch, caplog, name):
    """The beginning of a long file is read before passages from all over it are."""
    monkeypatch.setattr(mixture.Wanted, "whole", 100)
    monkeypatch.setattr(mixture.Wanted, "share", 400)
    rows = [{"text": None if number % 2 else f"row {number} " * 9} for number in range(60)]
    content = (json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    load_windows(tmp_path / name, Letters(), use="calibration", length=20, count=9)
    assert 0 < int(re.search(r"(\d+) rows have no text", caplog.text)[1]) <= 30


def test_text_is_found_in_rows_that_are_mostly_other_fields(tmp_path, monkeypatch):
    """As preference data and texts with embeddings are: of each place that is read little is text."""
    monkeypatch.setattr(mixture.Wanted, "whole", 100)
    monkeypatch.setattr(mixture.Wanted, "share", 100)
    rows = [{"text": f"row {number} ".ljust(30, "."), "embedding": list(range(300))} for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows = load_windows(tmp_path / "a.jsonl", Letters(), use="calibration", length=20, count=100)
    assert len(windows.tokens) == 100


def test_a_pipe_is_said_to_be_one(tmp_path):
    """A shell gives one for ``<(zcat text.gz)``; it is there, but a text is read more than once."""
    os.mkfifo(tmp_path / "pipe")
    for there in (lambda name: read(name, "evaluation"), text.check_there, load_task):
        with pytest.raises(InputError, match="pipe is a pipe or a device, which cannot be read twice; write it to a file"):
            there(str(tmp_path / "pipe"))
