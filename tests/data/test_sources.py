"""Several texts and their shares, and samples that the model writes itself."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

import uniprune
from conftest import GENERATION_SETTINGS, prose_and_numbers, tiny_model
from uniprune import InputError, Loaded, Recipe
from uniprune.data.sources import TextSource, interleaved, parse, shares
from uniprune.data.windows import Windows, load_windows, save_windows
from uniprune.job.samples import calibration_windows, generated

LENGTH = 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files, one of letters and one of digits."""
    folder = tmp_path_factory.mktemp("texts")
    prose_and_numbers(folder)
    return folder


@pytest.fixture
def both(texts):
    return str(texts / "prose.txt"), f"digits={texts / 'numbers.txt'}:0.25"


def windows_of(loaded, text, **settings):
    recipe = Recipe(**({"text": text, "windows": 16, "length": LENGTH} | settings))
    windows = calibration_windows(recipe, loaded.tokenizer, loaded.model)
    return windows if windows.prompts is None else generated(windows, loaded, recipe.seed)


def is_digits(tokenizer, row):
    return tokenizer.decode(row).replace(" ", "").isdigit()


# -------------------------------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("c4", [TextSource("c4", "c4")]),
        ("owner/name:2.5", [TextSource("name:2.5", "owner/name:2.5")]),  # one text has no share
        (["c4", "code=file.txt:0.25"], [TextSource("c4", "c4"), TextSource("code", "file.txt", 0.25)]),
        (
            ["owner/name:config:3", "a/b:2.0:1"],
            [TextSource("name:config", "owner/name:config", 3.0), TextSource("b:2.0", "a/b:2.0", 1.0)],
        ),
        (["self:.5", "x=y=z.txt:.5"], [TextSource("self", "self", 0.5), TextSource("x", "y=z.txt", 0.5)]),
    ],
)
def test_spelling(given, expected):
    assert parse(given) == expected


def test_a_file_that_is_there_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.txt", "c:0.5"):
        (tmp_path / name).write_text("text")
    assert parse(["a=b.txt:0.25", "c:0.5"])[1] == TextSource("c:0.5", "c:0.5")
    assert parse("a=b.txt") == [TextSource("a=b.txt", "a=b.txt")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "b"], [0.5, 0.5]),
        (["a", "b:0.25"], [0.75, 0.25]),
        (["a:3", "b:1"], [0.75, 0.25]),
        (["a", "b:.5", "c"], [0.25, 0.5, 0.25]),
    ],
)
def test_shares_are_normalised_or_the_rest(given, expected):
    assert shares(parse(given)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["c4", "code:1"], "leaves nothing for c4"),
        (["c4", "code:0"], "is not positive"),
        (["c4", "c4"], "two texts are called c4; give one of them another name, NAME=c4"),
        ([], "no text was given"),
    ],
)
def test_what_does_not_go_together(given, said):
    with pytest.raises(InputError, match=said):
        parse(given)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 200))
def test_any_beginning_has_the_shares(weights, count):
    """Of each source about its part, never a whole window less or as many more as there are sources."""
    parts = [weight / sum(weights) for weight in weights]
    order = interleaved(parts, count)
    for end in range(1, count + 1):
        taken = Counter(order[:end])
        assert all(-1 < part * end - taken[index] < 1 or len(parts) > 2 for index, part in enumerate(parts))
        assert all(part * end - taken[index] > -1 for index, part in enumerate(parts))


# ---------------------------------------------------------------------------------------------------------------- windows


def test_each_text_has_its_share_of_the_tokens(loaded, both):
    windows = windows_of(loaded, both)
    digits = [is_digits(loaded.tokenizer, row) for row in windows.tokens]
    assert sum(digits) == 4
    assert windows.by_source["digits"].tolist() == [index for index, one in enumerate(digits) if one]
    assert sum(digits[:8]) == sum(digits[8:]) == 2
    facts = windows.describe()
    assert facts.text == "prose.txt + digits"
    assert {name: (one.share, one.windows) for name, one in facts.sources.items()} == {
        "prose.txt": (0.75, 12),
        "digits": (0.25, 4),
    }
    alone = windows_of(loaded, both[0], windows=12)
    assert torch.equal(windows.tokens[windows.by_source["prose.txt"]], alone.tokens)
    assert alone.describe().sources is None


