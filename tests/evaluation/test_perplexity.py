"""Perplexity against numbers that can be had by hand."""

import math

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from conftest import tiny_model
from uniprune.data.windows import Windows
from uniprune.evaluation.perplexity import perplexity


class Bigram(torch.nn.Module):
    """Predicts the next token from a table of probabilities ``[token, next]``."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table).log())

    def forward(self, input_ids, use_cache):
        return CausalLMOutput(logits=self.table[input_ids])


def windows(rows):
    return Windows(torch.tensor(rows), "by hand", len(rows), "none")


def test_by_hand():
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    result = perplexity(model, windows([[0, 0, 1], [1, 1, 0]]))
    # predicted: 0->0 (1/2), 0->1 (1/2), 1->1 (3/4), 1->0 (1/4); the first token of each window is given
    expected = -math.log(0.5 * 0.5 * 0.75 * 0.25) / 4
    assert result.tokens == 4
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.windows, result.length, result.stride) == (2, 3, 3)
    means = [-math.log(0.5 * 0.5) / 2, -math.log(0.75 * 0.25) / 2]  # of the two windows
    assert result.nats_stderr == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-6)  # deviation / sqrt(2)
    assert perplexity(model, windows([[0, 0, 1]])).nats_stderr is None


def test_agrees_with_the_loss_of_transformers():
    model = tiny_model()
    ids = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids).loss  # mean over windows of equal length
    assert perplexity(model, windows(ids.tolist())).perplexity == pytest.approx(float(expected.exp()), rel=1e-5)


def test_batches_do_not_matter(monkeypatch):
    model = tiny_model()
    data = windows(torch.randint(0, 512, (5, 20), generator=torch.Generator().manual_seed(0)).tolist())
    whole = perplexity(model, data).nats
    monkeypatch.setattr("uniprune.evaluation.perplexity.batches", lambda tokens: list(tokens.split(2)))
    assert perplexity(model, data).nats == pytest.approx(whole, rel=1e-6)


def test_of_overlapping_windows_each_token_is_predicted_once():
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    text = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0])
    overlapping = Windows(text.unfold(0, 4, 2), "by hand", 3, "none", stride=2, words=3, size=9)
    result = perplexity(model, overlapping)
    # of a bigram the context does not matter: all transitions of the text, each once
    table = [[0.5, 0.5], [0.25, 0.75]]
    expected = -sum(math.log(table[a][b]) for a, b in zip(text.tolist(), text.tolist()[1:], strict=False))
    assert result.nats == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.windows, result.length, result.stride) == (7, 3, 4, 2)
    assert result.word_perplexity == pytest.approx(math.exp(expected / 3), rel=1e-6)
    assert result.byte_perplexity == pytest.approx(math.exp(expected / 9), rel=1e-6)
    per_window = [[table[0][0], table[0][1], table[1][1]], [table[1][0], table[0][1]], [table[1][0], table[0][0]]]
    beyond = [-sum(map(math.log, window)) - expected / 7 * len(window) for window in per_window]  # what the mean does not tell
    assert result.nats_stderr == pytest.approx(math.sqrt(3 / 2 * sum(loss**2 for loss in beyond)) / 7, rel=1e-5)


def test_perplexity_by_position(monkeypatch):
    monkeypatch.setattr("uniprune.evaluation.perplexity.POSITIONS", {"1-2": 2, "2-3": 3, "3-": 1 << 62})
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    result = perplexity(model, windows([[0, 0, 1, 1, 0], [1, 1, 0, 1, 1]]))
    assert result.by_position == pytest.approx(
        {
            "1-2": math.exp(-math.log(0.5 * 0.5 * 0.75 * 0.25) / 4),  # the predictions that see one token, and two
            "2-3": math.exp(-math.log(0.75 * 0.5) / 2),
            "3-": math.exp(-math.log(0.25 * 0.75) / 2),
        }
    )
    overlapping = Windows(torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 1, 1]]), "by hand", 2, "none", stride=1)
    assert perplexity(model, overlapping).by_position == pytest.approx(
        {
            "1-2": math.exp(-math.log(0.5 * 0.5) / 2),  # the second window predicts its last token alone
            "2-3": math.exp(-math.log(0.75)),
            "3-": math.exp(-math.log(0.25 * 0.75) / 2),
        }
    )
