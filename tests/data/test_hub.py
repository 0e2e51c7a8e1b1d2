"""Data sets of the hub, through what its real client does without a network: names, configurations, splits, shards."""

import gzip
import json
from collections import Counter

import pytest
from test_windows import Letters, letters, marked

from uniprune.data import mixture
from uniprune.data import text as text_module
from uniprune.data.text import Text, check_there, open_text, read
from uniprune.data.windows import load_windows
from uniprune.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """Answers for the hub with these splits; what was asked of it."""

    def answer(splits):
        asked = []

        def load_dataset(path, **options):
            asked.append((path, options))
            return splits[options["split"]] if "split" in options else splits

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


def stream(*rows, shards=1):
    def generate(parts):
        for part in parts:
            yield from ({"text": row, "n": 1} for row in rows[part::shards])

    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"parts": list(range(shards))})


def test_names_have_a_configuration_and_a_revision(hub):
    asked = hub({"train": stream("a"), "validation": stream("b")})
    assert read("owner/name", "calibration") == "a"
    assert read("owner/name:20231101.en", "evaluation") == "b"
    assert read(Text("owner/name@v1.0:main", split="validation"), "calibration") == "b"
    assert asked == [
        ("owner/name", {"streaming": True}),
        ("owner/name", {"streaming": True, "name": "20231101.en"}),
        ("owner/name", {"streaming": True, "name": "main", "revision": "v1.0"}),
    ]


def test_a_split_that_is_not_there(hub):
    hub({"train": stream("a"), "extra": stream("b")})
    with pytest.raises(InputError, match="has no split test or validation or dev, only train, extra; choose with --split"):
        read("owner/name", "evaluation")
    with pytest.raises(InputError, match="has no split tset, only train"):
        read(Text("owner/name", split="tset"), "evaluation")
    assert read(Text("owner/name", split="extra"), "evaluation") == "b"


def test_a_slice_of_a_split_is_loaded_as_a_whole(hub):
    asked = hub({"train[:2]": datasets.Dataset.from_dict({"text": ["a", "b"]})})
    assert read(Text("owner/name", split="train[:2]"), "calibration") == "a\n\nb"
    assert asked == [("owner/name", {"split": "train[:2]"})]


def test_fields_and_rows_without_text(hub):
    hub({"train": datasets.Dataset.from_dict({"body": ["a", None], "n": [1, 2]}).to_iterable_dataset()})
    with pytest.raises(InputError, match='no string field "text", only body, n; say with --field'):
        read("owner/name", "calibration")
    assert read(Text("owner/name", "body"), "calibration") == "a"


