"""With which published numbers a result compares, and that the documents show just those."""

import re
from pathlib import Path

import pytest

from conftest import shared
from uniprune.data.text import Sample, Text, TextFacts
from uniprune.data.windows import load_windows
from uniprune.evaluation import protocols
from uniprune.evaluation.perplexity import load_documents
from uniprune.evaluation.protocols import PROTOCOLS, followed_protocols, sentence
from uniprune.evaluation.results import Evaluation, FollowedProtocol

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


class Letters:
    bos_token_id = eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [1] * len(text)}

    def encode(self, text, **options):
        return [1] * (len(text) // 100)


def result(text_changes=None, **changes):
    text = {"text": "t", "windows": 141, "available_windows": 141, "bos": "first"}
    text |= {"sample": Sample(text_sha256=protocols.ROWS)} | (text_changes or {})
    facts = {"model": "facebook/opt-125m", "length": 2048, "stride": 2048, "text": TextFacts(**text)} | changes
    return Evaluation(**facts, comparable=followed_protocols(facts["model"], Evaluation(**facts)))


def followed(model, length, text):
    facts = Evaluation(model=model, length=length, stride=length, text=text)
    return followed_protocols(model, facts)


def test_the_papers_protocol():
    found = result()
    assert found.comparable == [FollowedProtocol(protocol="WikiText-2, sequence length 2048", metric="perplexity", dense=27.66)]
    assert sentence(found) == (
        "Compares with published numbers of: WikiText-2, sequence length 2048 (perplexity); "
        "the dense model's published value is 27.66."
    )
    assert result(model="pruned").comparable[0].dense is None
    assert result(length=1024, stride=512).comparable[0].protocol == "WikiText-2, sequence length 1024, stride 512"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (result(length=512, stride=512), "length 512"),  # nearest to 1024 with stride 512
        (result({"windows": 24}), "24 of 141 samples"),
        (result({"bos": "each"}), "BOS in each sample"),
        (result(stride=1024), "stride 1024"),
        (result({"sample": None}), "the text is not the whole test split of WikiText-2"),
        (result({"sample": Sample(text_sha256="0")}), "the text is not the whole test split of WikiText-2"),
    ],
)
def test_what_compares_with_nothing(found, why):
    assert found.comparable == []
    assert sentence(found) == f"Compares with no published protocol: {why}."


def test_the_text_is_known_by_its_content():
    path = shared("wikitext2/wiki.test.raw")
    windows = load_windows(path, Letters(), use="evaluation", length=2048)
    assert [one.protocol for one in followed("m", 2048, windows.describe())] == ["WikiText-2, sequence length 2048"]
    pages = load_documents(Text(str(path)), Letters(), length=4096)
    assert pages.documents == 62
    text = pages.describe()
    assert [one.protocol for one in followed("m", 4096, text)] == ["lm-evaluation-harness, task wikitext"]
    assert not followed("m", 4096, text.model_copy(update={"in_context": False}))
    twice = followed("m", 4096, text.model_copy(update={"second_bos": True}))
    assert [one.protocol for one in twice] == ["lm-evaluation-harness 0.4.13, task wikitext, two BOS"]
    valid = load_windows(shared("wikitext2/wiki.valid.raw"), Letters(), use="evaluation", length=2048)
    assert not followed("m", 2048, valid.describe())


def test_the_document_shows_every_number_with_its_command():
    rows = re.findall(r"^\| `(\S+)` \| `(--text[^`]*)` \| ([\w ]+) \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    expected = [
        (model, protocol.flags, protocol.metric.replace("_", " "), f"{value:.2f}")
        for protocol in PROTOCOLS
        for model, value in protocol.dense.items()
    ]
    assert rows == expected
