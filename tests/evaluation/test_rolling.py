"""Documents read one by one: pieces by hand, perplexities against the definition. test_lm_eval.py compares with the harness."""

import math

import pytest
import torch

from conftest import tiny_model
from uniprune import InputError, Loaded, evaluate
from uniprune.common.significance import ratio_error
from uniprune.data.text import Text
from uniprune.evaluation import perplexity
from uniprune.evaluation.perplexity import load_documents


class Letters:
    bos_token_id, eos_token_id = ord("^"), ord("$")

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in "^" * add_special_tokens + text]


def spelled(pages):
    return [("".join(map(chr, piece.tokens)), piece.scored) for piece in pages.pieces]


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "abcdefg"}\n{"text": "hi j"}\n{"text": ""}\n')
    return Text(str(file))


def test_every_token_once_with_as_much_before_it_as_fits(documents):
    pages = load_documents(documents, Letters(), length=4, bos="each")
    assert spelled(pages) == [("^abcd", 4), ("cdefg", 3), ("^hi j", 4)]
    assert (pages.documents, pages.words, pages.bytes, pages.second_bos) == (3, 1 + 2 + 1, 11, False)
    pages = load_documents(documents, Letters(), length=9)
    assert spelled(pages) == [("^^abcdefg", 8), ("^^hi j", 5), ("^^", 1)]
    assert pages.second_bos
    assert load_documents(documents, Letters(), length=9, count=1).documents == 1


def test_a_document_without_tokens_tells_nothing_of_the_error():
    assert ratio_error([5.0, 0.0], [10, 0]) is None
    assert ratio_error([5.0, 0.0, 8.0], [10, 0, 20]) == pytest.approx(ratio_error([5.0, 8.0], [10, 20]))


def test_rows_without_text_are_counted(tmp_path, caplog):
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n{"text": null}\n{"text": null}\n')
    assert load_documents(Text(str(tmp_path / "d.jsonl")), Letters(), length=9).documents == 1
    assert "2 rows have no text (null) and are left out" in caplog.text


def test_bad_requests(documents, tmp_path, loaded):
    with pytest.raises(InputError, match="--bos first: with --rolling every document begins with BOS"):
        load_documents(documents, Letters(), length=9, bos="first")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        load_documents(Text(str(tmp_path / "empty.jsonl")), Letters(), length=9)
    for wrong in ({"stride": 3}, {"against": loaded}):
        with pytest.raises(InputError, match="--rolling reads documents one by one"):
            evaluate(loaded, text_source=documents.source, rolling=True, **wrong)


def test_perplexity_against_the_definition(tokenizer, tmp_path):
    texts = ["It is what it is. " * 9, "Short.", "Two words or " * 20]
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    model, length = tiny_model(), 16
    nats = tokens = 0
    parts = []
    for text in texts:
        before = nats, tokens
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        for start in range(1, len(ids), length):
            end = min(start + length, len(ids))
            seen = torch.tensor([ids[max(0, end - length - 1) : end]])
            predicted = model(input_ids=seen[:, :-1]).logits[0].double().log_softmax(-1)
            rows = range(seen.shape[1] - 1 - (end - start), seen.shape[1] - 1)
            nats -= sum(float(predicted[row, seen[0, row + 1]]) for row in rows)
            tokens += end - start
        parts.append((nats - before[0], tokens - before[1]))
    error = math.sqrt(3 / 2 * sum((loss - nats / tokens * count) ** 2 for loss, count in parts)) / tokens
    for source in (Loaded(model, tokenizer),):
        found = evaluate(source, text_source=str(tmp_path / "d.jsonl"), rolling=True, length=length)
        assert found.tokens == tokens
        assert found.nats == pytest.approx(nats, rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
        assert found.nats_stderr == pytest.approx(error, rel=1e-5)
        words = sum(len(text.split(" ")) for text in texts)
        assert found.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-6)


def test_batches_hold_what_fits():
    lengths = [5, 3000, 900, 900, 900, 40]
    batches = perplexity._alike(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert batches[0] == [1]
    assert all(len(batch) * lengths[batch[0]] <= 2048 for batch in batches[1:])