def test_a_real_client_reads_a_folder_and_its_splits(tmp_path):
    for split, text in (("train", "a"), ("test", "b")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read(Text(str(tmp_path), split="test"), "calibration") == "b"
    assert read(Text(str(tmp_path), split="train[:1]"), "evaluation") == "a"
    with pytest.raises(InputError, match="no split dev, only"):
        read(Text(str(tmp_path), split="dev"), "calibration")


def test_each_shard_has_an_even_share_and_is_shuffled(hub, monkeypatch):
    monkeypatch.setattr(mixture.Wanted, "whole", 1000)
    monkeypatch.setattr(mixture.Wanted, "share", 3000)
    hub({"train": stream(*marked("a", 4000), shards=4)})
    windows = load_windows("owner/name", Letters(False), use="calibration", length=80, count=40)
    numbers = [int(word[1:]) for row in letters(windows) for word in row.split() if word[:1] == "a" and len(word) == 5]
    shares = Counter(number % 4 for number in numbers)
    assert max(shares.values()) - min(shares.values()) <= 0.3 * len(numbers) / 4
    assert len({number // 400 for number in numbers}) == 10
    assert windows.sample.files == 4
    again = load_windows("owner/name", Letters(False), use="calibration", length=80, count=40)
    assert again.sha256 == windows.sha256


def test_what_cannot_be_had_says_so():
    with pytest.raises(InputError, match=r"text no-such/data cannot be loaded \(.*\); give a local file"):
        read("no-such/data", "calibration")
    for name in ("corpus.txt", "data/corpus.jsonl.gz", "data/missing.parquet", "a b/c", "just-a-word"):
        with pytest.raises(
            InputError, match=r"neither one of builtin.*nor an existing file or folder, nor the name of a Hub dataset"
        ):
            read(name, "calibration")


def test_one_text_alone_has_no_share(tmp_path, monkeypatch):
    """Also one that would be the name of a Hub dataset, with a configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text")
    for name in ("corpus/a.txt", "corpus", str(tmp_path / "corpus" / "a.txt")):
        with pytest.raises(InputError, match=rf"a share is for several texts, and {name} is one alone; leave :0\.25 out"):
            read(f"{name}:0.25", "calibration")


def test_a_folder_of_a_dataset_s_name_hides_none_of_its_configurations(tmp_path, monkeypatch):
    """What stands behind the colon is no share, then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    check_there("owner/name:a-config")


def test_fields_and_splits_are_of_rows_and_data_sets(tmp_path):
    with pytest.raises(InputError, match="has its own field and splits; leave --field and --split out, or give owner/name"):
        read(Text("builtin", split="test"), "calibration")
    with pytest.raises(InputError, match="leave --field and --split out"):
        read(Text("builtin", field="text"), "calibration")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="is a file, which has no splits; leave --split out"):
        read(Text(str(tmp_path / "a.txt"), split="test"), "calibration")
    with pytest.raises(InputError, match="is plain text, which has no fields; leave --field out"):
        read(Text(str(tmp_path / "a.txt"), field="text"), "calibration")


def test_c4_is_the_shard_of_the_papers(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        path = tmp_path / name.replace("/", "-")
        path.write_bytes(gzip.compress("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(1200)).encode()))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read("c4", "calibration").startswith("0\n\n1\n\n2")
    assert read("c4", "evaluation") == " ".join(map(str, range(text_module.C4_DOCUMENTS)))
    assert [name for _, name, _ in asked] == [
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ]


def test_wikitext2_is_read_as_rows_and_as_pages(hub):
    rows = ["", " = A = \n", "", " Some text . \n", " = B = \n", "", " More . \n"]
    asked = hub({"test": datasets.Dataset.from_dict({"text": rows})})
    assert read("wikitext2", "evaluation") == "\n\n".join(rows)
    (part,) = open_text(Text("wikitext2"), "evaluation")
    assert [read for read, _ in part.pages()] == [" = A =\n\nSome text. ", " = B =\n\nMore. "]
    assert asked[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})


def test_the_real_client_reads_the_revision_that_is_recorded(real_hub):
    """From a server on this machine: all of a run's text is of one commit, whatever the branch does meanwhile."""

    def rows(word):
        return "".join(json.dumps({"text": f"{word} " * 200}) + "\n" for _ in range(100)).encode()

    repository = real_hub.add("owner/data", {"data/train.jsonl": rows("old"), "README.md": b""})
    first = repository.tags["v1"] = repository.branches["main"]
    second = repository.commit({"data/train.jsonl": rows("new"), "README.md": b""})
    for name, commit, word in (
        ("owner/data@v1", first, "old"),
        ("owner/data", second, "new"),
        (f"owner/data@{first}", first, "old"),
    ):
        windows = load_windows(name, Letters(False), use="calibration", length=40, count=8)
        assert windows.describe().sample.commit == commit
        assert all(word in text for text in letters(windows))
    with pytest.raises(InputError, match="text owner/data has no revision 'v2'; leave it out"):
        read("owner/data@v2", "calibration")
    with pytest.raises(InputError, match=r"text owner/nothing cannot be loaded \(.*\); give a local file"):
        read("owner/nothing", "calibration")
