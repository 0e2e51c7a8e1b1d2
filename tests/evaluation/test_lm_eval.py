"""Against lm-evaluation-harness itself, where it is installed: prompts of every format, scores and accuracies row by row."""

import json
import math
from pathlib import Path

import pytest

import uniprune
from command import run
from conftest import shared, tiny_model
from task_rows import ROWS
from uniprune import InputError, Loaded
from uniprune.data import wikitext
from uniprune.data.text import read
from uniprune.data.windows import load_windows
from uniprune.evaluation.answers import answer, tokenise
from uniprune.evaluation.perplexity import perplexity
from uniprune.tasks.loading import load_task

lm_eval = pytest.importorskip("lm_eval")

CONFIGS = {
    "piqa": "piqa/piqa.yaml",
    "arc": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "race": "race/race.yaml",
    "mmlu": "mmlu/default/mmlu_elementary_mathematics.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
FIRST = {
    "question_stem",
    "question",
    "goal",
    "ctx_a",
    "sentence",
    "sentence1",
    "text",
    "article",
}  # where a row can be made longer


@pytest.fixture
def local(tmp_path):
    """Writes rows, and a task of the harness that is its own of that format, but reads them; both paths."""

    def write(name, rows):
        data, config = tmp_path / f"{name}.jsonl", tmp_path / f"local_{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / CONFIGS[name]),
            "task": f"local_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": None,
        }
        config.write_text(json.dumps(settings))  # JSON is YAML
        return str(data), str(config)

    return write


@pytest.mark.parametrize("name", CONFIGS)
def test_native_scores_are_those_of_the_harness(local, tokenizer, name):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    field = next(iter(ROWS[name].keys() & FIRST))
    data, config = local(name, [ROWS[name] | {field: "So " * number + ROWS[name][field]} for number in range(5)])
    model, task = tiny_model(), load_task(data)
    (ours,) = answer(model, [task], [tokenise(task, tokenizer, 128)])
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = lm_eval.simple_evaluate(harness, tasks=[config], task_manager=TaskManager(include_defaults=False), log_samples=True)
    (samples,) = found["samples"].values()
    samples.sort(key=lambda sample: sample["doc_id"])
    assert len(samples) == 5
    for row, sample in enumerate(samples):
        assert task.questions[row].choices == tuple(tuple(argument[:2]) for argument in sample["arguments"])
        for mine, theirs in zip(ours.scores[row], sample["filtered_resps"], strict=True):
            assert mine.nats == pytest.approx(float(theirs[0]), abs=1e-4)
            assert str(mine.greedy) == str(theirs[1])
        assert {metric: float(right[row]) for metric, right in ours.right.items()} == {
            metric: float(sample[metric]) for metric in ours.right
        }
    (values,) = found["results"].values()
    record = ours.result()
    assert record.acc_stderr == pytest.approx(float(values["acc_stderr,none"]))
    assert (record.acc_norm is not None) == ("acc_norm,none" in values)


def test_answers_of_the_harness_against_another_model(loaded, local, tokenizer):
    """From its logged samples: what is gained and lost is what our own scorer says of the same rows, few-shot included."""
    data, config = local("arc", [ROWS["arc"] | {"question": f"What is {number}?"} for number in range(12)])
    other = Loaded(tiny_model(initializer_range=0.2), tokenizer)
    found = uniprune.evaluate(loaded, lm_eval=[config], tasks=[data], limit=8, num_fewshot=0, against=other)
    assert found.lm_eval_against["local_arc"] == found.tasks[data].against
    assert set(found.lm_eval_against["local_arc"]) == {"acc", "acc_norm"}
    assert found.lm_eval_against["local_arc"]["acc"].reference not in (0.0, found.tasks[data].acc)
    assert found.lm_eval_reference == uniprune.evaluate(other, lm_eval=[config], limit=8, num_fewshot=0).lm_eval
    shots = uniprune.evaluate(loaded, lm_eval=[config], tasks=[data], num_fewshot=2)
    assert shots.lm_eval["local_arc"]["acc"] == pytest.approx(shots.tasks[data].acc)
    assert shots.tasks[data].num_fewshot == 2


def test_metrics_that_are_no_truths_have_no_mcnemar():
    from uniprune.evaluation.lm_eval import _marks

    samples = [
        {"doc_id": 1, "filter": "none", "metrics": ["acc", "bleu"], "acc": 1.0, "bleu": 0.0},
        {"doc_id": 0, "filter": "strict", "metrics": ["acc"], "acc": False},
        {"doc_id": 0, "filter": "none", "metrics": ["acc", "bleu"], "acc": 0, "bleu": 0.3},
    ]
    assert _marks({"t": samples}) == {"t": {"acc": {1: True, 0: False}, "acc,strict": {0: False}}}


def test_the_verb_runs_the_harness(capsys, monkeypatch, folder, local):
    data, config = local("arc", [ROWS["arc"]] * 3)
    command = ["evaluate", folder, "--tasks", data, "--lm-eval", config, "--limit", 2]
    code, printed, _ = run(capsys, monkeypatch, *command, "--json")  # the harness shows bars on stderr
    assert code == 0
    found = json.loads(printed)
    assert found["lm_eval"]["local_arc"]["acc"] == found["tasks"][data]["acc"]
    assert found["versions"]["lm_eval"]


# ---------------------------------------------------------------------------------------------------------- perplexity


