"""Data sets of images and text, through the model's own processor: what the model sees is what plain transformers shows it."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

import uniprune
from command import run
from own import Halved
from pictures import gemma3, llava, write_model, write_rows
from uniprune import Loaded, Recipe
from uniprune.artefacts.masks import MasksFile
from uniprune.common import pictures
from uniprune.controller.descent import loop
from uniprune.data.images import windows as module
from uniprune.data.images.windows import ImageProcessing, load
from uniprune.data.text import Text
from uniprune.errors import InputError

LENGTH, COUNT = 48, 6


@pytest.fixture(scope="module", params=[llava, gemma3], ids=["llava", "gemma3"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__) / "model"
    write_model(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file)
    return file


def image_token(source):
    return AutoConfig.from_pretrained(source).image_token_id


def recipe(rows, **settings):
    settings = {"sparsity": "2:4", "windows": COUNT, "length": LENGTH, "controller": "none"} | settings
    return Recipe(text=str(rows), **settings)


def processing(source):
    return ImageProcessing(AutoProcessor.from_pretrained(source), AutoConfig.from_pretrained(source))


def shown(source, rows, use, count):
    """What the model is given for each window."""
    windows = load(Text(str(rows)), processing(source), use, LENGTH, count)
    return windows, list(windows.pictures.given.values())


def by_hand(source, windows, given):
    """Plain transformers, window by window: logits, and the inputs of one layer of the text decoder."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    inputs = []
    layer = model.model.language_model.layers[1].mlp.gate_proj
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    logits = [model(input_ids=ids[None], **one).logits[0].detach() for ids, one in zip(windows.tokens, given, strict=True)]
    return layer.weight.detach(), torch.cat(inputs).flatten(0, 1), logits


def test_the_first_tokens_of_a_window_are_the_processors_own(source, rows):
    processor = AutoProcessor.from_pretrained(source)
    windows, given = shown(source, rows, "evaluation", 8)
    assert windows.tokens.shape == (8, LENGTH)
    for number, (ids, one) in enumerate(zip(windows.tokens, given, strict=True)):
        row = json.loads(rows.read_text().splitlines()[number])
        image = Image.open(rows.parent / row["image"])
        own = processor(images=[image], text=processor.image_token + row["text"], return_tensors="pt")
        count = min(LENGTH, own["input_ids"].shape[1])
        assert torch.equal(ids[:count], own["input_ids"][0, :count])
        assert torch.equal(one["pixel_values"], own["pixel_values"])
        assert int((ids == image_token(source)).sum()) == 4
        if count < LENGTH:  # the rest is text of the next ones
            assert "\n\n" in processor.tokenizer.decode(ids[count:])
    assert given[0].keys() == own.keys() - {"input_ids", "attention_mask"}
    assert windows.describe().images == 8


def test_masks_are_those_of_what_the_model_sees(source, rows, tmp_path):
    """Wanda, by hand on what plain transformers gives to one layer."""
    report = uniprune.prune(source, recipe(rows), tmp_path / "out")
    assert report.calibration.images == report.calibration.windows == COUNT
    windows, given = shown(source, rows, "calibration", COUNT)
    weight, inputs, _ = by_hand(source, windows, given)
    scores = (weight.abs() * inputs.norm(dim=0)).reshape(len(weight), -1, 4)
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True).reshape(weight.shape)
    masks = MasksFile(tmp_path / "out" / "pruning" / "masks.safetensors")
    (name,) = (name for name in masks if name.endswith("layers.1.mlp.gate_proj"))
    assert torch.equal(masks[name], expected)
    uniprune.prune(source, recipe(rows, field="text"), tmp_path / "text")  # without images
    assert not torch.equal(MasksFile(tmp_path / "text" / "pruning" / "masks.safetensors")[name], expected)
    cards = [ModelCard.load(tmp_path / name / "README.md").text for name in ("out", "text")]
    assert "calibrated on images and text" in cards[0]
    assert "calibrated on text alone" in cards[1]


