"""How close two models' predictions are, against full distributions; and what they write."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import uniprune
from conftest import tiny_model
from uniprune import InputError, Loaded
from uniprune.data.windows import Windows
from uniprune.evaluation.divergence import Recording, closeness
from uniprune.evaluation.generation import generate, side_by_side
from uniprune.evaluation.perplexity import perplexity


@pytest.fixture
def windows():
    tokens = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, "random", 3, "none")


def noisy(family="llama", **changes):
    model = tiny_model(family, **changes)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model


def recorded(model, windows):
    with Recording(model, windows) as recording:
        perplexity(model, windows)
    return recording


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_and_agreement_are_those_of_the_logits(windows, family):
    ours, theirs = noisy(family), tiny_model(family)
    found = closeness(recorded(ours, windows), recorded(theirs, windows), windows)
    p, q = (functional.log_softmax(model(windows.tokens).logits[:, :-1].float(), -1) for model in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl > 0.001
    means = kl.mean(1)
    assert found.kl_stderr == pytest.approx(float(means.std() / math.sqrt(3)), rel=1e-3)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.tokens == 3 * 19


def test_of_overlapping_windows_the_predictions_are_those_of_the_perplexity(windows):
    overlapping = replace(windows, tokens=windows.tokens.flatten().unfold(0, 20, 5)[:4], available=4, stride=5)
    ours, theirs = noisy(), tiny_model()
    found = closeness(recorded(ours, overlapping), recorded(theirs, overlapping), overlapping)
    p, q = (functional.log_softmax(model(overlapping.tokens).logits[:, :-1].float(), -1) for model in (theirs, ours))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == perplexity(ours, overlapping).tokens == 19 + 3 * 5
    assert found.kl == pytest.approx(float((kl[0].sum() + kl[1:, -5:].sum()) / found.tokens), rel=1e-4)


def test_a_model_is_close_to_itself(windows):
    model = tiny_model()
    found = closeness(recorded(model, windows), recorded(model, windows), windows)
    assert (found.kl, found.agreement) == (pytest.approx(0, abs=1e-6), 1)


def test_recording_leaves_no_hook(windows):
    model = tiny_model()
    kept = len(recorded(model, windows).hidden)
    model(windows.tokens)
    assert kept == 3
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_other_vocabularies_are_refused(windows):
    small = windows.tokens % 256
    few = Windows(small, "random", 3, "none")
    with pytest.raises(InputError, match=r"512 tokens and the reference 256"):
        closeness(recorded(tiny_model(), few), recorded(tiny_model(vocab_size=256), few), few)


def test_greedy_continuations_part_where_their_tokens_do(tokenizer):
    prompts = ["The import statement", "def f(x):"]
    ours, theirs = (generate(model, tokenizer, prompts, 6) for model in (noisy(), tiny_model()))
    for prompt, written in zip(prompts, theirs, strict=True):
        ids = tokenizer.encode(prompt)
        for token in written:  # one by one, without a cache
            assert int(tiny_model()(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    rows = side_by_side(prompts, ours, theirs, tokenizer)
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        assert mine[: row.same_tokens] == other[: row.same_tokens]
        assert row.same_tokens == 6 or mine[row.same_tokens] != other[row.same_tokens]
        assert row.model == tokenizer.decode(mine)


def test_evaluate_shows_two_models_side_by_side(tokenizer):
    asked = {"text_source": "builtin", "windows": 2, "length": 32, "new_tokens": 4}
    dense = Loaded(tiny_model(), tokenizer)
    found = uniprune.evaluate(Loaded(noisy(), tokenizer), against=dense, **asked)
    assert found.closeness.reference_perplexity == uniprune.evaluate(dense, **asked | {"new_tokens": None}).perplexity
    assert found.closeness.kl > 0
    assert len({row.prompt for row in found.generations}) == 2  # as many as there are windows
    own = uniprune.evaluate(Loaded(noisy(), tokenizer), against=dense, prompts=["import"], new_tokens=3)
    assert [row.prompt for row in own.generations] == ["import"]
    assert own.closeness is None
    assert "closeness" not in own.record()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["x"]}, "give --against"),
        ({"new_tokens": 3}, "give --against"),
        ({"against": True, "prompts": [""]}, "--prompt is empty"),
        ({"against": True, "prompts": ["x"], "new_tokens": 1000}, "do not fit the model's context of 128"),
        ({"against": True, "prompts": ["x"], "new_tokens": -1}, "--new-tokens -1 is negative"),
        (
            {"against": True, "prompts": ["x"], "new_tokens": 0},
            "--new-tokens 0 writes nothing after a prompt, and nothing else",
        ),
    ],
)
def test_bad_requests(loaded, options, message):
    against = {"against": loaded} if options.pop("against", False) else {}
    with pytest.raises(InputError, match=message):
        uniprune.evaluate(loaded, **against, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_source": "builtin", "windows": 1, "length": 32}, "reads the text as other tokens"),
        ({"prompts": ["import"], "new_tokens": 2}, "reads a prompt as other tokens"),
    ],
)
def test_what_is_read_as_other_tokens_cannot_be_compared(loaded, tokenizer, options, message):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab=tokenizer.get_vocab(), merges=[]))  # the same vocabulary, every byte by itself
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other = PreTrainedTokenizerFast(tokenizer_object=letters)
    with pytest.raises(InputError, match=message):
        uniprune.evaluate(loaded, against=Loaded(tiny_model(), other), **options)


def test_a_prompt_beyond_a_models_vocabulary_is_refused(loaded, tokenizer):
    small = Loaded(tiny_model(vocab_size=100), tokenizer)
    with pytest.raises(InputError, match=r"prompt 'import': token \d+ is beyond the model's vocabulary of 100"):
        uniprune.evaluate(loaded, against=small, prompts=["import"], new_tokens=2)
