"""The trie against every choice alone, one forward pass each; tokens against cases by hand."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, MambaConfig, MistralConfig, MptConfig

from conftest import VOCABULARY, tiny_model
from uniprune.errors import InputError
from uniprune.tasks import scoring
from uniprune.tasks.scoring import Tokens, encode, score


class Letters:
    """One token per character, but ``th`` is one; BOS and EOS are 0 and 1."""

    bos_token_id, eos_token_id = 0, 1

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text.replace("th", "θ")]


def questions(seed=0, count=7):
    """Questions of two to four choices with long and short common beginnings, one choice a prefix of another, two equal."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()

    made = []
    for number in range(count):
        context, answer = ids(3 + 5 * number), ids(4)
        choices = [Tokens(context + answer, 4), Tokens(context + answer[:2] + ids(6), 8), Tokens(context + answer, 4)]
        made.append([*choices, Tokens(context + answer[:1], 1)][: 2 + number % 3])
    return made


def alone(model, choice):
    """The definition, token by token."""
    nats, greedy = 0.0, True
    for end in range(len(choice.ids) - choice.scored, len(choice.ids)):
        logits = model(input_ids=torch.tensor([choice.ids[:end]])).logits[0, -1].double()
        nats += float(logits.log_softmax(-1)[choice.ids[end]])
        greedy &= int(logits.argmax()) == choice.ids[end]
    return nats, greedy


def check(model, asked):
    for found, question in zip(score(model, asked), asked, strict=True):
        for got, choice in zip(found, question, strict=True):
            nats, greedy = alone(model, choice)
            assert got.nats == pytest.approx(nats, abs=1e-4)
            assert got.greedy == greedy


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_the_trie_is_every_choice_alone(monkeypatch, family, tokens):
    monkeypatch.setattr(scoring, "BATCH_TOKENS", tokens)
    model = tiny_model(family)
    assert scoring._heeds_masks(model, questions(), scoring._batches(questions())[0].rows)
    check(model, questions())


def test_batches_begin_with_the_longest_question_last_in_its_batch(monkeypatch):
    """Rows as long as the longest question with the shortest; the largest that still fit; batches of whole rows."""
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 30)
    monkeypatch.setattr(scoring, "ROW_TOKENS", 1)
    lengths = [4, 30, 9, 12, 3, 5, 2]  # each question has one choice, and none begins like another
    batches = scoring._batches([[Tokens([length] * (length + 1), 1)] for length in lengths])
    assert [[[lengths[index] for index in row] for row in batch.rows] for batch in batches] == [
        [[2, 30]],
        [[12], [3, 9]],
        [[5], [4]],
    ]


def test_questions_that_begin_alike_share_a_row():
    """Few-shot: those of one subject have the same examples."""
    first, second = list(range(100, 120)), list(range(200, 220))
    asked = [[Tokens([*begin, *range(tail, tail + 4)], 1)] for tail in (1, 5, 9) for begin in (first, second)]
    units = [(unit.questions, unit.size) for unit in scoring._units(asked, 30)]
    assert units == [([0, 2, 4], 29), ([1, 3, 5], 29)]
    assert [unit.questions for unit in scoring._units(asked, 28)] == [[0, 2], [4], [1, 3], [5]]
    short = [[Tokens([7, tail, tail, tail, tail], 1)] for tail in (1, 2)]
    assert [unit.questions for unit in scoring._units(short, 28)] == [[0], [1]]  # too little in common
    model = tiny_model()
    assert scoring._heeds_masks(model, asked, scoring._batches(asked)[0].rows)
    check(model, asked)


def test_greedy_is_seen():
    model = tiny_model()
    context = [5, 6, 7]
    for _ in range(3):
        context.append(int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax()))
    ((right, wrong),) = score(model, [[Tokens(context, 3), Tokens([*context[:-1], context[-1] ^ 1], 3)]])
    assert (right.greedy, wrong.greedy) == (True, False)


