"""Every kind of corpus that users have: read as it should be, or refused with a remedy, which is then followed, and works."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import train_tokenizer
from uniprune.data.text import Text, read
from uniprune.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
datasets = pytest.importorskip("datasets")

ONE, TWO = "The first document, naïve.", "A second one: 中文 and 🙂."
BOTH = f"{ONE}\n\n{TWO}"
PLAIN = f"{ONE}\n{TWO}\n"
BOM = b"\xef\xbb\xbf"


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(field: str = "text") -> bytes:
    return lines({field: ONE}, {field: TWO})


def table(delimiter: str, *rows: tuple[str, ...]) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


def parquet(**columns: Any) -> bytes:
    from pyarrow import parquet as writer

    out = io.BytesIO()
    writer.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def arrow(stream: bool, **columns: Any) -> bytes:
    found, out = pyarrow.table(columns), io.BytesIO()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(out, found.schema) as file:
        file.write_table(found)
    return out.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, content)
    return out.getvalue()


def tarred(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def chat(*turns: str, names: tuple[str, str] = ("role", "content"), roles: tuple[str, str] = ("user", "assistant")) -> Any:
    return [{names[0]: roles[index % 2], names[1]: turn} for index, turn in enumerate(turns)]


def calling(call: dict[str, Any]) -> Any:
    """A conversation that calls a tool."""
    told = {"role": "tool", "content": "3", "tool_calls": None}
    return [*chat("How?"), {"role": "assistant", "content": None, "tool_calls": [call]}, told]


class Templated:
    """A tokenizer with a chat template, as ``apply_chat_template`` goes; its template knows no system."""

    chat_template, bos_token = "a template", "<s>"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, tools: Sequence[Any] = ()) -> str:
        if any(message["role"] not in ("user", "assistant", "tool") for message in messages):
            raise ValueError("System role not supported")
        said = (f"[{message['role']}] {message['content']}{self._calls(message)}" for message in messages)
        return "<s>" + "".join([*(f"({tool['name']})" for tool in tools), *said])

    def _calls(self, message: dict[str, Any]) -> str:
        return "".join(f"{call['name']}{call['arguments']['of']}" for call in message.get("tool_calls", ()))


@dataclass
class Corpus:
    """Files by name; the one to read (the folder if there are several); what is read, or why not and what then helps."""

    files: dict[str, bytes]
    found: str = BOTH
    field: str | None = None
    split: str | None = None
    refused: str = ""
    instead: dict[str, bytes] | None = None  # files after the remedy
    remedy: str | None = None  # the field that the remedy is
    folder: bool = False


def file(name: str, content: bytes, found: str = BOTH, **more: Any) -> Corpus:
    return Corpus({name: content}, found, **more)


def other(name: str, content: bytes, refused: str, **more: Any) -> Corpus:
    """A file that is no text; converted to one, it is read."""
    return Corpus({name: content}, PLAIN, refused=refused, instead={"converted.txt": PLAIN.encode()}, **more)


ASKED, ANSWERED = "[user] How?[assistant] So.", "[user] Why?[assistant] Because."
CHATS = f"{ASKED}\n\n{ANSWERED}"
CALLED = "(add)[user] How?[assistant] add[1, 2][tool] 3"
CORPORA = {
    # plain text
    "plain text": file("a.txt", PLAIN.encode(), PLAIN),
    "upper case suffix": file("A.TXT", PLAIN.encode(), PLAIN),
    "Markdown": file("a.md", PLAIN.encode(), PLAIN),
    "reStructuredText": file("a.rst", PLAIN.encode(), PLAIN),
    "TeX": file("a.tex", PLAIN.encode(), PLAIN),
    "no suffix": file("enwik9", PLAIN.encode(), PLAIN),
    "source code by name": file("a.py", PLAIN.encode(), PLAIN),
    "a log by name": file("a.log", PLAIN.encode(), PLAIN),
    "byte order mark": file("a.txt", BOM + PLAIN.encode(), PLAIN),
    "Windows line ends": file("a.txt", PLAIN.replace("\n", "\r\n").encode(), PLAIN),
    "WikiText raw": file("wiki.raw", b" \n = T = \n", "\n\n = T = \n"),
    "text compressed with gzip": file("a.txt.gz", gzip.compress(PLAIN.encode()), PLAIN),
    "text compressed with zstd": file("a.txt.zst", zstandard.compress(PLAIN.encode()), PLAIN),
    "text compressed with xz": file("a.txt.xz", lzma.compress(PLAIN.encode()), PLAIN),
    "text compressed with bzip2": file("a.txt.bz2", bz2.compress(PLAIN.encode()), PLAIN),
    "compressed without a suffix that says so": file("a.txt", gzip.compress(PLAIN.encode()), PLAIN),
    "a suffix of compression on what is not compressed": file("a.txt.gz", PLAIN.encode(), PLAIN),
    # JSON
    "JSON lines": file("a.jsonl", texts()),
    "JSON lines, other suffix": file("a.ndjson", texts()),
    "JSON lines, no suffix": file("part-00000", texts()),
    "JSON lines called .json": file("c4.json", texts()),
    "JSON lines, byte order mark": file("a.jsonl", BOM + texts()),
    "JSON lines, blank lines and Windows ends": file("a.jsonl", texts().replace(b"\n", b"\r\n\r\n")),
    "a shard of C4": file("c4-train.00000-of-01024.json.gz", gzip.compress(texts())),
    "JSON lines, zstd": file("a.jsonl.zst", zstandard.compress(texts())),
    "JSON lines, zstd of several frames": file("a.jsonl.zst", b"".join(map(zstandard.compress, texts().splitlines(True)))),
    "JSON lines, xz": file("a.JSONL.XZ", lzma.compress(texts())),
    "an array of objects": file("a.json", json.dumps([{"text": ONE}, {"text": TWO}]).encode()),
    "an array, indented": file("a.json", json.dumps([{"text": ONE}, {"text": TWO}], indent=2).encode()),
    "an array of strings": file("a.json", json.dumps([ONE, TWO]).encode()),
    "strings, one a line": file("a.jsonl", lines(ONE, TWO)),
    "objects over several lines": file("a.json", b"\n".join(json.dumps({"text": t}, indent=1).encode() for t in (ONE, TWO))),
    "an object around the rows": file("a.json", json.dumps({"version": 1, "data": [{"text": ONE}, {"text": TWO}]}).encode()),
    "null among texts": file("a.jsonl", lines({"text": ONE}, {"text": None}, {"text": TWO})),
    "rows without the field among others": file("a.jsonl", lines({"text": ONE}, {"id": 7}, {"text": TWO})),
    "a name twice in metadata": file("a.jsonl", b'{"text": "a", "m": {"x": 1, "x": 2}}\n', "a"),
    "the field is called content": file("a.jsonl", texts("content")),
    "another field": file("a.jsonl", texts("body"), refused='no string field "text", only body; say .* --field', remedy="body"),
    "a field in a field": file(
        "a.jsonl", lines({"m": {"t": ONE}}, {"m": {"t": TWO}}), refused="only m; say .*--field", remedy="m.t"
    ),
    "a field whose name has a dot": file("a.csv", f'm.t,n\n"{ONE}",1\n"{TWO}",2\n'.encode(), field="m.t"),
    "a dot in a name of JSON lines": file("a.jsonl", lines({"m.t": ONE}, {"m.t": TWO}), field="m.t"),
    "no such field in a field": file(
        "a.jsonl", lines({"m": {"t": ONE}}, {"m": {"t": TWO}}), field="m.u", refused='no field "m.u", only m', remedy="m.t"
    ),
    "a field in what is null at first": file("a.jsonl", lines({"m": None}, {"m": {"t": ONE}}, {"m": {"t": TWO}}), field="m.t"),
    "a field that is a number": file(
        "a.jsonl", lines({"text": 7, "body": ONE}), ONE, refused=r"it is a number; .*--field.*body \(text\)", remedy="body"
    ),
    "no field of the wanted name": file("a.jsonl", texts(), field="body", refused='no field "body", only text', remedy="text"),
    # tables
    "CSV": file("a.csv", table(",", ("id", "text"), ("1", ONE), ("2", TWO))),
    "CSV with semicolons": file("a.csv", table(";", ("id", "text"), ("1", ONE), ("2", TWO))),
    "CSV with line ends in values": file("a.csv", table(",", ("text",), ("a\nb",), ("c",)), "a\nb\n\nc"),
    "CSV of one column, nothing quoted": file("a.csv", b'text\nCame; saw, won.\n"So, on."\n', "Came; saw, won.\n\nSo, on."),
    "CSV, a text with commas that is not quoted": file(
        "a.csv",
        b"id,text\n1,Came, saw\n",
        "Came, saw",
        refused="line 2: 3 cells, and the first line has 2; a text",
        instead={"a.csv": b'id,text\n1,"Came, saw"\n'},
    ),
    "CSV, gzip": file("a.csv.gz", gzip.compress(table(",", ("text",), (ONE,), (TWO,)))),
    "CSV, other column": file("a.csv", table(",", ("id", "t"), ("1", ONE)), ONE, refused="only id, t; say", remedy="t"),
    "TSV": file("a.tsv", table("\t", ("id", "text"), ("1", ONE), ("2", TWO))),
    "Parquet": file("a.parquet", parquet(text=[ONE, None, TWO], n=[1, 2, 3])),
    "Parquet, no suffix": file("0000", parquet(text=[ONE, TWO])),
    "Parquet, text in bytes": file("a.parquet", parquet(text=[ONE.encode(), TWO.encode()])),
    "Parquet, large and shared strings": file(
        "a.pq", parquet(text=pyarrow.array([ONE, TWO], pyarrow.large_string()).dictionary_encode())
    ),
    "Parquet, text is a list": file(
        "a.parquet", parquet(text=[["a"]], body=[ONE]), ONE, refused=r"it is a list; .*body", remedy="body"
    ),
    "Parquet, conversations": file("a.parquet", parquet(messages=[chat("How?", "So."), chat("Why?", "Because.")]), CHATS),
    "Parquet, gzip": Corpus(
        {"a.parquet.gz": gzip.compress(parquet(text=[ONE, TWO]))},
        refused="decompress it first",
        instead={"a.parquet": parquet(text=[ONE, TWO])},
    ),
    "Arrow": file("a.arrow", arrow(False, text=[ONE, TWO])),
    "Arrow stream": file("data-00000-of-00001.arrow", arrow(True, text=[ONE, TWO])),
    "Feather": file("a.feather", arrow(False, text=[ONE, TWO])),
    # conversations
    "messages": file("a.jsonl", lines({"messages": chat("How?", "So.")}, {"messages": chat("Why?", "Because.")}), CHATS),
    "conversations": file(
        "a.json",
        json.dumps([{"conversations": chat("How?", "So.", names=("from", "value"), roles=("human", "gpt"))}]).encode(),
        ASKED,
    ),
    "instruction, input, output": file(
        "a.json",
        json.dumps([{"instruction": "How?", "input": "Now.", "output": "So."}]).encode(),
        "[user] How?\n\nNow.[assistant] So.",
    ),
    "prompt, completion": file("a.jsonl", lines({"prompt": "How?", "completion": "So."}), ASKED),
    "tool calls, whose arguments are JSON": file(
        "a.jsonl",
        lines({"messages": calling({"name": "add", "arguments": '{"of": [1, 2]}'}), "tools": [{"name": "add"}]}),
        CALLED,
    ),
    "tool calls in a table": file(
        "a.parquet",
        parquet(messages=[calling({"name": "add", "arguments": {"of": [1, 2]}})], tools=['[{"name": "add"}]']),
        CALLED,
    ),
    "a conversation in a field of another name": file(
        "a.jsonl", lines({"chosen": chat("How?", "So."), "rejected": chat("How?", "No.")}), ASKED, field="chosen"
    ),
    "a conversation in a field of another": file(
        "a.jsonl", lines({"data": {"turns": chat("How?", "So.")}}), ASKED, field="data.turns"
    ),
    "preferences whose answer begins with the prompt": file(
        "a.jsonl", lines({"prompt": "How?", "chosen": chat("How?", "So."), "rejected": chat("How?", "No.")}), ASKED
    ),
    "preferences whose answer is a message": file(
        "a.jsonl", lines({"prompt": "How?", "chosen": [{"role": "assistant", "content": "So."}]}), ASKED
    ),
    "preferences with a system": file(
        "a.jsonl",
        lines({"system": "Be kind.", "prompt": "How?", "chosen": [{"role": "assistant", "content": "So."}]}),
        "[user] Be kind.\n\nHow?[assistant] So.",
    ),
    "an answer that repeats a turn is no continuation": file(
        "a.jsonl",
        lines(
            {
                "prompt": chat("A?", "B."),
                "chosen": [{"role": r, "content": c} for r, c in (("user", "C?"), ("assistant", "B."))],
            }
        ),
        "[user] A?[assistant] B.[user] C?[assistant] B.",
    ),
    "prompt and completion are conversations": file(
        "a.jsonl", lines({"prompt": chat("How?"), "completion": [{"role": "assistant", "content": "So."}]}), ASKED
    ),
    "question, answer": file("a.jsonl", lines({"question": "How?", "answer": "So."}), ASKED),
    "a system that the template does not know": file(
        "a.jsonl",
        lines({"messages": [{"role": "system", "content": "Be kind."}, *chat("How?", "So.")]}),
        "[user] Be kind.\n\nHow?[assistant] So.",
    ),
    "a system beside a conversation": file(
        "a.jsonl",
        lines({"system": "Be kind.", "conversations": chat("How?", "So.", names=("from", "value"), roles=("human", "gpt"))}),
        "[user] Be kind.\n\nHow?[assistant] So.",
    ),
    "a system beside an answer that has the question": file(
        "a.jsonl",
        lines({"system": "Be kind.", "prompt": [], "chosen": chat("How?", "So.")}),
        "[user] Be kind.\n\nHow?[assistant] So.",
    ),
    "a system beside a conversation that has one": file(
        "a.jsonl",
        lines({"system": "Be rude.", "messages": [{"role": "system", "content": "Be kind."}, *chat("How?", "So.")]}),
        "[user] Be kind.\n\nHow?[assistant] So.",
    ),
    "one row with a list of objects in it": file(
        "a.jsonl", lines({"instruction": "How?", "output": "So.", "history": chat("Before?")}), ASKED
    ),
    "one article with a list of objects in it": file("a.json", lines({"paragraphs": [{"text": "No."}], "content": BOTH})),
    "content in parts": file(
        "a.jsonl", lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]}), "[user] How?"
    ),
    # folders
    "a folder": Corpus({"b/c.txt": TWO.encode(), "a.jsonl": lines({"text": ONE})}, folder=True),
    "hidden files, and those of systems": Corpus(
        {
            "a.txt": ONE.encode(),
            "._a.txt": b"\0\5\x16\7",
            ".ipynb_checkpoints/a.txt": ONE.encode(),
            "__MACOSX/a.txt": b"\0",
            "_SUCCESS": b"",
            "b.txt": TWO.encode(),
        },
        folder=True,
    ),
    "a data set's repository": Corpus(
        {
            "README.md": b"---\nlicense: mit\n---\n",
            "dataset_infos.json": b"{}",
            "data/train-0.parquet": parquet(text=[ONE]),
            "data/train-1.parquet": parquet(text=[TWO]),
        },
        folder=True,
    ),
    "a saved data set, and what map made of it": Corpus(
        {
            "train/data-00000-of-00001.arrow": arrow(True, text=[ONE, TWO]),
            "train/cache-87083d2d4e5b.arrow": arrow(True, text=[ONE.upper(), TWO.upper()]),
            "train/cache-1f_00000_of_00002.arrow": arrow(True, text=[ONE.upper()]),
            "train/state.json": b"{}",
        },
        folder=True,
    ),
    "text beside a pruned model": Corpus({"a.txt": BOTH.encode(), "pruned/pruning.json": b'{"kind": "report"}'}, folder=True),
    "a split of a data set's repository": Corpus(
        {"data/train.jsonl": lines({"text": ONE}), "data/test.jsonl": lines({"text": TWO})}, TWO, split="test", folder=True
    ),
    "a folder without texts": Corpus(
        {"a.png": b"\x89PNG", "b.xyz": PLAIN.encode()},
        PLAIN,
        folder=True,
        refused="holds no file of a kind .*there are .png, .xyz: give such a file by name",
        instead={"b.xyz": PLAIN.encode()},
    ),
    # what is no text
    "Latin-1": Corpus(
        {"a.txt": "naïve\n".encode("latin-1")},
        "naïve\n",
        refused="not UTF-8 .*iconv -f latin1 -t UTF-8",
        instead={"a.txt": "naïve\n".encode("latin-1").decode("latin-1").encode()},
    ),
    "UTF-16": other("a.txt", PLAIN.encode("utf-16"), "UTF-16.*iconv -f UTF-16 -t UTF-8"),
    "PDF": other("a.pdf", b"%PDF-1.7 ...", ".pdf cannot be read; convert it to .txt"),
    "PDF called .txt": other("a.txt", b"%PDF-1.7 ...", "is a PDF; convert it to .txt"),
    "Word": other("a.docx", zipped("word/document.xml", b"x"), ".docx cannot be read; convert it to .txt"),
    "HTML": other("a.html", b"<p>", ".html cannot be read; convert it to .txt"),
    "a zip archive": Corpus(
        {"a.zip": zipped("a.txt", PLAIN.encode())},
        PLAIN,
        refused="unpack it, and give the folder",
        instead={"x/a.txt": PLAIN.encode()},
    ),
    "a tar archive": Corpus(
        {"a.tar.gz": gzip.compress(tarred("a.txt", PLAIN.encode()))},
        PLAIN,
        refused="unpack it, and give the folder",
        instead={"x/a.txt": PLAIN.encode()},
    ),
    "a spreadsheet": Corpus(
        {"a.xlsx": zipped("xl/workbook.xml", b"x")},
        ONE,
        refused="save it as .csv",
        instead={"a.csv": table(",", ("text",), (ONE,))},
    ),
    "a database": other("a", b"SQLite format 3\0", "is a database; save it as"),
    "an array of tokens": other("train.bin", b"\1\0\2\0", "--save-tokens"),
    "compressed with lz4": other("a.txt.lz4", b"\x04\x22\x4d\x18", "decompress it first"),
    "not all of it": Corpus(
        {"a.txt.gz": gzip.compress(PLAIN.encode())[:-9]},
        PLAIN,
        refused="not all of it is there.*fetch it again",
        instead={"a.txt.gz": gzip.compress(PLAIN.encode())},
    ),
    "Parquet without text": Corpus(
        {"a.parquet": parquet(said=[ONE])}, ONE, refused=r'^text .*a\.parquet: no string field "text", only said', remedy="said"
    ),
    "damaged Parquet": Corpus(
        {"a.parquet": parquet(text=[ONE])[:-9]},
        ONE,
        refused="damaged .*fetch it again",
        instead={"a.parquet": parquet(text=[ONE])},
    ),
    "broken JSON": Corpus({"a.jsonl": texts() + b'{"text": \n'}, refused="line 3: not JSON", instead={"a.jsonl": texts()}),
    "broken JSON in an array": Corpus(
        {"a.json": b'[{"text": "a"},\n{"text" "b"}]'}, "a", refused="line 2: not JSON", instead={"a.json": b'[{"text": "a"}]'}
    ),
}


def write(folder: Path, files: dict[str, bytes], whole: bool) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder if whole or len(files) > 1 else (folder / next(iter(files)))


@pytest.mark.parametrize("name", CORPORA)
def test_corpora(tmp_path: Path, name: str) -> None:
    corpus = CORPORA[name]
    path = write(tmp_path / "corpus", corpus.files, corpus.folder)
    text = Text(str(path), corpus.field, corpus.split)
    if corpus.refused:
        with pytest.raises(InputError, match=corpus.refused):
            read(text, "calibration", Templated())
        if corpus.instead is not None:
            path = write(tmp_path / "instead", corpus.instead, whole=False)
        text = Text(str(path), corpus.remedy or corpus.field)
    assert read(text, "calibration", Templated()) == corpus.found


def test_there_are_sixty_kinds() -> None:
    assert len(CORPORA) >= 60


def test_a_chat_template_that_tells_the_day_tells_one_day(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.jsonl": lines({"messages": chat("How?")})}, whole=False)
    template = "{% if strftime_now is defined %}{{ strftime_now('%-d %B, %d %b %Y: ') }}{% endif %}{{ messages[0].content }}"
    tokenizer = train_tokenizer()
    for given in (template, {"default": template, "rag": "another"}):
        tokenizer.chat_template = given
        assert read(path, "calibration", tokenizer) == "26 July, 26 Jul 2024: How?"