def test_the_seed_draws_all_of_them(loaded, both):
    first, again, other = (windows_of(loaded, both, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    for rows in first.by_source.values():
        assert not torch.equal(first.tokens[rows], other.tokens[rows])


@pytest.mark.parametrize("count", [None, 3])
def test_a_plan_knows_how_much_a_token_file_has(folder, tmp_path, count):
    save_windows(Windows(torch.ones(9, LENGTH, dtype=torch.int64), "made up", 9, "none"), tmp_path / "a.safetensors")
    recipe = Recipe(sparsity="2:4", controller="none", text=str(tmp_path / "a.safetensors"), windows=count)
    assert uniprune.plan(folder, recipe).tokens == (count or 9) * LENGTH


def test_a_token_file_keeps_the_source_of_each_window(loaded, both, tmp_path):
    windows, path = windows_of(loaded, (*both, "self:0.25")), tmp_path / "tokens.safetensors"
    save_windows(windows, path)
    again = windows_of(loaded, str(path), windows=None, length=None)
    assert again.prompts is None
    assert torch.equal(again.tokens, windows.tokens)
    assert again.describe() == windows.describe()
    some = windows_of(loaded, str(path), windows=3, length=None)
    assert sum(one.windows for one in some.describe().sources.values()) == 3
    for use in ("calibration", "evaluation"):
        assert load_windows(path, None, use=use, length=LENGTH).by_source.keys() == {"prose.txt", "digits", "self"}


def test_a_token_file_beside_a_text(loaded, both, tmp_path):
    save_windows(windows_of(loaded, both[0], windows=6), tmp_path / "tokens.safetensors")
    windows = windows_of(loaded, (f"kept={tmp_path / 'tokens.safetensors'}", both[1]), windows=8, length=None)
    assert windows.tokens.shape == (8, LENGTH)
    assert [len(rows) for rows in windows.by_source.values()] == [6, 2]


def test_what_was_written_before_is_not_written_again(loaded, tmp_path):
    earlier = windows_of(loaded, "self", windows=2)
    save_windows(earlier, tmp_path / "own.safetensors")
    windows = windows_of(loaded, (f"earlier={tmp_path / 'own.safetensors'}", "self"), windows=4, length=None, seed=1)
    assert torch.equal(windows.tokens[windows.by_source["earlier"]], earlier.tokens)
    assert windows.tokens[windows.by_source["self"]].any(1).all()


def test_a_field_is_for_those_texts_that_have_fields(loaded, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": f"Row {n}. " * 40}) + "\n" for n in range(9)))
    (tmp_path / "plain.txt").write_text("Plain text. " * 400)
    windows = windows_of(loaded, [str(tmp_path / "rows.jsonl"), str(tmp_path / "plain.txt")], windows=4, field="body")
    assert windows.describe().sources.keys() == {"rows.jsonl", "plain.txt"}
    with pytest.raises(InputError, match="--split train: none of the texts has splits"):
        windows_of(loaded, [str(tmp_path / "rows.jsonl"), str(tmp_path / "plain.txt")], windows=4, split="train")


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("both", {"windows": 2}, "digits has 25.00% of 2 samples, which is less than one"),
        ("both", {"windows": 10**6}, r"text .*prose.txt has \d+ windows of 16 tokens"),
        (("builtin", "no-such-file.txt:0.5"), {}, "text 'no-such-file.txt' is neither one of"),
        ("self", {"split": "train"}, "has no fields and splits"),
    ],
)
def test_shares_that_cannot_be_had(loaded, both, text, settings, said):
    with pytest.raises(InputError, match=said):
        windows_of(loaded, both if text == "both" else text, **settings)


# ------------------------------------------------------------------------------------------------------------------- self


def test_the_model_writes_what_it_finds_likely(loaded, both):
    """Sampled, not greedily: as likely as its own distribution's entropy says, and not the likeliest tokens."""
    loaded.model.lm_head.weight.data *= 12  # far from uniform
    recipe = Recipe(text=(both[0], "self"), windows=400, length=LENGTH)
    before = calibration_windows(recipe, loaded.tokenizer, loaded.model)
    after = generated(before, loaded, 0)
    rows = after.by_source["self"]
    assert len(rows) == 200
    assert not before.tokens[rows].any()
    assert list(before.prompts) == rows.tolist()
    prompts = torch.stack(list(before.prompts.values()))
    ids = torch.cat([prompts, after.tokens[rows]], 1)
    predicted = loaded.model(ids[:, :-1]).logits.log_softmax(-1)[:, prompts.shape[1] - 1 :]
    surprise = -predicted.gather(-1, after.tokens[rows][..., None])[..., 0] + (predicted.exp() * predicted).sum(-1)
    error = surprise.std() / surprise.numel() ** 0.5  # what a token tells beyond what tokens there tell on average
    assert abs(surprise.mean()) < 3 * error < 0.2


def test_what_is_written_is_drawn_by_the_seed(loaded, both):
    first, again, other = (windows_of(loaded, (both[0], "self"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    own = first.by_source["self"]
    assert not torch.equal(first.tokens[own], other.tokens[own])
    assert len({tuple(row.tolist()) for row in first.tokens[own]}) == len(own)


@pytest.mark.parametrize(
    "settings",
    [*GENERATION_SETTINGS, {"eos_token_id": list(range(200))}],
    ids=lambda settings: next(iter(settings)),
)
def test_it_writes_the_same_whatever_the_model_was_published_with(loaded, settings):
    wanted = windows_of(loaded, "self", windows=4).tokens
    own = loaded.model.generation_config = GenerationConfig(**settings)
    assert torch.equal(windows_of(loaded, "self", windows=4).tokens, wanted)
    assert loaded.model.generation_config is own


def test_prompts_are_of_the_other_texts_and_leave_room(loaded, both):
    """Prompts are no part of the windows; they are as long as the context allows."""
    found = calibration_windows(Recipe(text=(both[1], "self"), windows=8, length=LENGTH), loaded.tokenizer, loaded.model)
    assert [len(prompt) for prompt in found.prompts.values()] == [LENGTH] * 6
    assert all(is_digits(loaded.tokenizer, prompt) for prompt in found.prompts.values())
    whole = calibration_windows(Recipe(text=(both[1], "self"), windows=4, length=128), loaded.tokenizer, loaded.model)
    assert [len(prompt) for prompt in whole.prompts.values()] == [1] * 3  # the model's context has 128
    assert generated(whole, loaded, 0).tokens.shape == (4, 128)


def test_alone_it_begins_with_nothing(loaded):
    windows = calibration_windows(Recipe(text="self", windows=4, length=LENGTH), loaded.tokenizer, loaded.model)
    assert [prompt.tolist() for prompt in windows.prompts.values()] == [[loaded.tokenizer.eos_token_id]] * 4
    found = generated(windows, loaded, 0)
    assert found.describe().sources["self"].windows == 4
    assert found.tokens.any(1).all()


def test_windows_of_its_own_begin_with_bos_where_all_do(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", bos_token="<eos>")
    loaded = Loaded(tiny_model(), tokenizer)
    found = windows_of(loaded, ("builtin", "self"), bos="each")
    assert (found.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert found.with_bos == 16


@pytest.mark.parametrize("first", ["tokens", "self"])
def test_a_token_file_beside_it_does_not_say_how_they_begin(tokenizer, tmp_path, first):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", bos_token="<eos>")
    save_windows(Windows(torch.ones(16, LENGTH, dtype=torch.int64), "made up", 16, "none"), tmp_path / "a.safetensors")
    texts = [str(tmp_path / "a.safetensors"), "self"]
    found = windows_of(Loaded(tiny_model(), tokenizer), texts if first == "tokens" else texts[::-1], bos="each")
    assert (found.tokens[found.by_source["self"], 0] == tokenizer.bos_token_id).all()


def test_a_models_own_generation_settings_do_not_count(loaded, both):
    plain = windows_of(loaded, (both[0], "self"))
    config = loaded.model.generation_config
    config.do_sample, config.temperature, config.top_k, config.max_new_tokens = True, 0.1, 1, 3
    config.eos_token_id = [int(plain.tokens[plain.by_source["self"][0], 2])]
    assert torch.equal(windows_of(loaded, (both[0], "self")).tokens, plain.tokens)


def test_a_model_that_is_read_block_by_block_writes_nothing(folder, both, tmp_path):
    recipe = Recipe(text=(both[0], "self"), windows=4, length=LENGTH, sparsity="0.5", controller="none")
    memory = uniprune.plan(str(folder), recipe).executions["streamed"].memory
    with pytest.raises(InputError, match="text self is written by the whole model in memory"):
        uniprune.prune(str(folder), recipe, tmp_path / "out", max_memory=memory)
    assert not (tmp_path / "out").exists()