def test_the_controller_sees_them_too_and_place_holders_are_not_predicted(source, rows, tmp_path):
    report = uniprune.prune(source, recipe(rows, controller="feedback", steps=2), tmp_path / "out")
    assert report.controller.held_out_loss[0] > 0
    result = uniprune.evaluate(tmp_path / "out", text_source=rows, windows=4, length=LENGTH, against=source)
    windows, given = shown(source, rows, "evaluation", 4)
    sparse, dense = (by_hand(folder, windows, given)[2] for folder in (tmp_path / "out", source))
    token = image_token(source)
    nats, kl, count = 0.0, [], 0
    for ids, ours, theirs in zip(windows.tokens, sparse, dense, strict=True):
        counts = ids[1:] != token
        a, b = (logits[:-1].log_softmax(-1) for logits in (ours, theirs))
        nats -= float(a[counts].gather(1, ids[1:][counts, None]).sum())
        kl.append(float((b.exp() * (b - a)).sum(-1)[counts].sum()))
        count += int(counts.sum())
    assert count < 4 * (LENGTH - 1)
    assert result.tokens == result.closeness.tokens == count
    assert result.perplexity == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert result.closeness.kl == pytest.approx(sum(kl) / count, rel=1e-3, abs=1e-9)
    assert not result.generations


def test_the_controllers_divergence_is_that_of_the_tokens_that_count(source, rows):
    loaded = uniprune.load(source, dtype="float32", device="cpu")
    asked = recipe(rows, controller="feedback", steps=1, tuning={"held_out": 1})
    windows, _ = shown(source, rows, "calibration", COUNT)
    counts = (windows.tokens[-1:, 1:] != image_token(source)).sum() + 1
    seen, kl = [], loop.Loss.kl
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loss, "kl", lambda *given: seen.append(kl(*given)) or seen[-1])
        report = uniprune.prune_in_place(loaded, asked)
    assert report.controller.held_out_loss[0] == pytest.approx(seen[0] / int(counts))


def test_a_controller_of_ones_own_sees_them_if_it_declares_that(source, rows, tmp_path):
    """The metric on all windows, images included, is the metric alone."""
    own, alone = (
        uniprune.prune(source, recipe(rows, controller=controller), tmp_path / type(controller).__name__)
        for controller in (Halved(share=1.0), "none")
    )
    assert own.calibration.images == COUNT
    assert own.masks_sha256 == alone.masks_sha256

    class Unsighted(Halved):
        images = False

    with pytest.raises(InputError, match="--controller Unsighted reads text alone; leave it out"):
        uniprune.prune(source, recipe(rows, controller=Unsighted()), tmp_path / "out")


def test_a_model_that_was_loaded_reads_images_by_its_own_processor(source, rows):
    loaded = uniprune.load(source, dtype="float32", device="cpu")
    asked = {"text_source": rows, "windows": 2, "length": LENGTH}
    assert uniprune.evaluate(loaded, **asked).perplexity == uniprune.evaluate(source, dtype="float32", **asked).perplexity
    uniprune.prune_in_place(loaded, recipe(rows))
    assert pictures.shown(loaded.model) is None


def test_other_pixels_are_other_samples(source, rows, tmp_path):
    """Of as many tokens: the size of an image decides that."""
    shutil.copytree(rows.parent, tmp_path / "other")
    for file in (tmp_path / "other").glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file).convert("RGB"))).save(file)
    one, other = (shown(source, file, "evaluation", 4)[0] for file in (rows, tmp_path / "other" / rows.name))
    again, _ = shown(source, rows, "evaluation", 4)
    assert torch.equal(one.tokens, other.tokens)
    assert one.sha256 == again.sha256 != other.sha256


def test_methods_that_read_text_alone_have_no_row(source, rows, tmp_path):
    """That is said before the first row is made."""
    asked = {"text": str(rows), "eval_text": str(rows), "windows": COUNT, "length": LENGTH, "sparsities": ("2:4",)}
    for method, said in (("sparsegpt", "sparsegpt reads text alone"), ("refine", "--sequential and --refine read text alone")):
        with pytest.raises(InputError, match=f"{said}; leave (it|them) out, or take the text alone: --field text"):
            uniprune.compare(source, tmp_path / "table", methods=("wanda", method), **asked)
    assert not (tmp_path / "table").exists()


