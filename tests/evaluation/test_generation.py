"""Answers that models write: one by one and together, up to their stop texts, and what evaluate says of them."""

import json

import pytest
import torch
from transformers import GenerationConfig

import uniprune
from conftest import GENERATION_SETTINGS, tiny_model
from small_models import random_model
from task_rows import ROWS
from uniprune import InputError
from uniprune.evaluation.answers import answer, tokenise
from uniprune.evaluation.generation import generate, write
from uniprune.tasks.question import Prompt, Task


def prompts(*texts, stop=(), tokens=12):
    return Task("t", "gsm8k", tuple(Prompt(text, "#### 4", stop, tokens) for text in texts))


def written(model, tokenizer, task, context=128):
    return write(model, tokenizer, task.questions, tokenise(task, tokenizer, context))


@pytest.mark.parametrize("family", ["llama", "gpt2", "recurrent_gemma"])
def test_answers_written_together_are_those_of_each_alone(tokenizer, family):
    """Prompts of several lengths, more than a batch: padding changes no token of a float32 model.

    To RecurrentGemma padding is text like any other.
    """
    model = tiny_model(family) if family in ("llama", "gpt2") else random_model(family, vocab_size=512)
    for parameter in model.parameters():
        parameter *= 3 if family == "recurrent_gemma" else 1  # far from uniform: its tokens show what it has read
    texts = [f"{'So it goes on. ' * (number % 4)}Number {number}" for number in range(11)]
    alone = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(model, tokenizer, texts, 12)]
    assert written(model, tokenizer, prompts(*texts)) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("settings", GENERATION_SETTINGS, ids=lambda settings: next(iter(settings)))
def test_greedy_is_greedy_whatever_the_model_was_published_with(tokenizer, settings):
    model = tiny_model()
    wanted = generate(model, tokenizer, ["A tale of"], 12)
    own = model.generation_config = GenerationConfig(**settings)
    assert generate(model, tokenizer, ["A tale of"], 12) == wanted
    assert written(model, tokenizer, prompts("A tale of")) == [tokenizer.decode(wanted[0], skip_special_tokens=True)]
    assert model.generation_config is own


def test_answers_end_before_a_stop_text(tokenizer):
    """And writing ends with the last of a batch, not after all tokens."""
    model = tiny_model()
    (whole,) = written(model, tokenizer, prompts("A tale of", tokens=40))
    stop = whole[10:14]
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    (cut,) = written(model, tokenizer, prompts("A tale of", stop=("never said", stop), tokens=40))
    handle.remove()
    assert cut == whole[: whole.index(stop)]
    assert len(forwards) < 40


def test_a_prompt_leaves_room_for_its_answer(tokenizer):
    """What does not fit is cut at its beginning, and counted."""
    model, task = tiny_model(), prompts("So it goes on and on. " * 30, "Short.", tokens=100)
    tokens = tokenise(task, tokenizer, 128)
    assert [len(one.ids) for (one,) in tokens] == [28, len(tokenizer.encode("Short."))]
    (found,) = answer(model, [task], [tokens], tokenizer=tokenizer)
    assert found.result().questions_cut == found.cut == 1
    with pytest.raises(InputError, match="question 1: 128 new tokens do not fit the model's context of 128"):
        tokenise(prompts("Short.", tokens=128), tokenizer, 128)


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_accuracy_of_written_answers_against_another_model(loaded, tmp_path, tokenizer, monkeypatch):
    """Both kinds at once with choices; the other model says nothing that is right."""
    model, other = loaded, uniprune.Loaded(tiny_model(), tokenizer)
    torch.nn.init.zeros_(other.model.lm_head.weight)  # always the first token
    numbers = [ROWS["gsm8k"] | {"question": f"What is {number}?"} for number in range(4)]
    rules = [ROWS["ifeval"] | {"prompt": f"Say {number}."} for number in range(3)]
    tasks = [file_of(tmp_path / name, rows) for name, rows in (("n.jsonl", numbers), ("r.jsonl", rules))]
    tasks.append(file_of(tmp_path / "arc.jsonl", [ROWS["arc"]] * 2))
    monkeypatch.setattr("uniprune.tasks.written.TOKENS", {"gsm8k": 16, "ifeval": 24})
    found = uniprune.evaluate(model, tasks=tasks, against=other)
    numbers, rules, arc = (found.tasks[name] for name in tasks)
    assert (numbers.metric, list(numbers.others), numbers.acc) == ("strict", ["flexible"], 0)
    assert numbers.capability == arc.capability.replace("knowledge", "reasoning") == "reasoning"
    assert (rules.metric, rules.capability) == ("prompt_strict", "instructions")
    assert {name: one.n for name, one in rules.others.items()} == {
        "prompt_loose": 3,
        "instruction_strict": 6,
        "instruction_loose": 6,
    }
    assert rules.against["acc"].gained - rules.against["acc"].lost == round(3 * (rules.acc - rules.against["acc"].reference))
    assert list(found.capabilities) == ["knowledge", "reasoning", "instructions"]