def like(kind):
    """Tokenizers as three families have them: what begins a text, and how words do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"gemma": ("<bos>", "<eos>"), "opt": ("</s>", "</s>"), "llama": ("<s>", "</s>"), "qwen": (None, "<end>")}
    bos, eos = names[kind]
    special = sorted({name for name in (bos, eos) if name})
    inner = Tokenizer(models.BPE())
    if kind in ("gemma", "llama"):  # words begin with a mark, the text's first one too in Llama's
        scheme = "always" if kind == "llama" else "never"
        inner.pre_tokenizer, inner.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme=scheme),
            decoders.Metaspace(prepend_scheme=scheme),
        )
        letters = sorted({*read("builtin", "evaluation"), *"".join(ARTICLES), "\u2581"})
    else:
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=letters, special_tokens=special, show_progress=False)
    inner.train_from_iterator([read("builtin", "evaluation")[:30_000]], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)


ARTICLES = [  # lines in WikiText's spelling
    " \n",
    " = A Tale of Cats = \n",
    " \n",
    ' A tale of cats is a play by nobody , first seen in 2000 ; it has a well @-@ known line : " Meow , meow ! " \n',
    " = = Plot = = \n",
    " \n",
    " The cat 's 1 @,@ 500 kittens ( 750 \u2013 1 @.@ 5 of them black [ sic ] ) ask : who are we ? \n",
    " = Of Dogs = \n",
    " \n",
    " Dogs ' tails wag at N miles / ' 5 / an hour . \n",
]


@pytest.mark.parametrize("kind", ["gemma", "opt", "llama"])
def test_perplexity_is_its_rolling_likelihood_on_the_same_windows(tmp_path, kind):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer, model = like(kind), tiny_model()
    (tmp_path / "t.txt").write_text(read("builtin", "evaluation")[:6000])
    windows = load_windows(tmp_path / "t.txt", tokenizer, use="evaluation", length=64, bos="each")
    assert windows.with_bos == len(windows.tokens) > 10
    ours = perplexity(model, windows)

    class Given(HFLM):
        """Takes tokens as they are: windows are cut within words, and would be tokenised anew."""

        def tok_encode(self, string, **options):
            return windows.tokens[int(string), 1:].tolist()

    harness = Given(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
    requests = [Instance("loglikelihood_rolling", {}, (str(row),), row) for row in range(len(windows.tokens))]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    assert -sum(theirs) == pytest.approx(ours.nats, rel=1e-6)
    assert ours.perplexity == pytest.approx(math.exp(-sum(theirs) / ours.tokens), abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma", "opt", "llama", "qwen"])
@pytest.mark.parametrize("length", [24, 128])
def test_the_task_wikitext(tmp_path, kind, length):
    """Word and byte perplexity of pages, in its own spelling, of several windows each and of less than one."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lines = ARTICLES
    if length == 128:
        lines = shared("wikitext2/wiki.test.raw").read_text().splitlines(keepends=True)[:100]
    (tmp_path / "wiki.raw").write_text("".join(lines))
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in wikitext.pages(lines)))
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"),
        "task": "local_wikitext",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pages.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (tmp_path / "local.yaml").write_text(json.dumps(settings))
    tokenizer, model = like(kind), tiny_model()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=length)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(harness, tasks=[str(tmp_path / "local.yaml")], task_manager=manager, log_samples=False)
    (theirs,) = found["results"].values()
    ours = uniprune.evaluate(Loaded(model, tokenizer), text_source=tmp_path / "wiki.raw", rolling=True, length=length)
    assert ours.word_perplexity == pytest.approx(theirs["word_perplexity,none"], rel=1e-5)
    assert ours.byte_perplexity == pytest.approx(theirs["byte_perplexity,none"], rel=1e-5)
    assert ours.text.second_bos == (kind != "qwen")
    once = uniprune.evaluate(
        Loaded(model, tokenizer), text_source=tmp_path / "wiki.raw", rolling=True, length=length, bos="each"
    )
    assert once.text.second_bos is False
    assert once.tokens == ours.tokens - (ours.text.documents if kind != "qwen" else 0)


def test_what_is_cut_is_counted_and_said(local, tokenizer, caplog):
    """The tiny model reads 128 tokens: questions that are longer lose their beginning in both."""
    data, config = local("arc", [ROWS["arc"], ROWS["arc"] | {"question": "so " * 200}])
    found = uniprune.evaluate(Loaded(tiny_model(), tokenizer), tasks=[data], lm_eval=[config])
    assert found.tasks[data].questions_cut == 1
    assert "1 of 2 questions are cut at their beginning to the model's context of 128 tokens" in caplog.text
    assert found.lm_eval_notes == ["3 of 6 requests were cut at their beginning to the context of 128 tokens"]


def test_unknown_tasks_are_refused(loaded):
    with pytest.raises(InputError, match="--lm-eval no_such_task: a task cannot be loaded"):
        uniprune.evaluate(loaded, lm_eval=["no_such_task"])


def test_programs_that_a_model_writes_are_run_only_where_that_is_allowed(monkeypatch, tmp_path):
    """As HumanEval's task says of itself (``unsafe_code``)."""
    from uniprune.evaluation.lm_eval import Harness

    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n')
    settings = {
        "task": "local_code",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "unsafe_code": True,
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "code.yaml").write_text(json.dumps(settings))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(InputError, match=r"local_code runs programs that the model writes; .* HF_ALLOW_CODE_EVAL=1"):
        Harness([str(tmp_path / "code.yaml")])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert Harness([str(tmp_path / "code.yaml")])