def test_channels_are_found_as_with_text(source, rows, tmp_path):
    """Where they lie does not depend on what is read."""
    found = [
        uniprune.permute(source, recipe(rows, field=field), tmp_path / str(field)).permuted.keys() for field in (None, "text")
    ]
    assert found[0] == found[1]
    assert any("o_proj" in name for name in found[0])


def test_a_table_with_images_in_it_and_a_folder_are_read_alike(source, rows, tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    images = [{"bytes": (rows.parent / row["image"]).read_bytes(), "path": None} for row in lines]
    parquet.write_table(pyarrow.table({"image": images, "text": [row["text"] for row in lines]}), tmp_path / "rows.parquet")
    named = [json.dumps({"file_name": row["image"], "text": row["text"]}) for row in lines]
    (rows.parent / "metadata.jsonl").write_text("\n".join(named))
    expected, *others = (
        load(Text(str(file)), processing(source), "calibration", LENGTH, 4, seed=3)
        for file in (rows, tmp_path / "rows.parquet", rows.parent / "metadata.jsonl")
    )
    (rows.parent / "metadata.jsonl").unlink()
    for found in others:
        assert torch.equal(found.tokens, expected.tokens)
        assert found.pictures.given.keys() == expected.pictures.given.keys()
    assert not torch.equal(load(Text(str(rows)), processing(source), "calibration", LENGTH, 4, seed=4).tokens, expected.tokens)


def test_a_curve_shows_them_too(source, rows, tmp_path):
    """As ``evaluate`` does: what a row's perplexity is of does not depend on the command."""
    scores, read = tmp_path / "scores.safetensors", {"windows": 2, "length": LENGTH, "dtype": "float32"}
    uniprune.calibrate(source, recipe(rows), scores)
    curve = uniprune.sweep(source, scores, tmp_path / "curve.json", "0.5", text_source=str(rows), **read)
    alone = uniprune.evaluate(source, text_source=str(rows), **read)
    assert curve.protocol.text.images == alone.text.images == 2
    assert curve.dense.perplexity == alone.perplexity


def test_images_that_are_not_needed_are_not_read(source, rows, monkeypatch):
    """More are drawn than asked for, as some may not fit; one of those that cannot be read is no error."""
    encode, seen = module._Reader.encode, []
    monkeypatch.setattr(module._Reader, "encode", lambda self, pair: seen.append(pair) or encode(self, pair))
    assert len(load(Text(str(rows)), processing(source), "calibration", 200, 2).tokens) == len(seen) == 2


def test_by_default_windows_are_as_long_as_the_longest_sample(source, rows):
    whole = load(Text(str(rows)), processing(source), "evaluation", None, None, most=200)
    assert whole.tokens.shape == (8, 200)  # the first text has more tokens
    later = load(Text(str(rows)), processing(source), "evaluation", None, None)
    assert later.tokens.shape[1] > 200
    assert later.tokens.shape[1] % 64 == 0


def with_texts(rows, folder, texts):
    """The same images with other texts."""
    lines = [{"image": str(rows.parent / f"{number}.png"), "text": text} for number, text in enumerate(texts)]
    (folder / "others.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "others.jsonl"


def test_images_with_the_same_text_are_left_out_and_a_warning_says_how_many(source, rows, tmp_path, caplog):
    """One question for all pictures: a window's image is found by its tokens, so the first one's would be shown for all."""
    alike = with_texts(rows, tmp_path, ["the house on the hill"] * 8)
    windows, given = shown(source, alike, "evaluation", None)
    assert len(windows.tokens) == len(given) == windows.describe().images == 1
    assert "7 images with text are left out, which have the same tokens as another, and 1 are taken" in caplog.text
    assert "give rows whose texts differ" in caplog.text
    with pytest.raises(
        InputError, match=r"1 images with text fit into 48 tokens, 6 were asked for; 7 more have the same tokens"
    ):
        uniprune.prune_in_place(Loaded(model_of(source), AutoProcessor.from_pretrained(source)), recipe(alike))
    caplog.clear()
    words = ["red", "red", "red", "red", "green", "house", "hill", "on"]
    some, _ = shown(source, with_texts(rows, tmp_path, [f"{word} " * LENGTH for word in words]), "calibration", 5)
    assert len(some.tokens.unique(dim=0)) == 5
    assert "3 images with text are left out" in caplog.text
    caplog.clear()
    assert len(shown(source, rows, "evaluation", None)[0].tokens) == 8
    assert not caplog.text


def model_of(source):
    return AutoModelForImageTextToText.from_pretrained(source).eval()


def test_a_processor_may_be_given_with_a_model_in_memory(source, rows, tmp_path):
    uniprune.prune(source, recipe(rows), tmp_path / "disk")
    uniprune.prune(Loaded(model_of(source), AutoProcessor.from_pretrained(source)), recipe(rows), tmp_path / "memory")
    ours, theirs = (MasksFile(tmp_path / name / "pruning" / "masks.safetensors") for name in ("memory", "disk"))
    assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())
    model = model_of(source)
    with pytest.raises(InputError, match=r"has no processor that can be read \(.*Loaded\(model, processor\)\).*--field text"):
        uniprune.prune_in_place(Loaded(model, AutoProcessor.from_pretrained(source).tokenizer), recipe(rows))


def test_a_processor_reads_text_and_tokens_as_its_tokenizer_does(source, tmp_path):
    """Calibrated on text alone, too, a model in memory is given its processor."""
    (tmp_path / "a.txt").write_text("A red house stands on the green hill. " * 200)
    found = []
    for given in (AutoProcessor.from_pretrained(source), AutoProcessor.from_pretrained(source).tokenizer):
        model, tokens = model_of(source), tmp_path / f"{len(found)}.safetensors"
        asked = recipe(tmp_path / "a.txt", length=16)
        uniprune.prune_in_place(Loaded(model, given), asked, save_tokens=tokens)
        uniprune.prune_in_place(Loaded(model_of(source), given), recipe(tmp_path / "0.safetensors", length=16))
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    read = {"text_source": str(tmp_path / "a.txt"), "windows": 2, "length": 16}
    processor = AutoProcessor.from_pretrained(source)
    one, two = (uniprune.evaluate(Loaded(model_of(source), given), **read) for given in (processor, processor.tokenizer))
    assert one.perplexity == two.perplexity
    assert one.text.bos == two.text.bos


def changed(rows, tmp_path, **row):
    first = json.dumps({"image": str(rows.parent / "0.png"), "text": "a hill"})
    (tmp_path / "rows.jsonl").write_text("\n".join([first, json.dumps(row)]))
    return tmp_path / "rows.jsonl"


def test_what_cannot_be_shown_is_refused_before_the_weights_are_read(source, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("uniprune.job.prepare.load_weights", None)

    def refused(reason, data=rows, **settings):
        options = {name: settings.pop(name) for name in ("save_tokens", "execution") if name in settings}
        with pytest.raises(InputError, match=reason):
            uniprune.prune(source, recipe(data, **settings), tmp_path / "out", **options)

    refused(r"0 images with text fit into 3 tokens, 6 were asked for; .*raise --length", length=3)
    refused(r"8 images with text fit into 48 tokens, 9 were asked for", windows=9)
    refused("read text alone; leave them out, or take the text alone: --field text", sequential=True)
    refused("--controller unipruning reads text alone; leave it out", controller="unipruning", steps=1)
    refused("--bos is for text alone", bos="none")
    refused("--save-tokens has no place for images", save_tokens=tmp_path / "tokens.safetensors")
    refused("512 tokens do not fit the model's context of 256", length=512)
    here = changed(rows, tmp_path, image="none.png", text="a house")
    refused(r"rows\.jsonl, line \d: its image cannot be read \(.*No such file", data=here)
    refused(
        r"line 2: its image cannot be read \(it is int, not the name", data=changed(rows, tmp_path, image=3, text="a house")
    )
    refused(r'line 2: no fields "image" and "text"', data=changed(rows, tmp_path, text="a house"))
    refused("images go through the whole model in memory; raise --max-memory", execution="streamed")


def test_a_text_model_reads_the_text_of_such_rows(folder, rows, tmp_path, capsys, monkeypatch):
    uniprune.prune(folder, recipe(rows, windows=2, length=32), tmp_path / "out")
    assert uniprune.evaluate(tmp_path / "out", text_source=rows, windows=1, length=32).perplexity
    code, _, _ = run(capsys, monkeypatch, "evaluate", tmp_path / "out", "--text", rows, "--windows", 1, "--length", 32)
    assert code == 0