def test_what_is_common_is_read_once():
    trie = scoring._Trie()
    assert trie.insert([7, 8, 9]) == [0, 1, 2]
    assert trie.insert([7, 8, 5, 9]) == [0, 1, 3, 4]
    assert trie.insert([8]) == [5]
    assert (trie.tokens, trie.depths) == ([7, 8, 9, 5, 9, 8], [0, 1, 2, 2, 3, 0])
    assert [row.nonzero()[0].tolist() for row in trie.sees()] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]


def mamba():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config)


def short_sighted():
    """Its sliding window is shorter than the longest question, and no mask of ours says so."""
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config)


def near_sighted():
    """Every other layer sees the last eight places of a row, whatever the positions say."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.5}
    return AutoModelForCausalLM.from_config(GPTNeoConfig(**shape, attention_types=[[["global", "local"], 1]], window_size=8))


def counting():
    """Its bias grows with the distance along the row (ALiBi)."""
    model = AutoModelForCausalLM.from_config(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY))
    for weight in model.parameters():
        weight.data.mul_(10)
    return model


def far_apart():
    """Short questions with many choices, which fit any window together, and long ones; the longest choice comes first."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(0, VOCABULARY, (5, 7), generator=draw).tolist()
    short = [[Tokens(ids[:5], 2), Tokens(ids[:3] + ids[5:], 2)] for ids in words]
    long = [sorted(question, key=lambda choice: -len(choice.ids)) for question in questions()]
    return short + long


@pytest.mark.parametrize("build", [short_sighted, near_sighted, counting])
def test_what_a_model_does_not_see_is_not_shared(build):
    """Whatever else is asked; and those questions that its layers see all of are read as tries."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    for asked in (far_apart(), far_apart()[:5], far_apart()[5:]):
        check(model, asked)


def test_few_shot_questions_are_not_all_read_twice(monkeypatch):
    """Of those that share a row a few are checked, not all."""
    shared, read, whole = list(range(100)), [], scoring._whole
    asked = [[Tokens([*shared, 200 + number, *range(5), letter], 1) for letter in range(4)] for number in range(20)]
    monkeypatch.setattr(
        scoring, "_whole", lambda *given: (read.extend(index for row in given[2] for index in row), whole(*given))[1]
    )
    score(tiny_model(), asked)
    assert 1 <= len(read) <= 5


@pytest.mark.parametrize("build", [short_sighted, near_sighted])
def test_questions_within_the_window_are_read_as_tries(monkeypatch, build):
    torch.manual_seed(0)
    model, read, as_trie = build().eval().requires_grad_(False), [], scoring._as_trie
    monkeypatch.setattr(scoring, "ROW_TOKENS", 8)
    monkeypatch.setattr(scoring, "_as_trie", lambda *asked: (read.append(asked[2]), as_trie(*asked))[1])
    score(model, far_apart())
    assert {index for batch in read for row in batch for index in row} >= set(range(4))


@pytest.mark.parametrize("build", [mamba, short_sighted])
def test_models_that_do_not_heed_masks_read_every_choice_whole(caplog, build):
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    with caplog.at_level(logging.INFO):
        check(model, questions())
    assert "every choice is read whole" in caplog.text


def test_tokens_are_split_where_the_context_ends():
    assert encode(Letters(), "ab", " c", 99) == Tokens([97, 98, 32, 99], 2)
    assert encode(Letters(), "ab ", "c", 99) == Tokens([97, 98, 32, 99], 2)  # the space is the answer's
    assert encode(Letters(), "abt", "hc", 99) == Tokens([97, 98, ord("θ"), 99], 1)  # as one text: the context loses its t
    assert encode(Letters(), "", " c", 99) == Tokens([0, 32, 99], 2)
    assert encode(Letters(), " ", "c", 99) == Tokens([0, 32, 99], 2)
    assert encode(Letters(), "abcdef", " g", 4) == Tokens(
        [100, 101, 102, 32, 103], 2, cut=3
    )  # 4 are read, the last is predicted


@pytest.mark.parametrize(("context", "answer", "limit"), [("ab", "", 9), ("t", "h", 9), ("ab", " cdefgh", 6)])
def test_answers_that_cannot_be_scored(context, answer, limit):
    with pytest.raises(InputError, match="tokens of its own"):
        encode(Letters(), context, answer, limit)
