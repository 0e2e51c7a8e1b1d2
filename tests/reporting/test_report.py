"""The results report: what is recognised, what is put together, what stands on the page, and that input stays inert."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

import made_up
import uniprune
from command import run
from small_models import tiny
from task_rows import ROWS
from uniprune import InputError, Recipe
from uniprune.artefacts.reports import Pruning
from uniprune.checkpoints.origin import resolve
from uniprune.cli.tables import sweep_tables
from uniprune.common.formatting import NOTE, number, points, short
from uniprune.common.significance import paired_error
from uniprune.evaluation.results import Generation, Row, Sweep, marked
from uniprune.models.loading import skeleton
from uniprune.models.matrices import find_matrices
from uniprune.reporting import model_card, plots, sections, tables
from uniprune.reporting.headline import figures, sentences
from uniprune.reporting.results import read, read_all
from uniprune.reporting.sections import dialogue
from uniprune.reporting.summary import same_model, summarise
from uniprune.saliency.record import ControllerRecord

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'--><!-- "
HOSTILE += "$\\frac{ &lt; {{ 7*7 }} [red][/] \ud800\x1b[31m"
SECTIONS = ["summary", "models", "tradeoff", "sparsity", "controller", "perplexity", "zero-shot", "closeness", "generations"]
SECTIONS += ["speed", "protocol"]


class Outline(HTMLParser):
    """The elements of a page: names with attributes, text by section, and what is left open."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.section = [], [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def made(tmp_path, *paths):
    uniprune.report(paths, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def written(tmp_path, facts, name="pruned"):
    return made_up.write(tmp_path / name / "pruning.json", facts).parent


def put_together(*paths):
    return summarise(read_all(paths))


# ------------------------------------------------------------------------------------------------------------ sources


def test_kinds_are_told_by_their_fields(tmp_path):
    paths = made_up.everything(tmp_path)
    assert [read(path).kind for path in paths] == ["pruning", "evaluation", "evaluation", "sweep", "bench"]
    assert read(paths[0] / "pruning.json").path == paths[0]
    assert len(read_all([*paths, *paths])) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("not JSON", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is no result of prune, apply, evaluate, sweep, compare, bench or pack: it is no object"),
        ('{"model": "m", "results": []}', "it is an object with 'model', 'results'"),
        ('{"model": "m", "perplexity": "low"}', "is damaged: perplexity"),
        ('{"sweep": 1, "model": "m", "rows": []}', "is damaged: rows"),
        ('{"model": {"name": "m"}, "pattern": "2:4", "sparsity": 2, "matrices": {}}', "is damaged: sparsity"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"odd\.json") as error:
        uniprune.report([path], tmp_path / "report.html")
    assert message in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_folders_and_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"has no pruning\.json"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"gone\.json cannot be read"):
        read(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"bytes\.json is not JSON"):
        read(tmp_path / "bytes.json")
    with pytest.raises(InputError, match="needs sources"):
        read_all([])


# ----------------------------------------------------------------------------------------------------- put together


def test_evaluations_go_to_the_model_they_are_of(tmp_path):
    half, tenth = made_up.pruning(uniform=0.5), made_up.pruning(uniform=0.1)
    paths = [written(tmp_path, half, "half"), written(tmp_path, tenth, "tenth")]
    paths += [made_up.write(tmp_path / "a.json", made_up.evaluation("runs/tenth", 0.1, 13.0))]
    paths += [made_up.write(tmp_path / "b.json", made_up.evaluation(str(tmp_path / "half"), 0.5, 15.0))]
    paths += [made_up.write(tmp_path / "c.json", made_up.evaluation("half", 0.3, 14.0))]  # the name alone, other zeros
    found = put_together(*paths)
    assert [(each.label, [one.perplexity for one in each.evaluations]) for each in found.subjects] == [
        (f"{tmp_path.name}/half", [15.0]),
        ("tenth", [13.0]),
        ("half", [14.0]),
    ]


def test_a_model_of_which_some_layers_stayed_dense_is_one_model(folder, tmp_path):
    """Its zeros are counted among all prunable weights, as evaluate, sweep and compare count them."""
    asked = {"windows": 2, "length": 16}
    recipe = Recipe(sparsity=0.5, metric="magnitude", controller="none", exclude=r"layers\.0\.", **asked)
    report = uniprune.prune(folder, recipe, tmp_path / "out")
    assert report.zeros == pytest.approx(0.5 * report.weights / report.prunable)
    assert report.zeros < 0.4
    uniprune.evaluate(tmp_path / "out", **asked).write(tmp_path / "r.json")
    uniprune.calibrate(folder, recipe.model_copy(update={"sparsity": None}), tmp_path / "s.safetensors")
    swept = uniprune.sweep(folder, tmp_path / "s.safetensors", tmp_path / "sweep.json", "0.5", scope="model", **asked)
    assert swept.rows[0].sparsity == pytest.approx(report.zeros, abs=1e-3)
    (one,) = put_together(tmp_path / "out", tmp_path / "r.json").pruned
    assert one.sparsity == report.zeros
    assert one.reading is not None


def test_a_model_that_was_pruned_before_is_told_by_its_masks(folder, tmp_path):
    """It has more zeros than the last masks removed, and another model may have as many."""
    asked = {"windows": 2, "length": 16}
    recipe = Recipe(sparsity=0.5, metric="magnitude", controller="none", include="self_attn", **asked)
    uniprune.prune(folder, recipe, tmp_path / "a")
    uniprune.prune(tmp_path / "a", recipe.model_copy(update={"include": ("mlp",)}), tmp_path / "b")
    uniprune.evaluate(tmp_path / "b", **asked).write(tmp_path / "r.json")
    (one,) = put_together(tmp_path / "b", tmp_path / "r.json").pruned
    assert one.reading is not None
    model_card.rewrite(tmp_path / "b", [tmp_path / "r.json"])


def test_the_protocol_of_an_evaluation_is_all_that_it_takes(folder, tmp_path):
    questions = tmp_path / "piqa.jsonl"
    questions.write_text(json.dumps(ROWS["piqa"]))
    result = uniprune.evaluate(folder, windows=2, length=16, tasks=[str(questions)], text_source="builtin")
    result.write(tmp_path / "r.json")
    settings = dict(tables.protocol(read(tmp_path / "r.json")).rows)
    assert settings["text / sha256"] in result.text.sha256 + "..."
    assert {
        "versions / torch",
        "length",
        "stride",
        "text / bos",
        "dtype",
        "weights_sha256",
        "machine / device",
    } <= settings.keys()
    assert any(name.startswith("tasks / ") for name in settings)
    assert "perplexity" not in settings


def test_apply_counts_zeros_as_prune_does(folder, tmp_path):
    recipe = Recipe(metric="magnitude", controller="none", include="up_proj", windows=2, length=16)
    uniprune.calibrate(folder, recipe, tmp_path / "s.safetensors")
    uniprune.mask(tmp_path / "s.safetensors", "2:4", tmp_path / "m.safetensors")
    applied = uniprune.apply(folder, tmp_path / "m.safetensors", tmp_path / "out")
    measured = uniprune.evaluate(tmp_path / "out", windows=2, length=16)
    assert applied.sparsity == 0.5
    assert applied.zeros == pytest.approx(measured.sparsity, abs=1e-3)
    assert applied.zeros < 0.2


def test_a_name_that_two_folders_have_is_no_sign(tmp_path):
    paths = [written(tmp_path, made_up.pruning(uniform=0.5), f"{parent}/half") for parent in ("a", "b")]
    paths += [made_up.write(tmp_path / "1.json", made_up.evaluation("half", 0.5, 15.0))]
    paths += [made_up.write(tmp_path / "2.json", made_up.evaluation(str(tmp_path / "b" / "half"), 0.5, 16.0))]
    found = put_together(*paths)
    assert [[one.perplexity for one in each.evaluations] for each in found.subjects] == [[], [16.0], [15.0]]
    assert [each.label for each in found.subjects] == ["a/half", "b/half", "half"]


def test_accuracies_of_two_models_and_of_what_each_is_compared_with(tmp_path):
    paths = []
    for parent, reference in (("a", 0.7), ("b", 0.9)):
        paths.append(written(tmp_path, made_up.pruning(uniform=0.5, model={"name": f"/{parent}/model"}), f"{parent}/half"))
        asked = {
            "piqa": made_up.tasks()["rte"] | {"against": {"acc": {"reference": reference, "gained": 1, "lost": 2, "p": 1.0}}}
        }
        facts = made_up.evaluation(str(paths[-1]), 0.5, tasks=asked, against=f"/{parent}/model")
        paths.append(made_up.write(tmp_path / f"{parent}.json", facts))
    found = put_together(*paths)
    assert [(one.series, one.value) for one in sections._markers(found)] == [
        ("dense a/model", 0.7),
        ("dense b/model", 0.9),
        ("a/half", 0.52),
        ("b/half", 0.52),
    ]
    assert [row[1] for row in tables.accuracies(found.subjects).rows] == ["a/half", "b/half"]
    head, row, _ = (line.split(",") for line in tables.as_csv(tables.accuracies(found.subjects)).splitlines())
    line = dict(zip(head, row, strict=True))
    assert (float(line["value"]), float(line["other"]), float(line["p"])) == (0.52, 0.7, 1.0)  # not 52.0%
    near = {"kl": 0.123456, "kl_stderr": 0.001, "agreement": 0.654321, "tokens": 4000, "seconds": 1.0}
    facts = made_up.evaluation(str(tmp_path / "a" / "half"), 0.5, closeness=near)
    saved = tables.as_csv(tables.closeness(put_together(made_up.write(tmp_path / "near.json", facts)).subjects))
    assert "0.123456,0.001,0.654321" in saved


def test_a_model_that_was_pruned_by_masks_is_compared_with_itself(tmp_path):
    pruned = made_up.write(tmp_path / "m.json", made_up.evaluation(made_up.BASE, 0.5, masks="/x/masks.safetensors"))
    found = put_together(pruned, made_up.write(tmp_path / "dense.json", made_up.dense()))
    assert found.dense_perplexity(found.subjects[0]) == 12.5


def test_perplexities_compare_on_the_same_windows_only(tmp_path):
    pruned = written(tmp_path, made_up.pruning(uniform=0.5))
    one = made_up.write(tmp_path / "one.json", made_up.evaluation("pruned", 0.5))
    same = made_up.write(tmp_path / "same.json", made_up.dense())
    others = [
        made_up.dense(windows=5),
        made_up.dense(text=made_up.TEXT | {"sha256": "00" * 32}),
        made_up.dense() | {"model": "another"},
        made_up.dense() | {"model": made_up.BASE, "sparsity": 0.2},
    ]
    for index, other in enumerate(others):
        found = put_together(pruned, one, made_up.write(tmp_path / f"{index}.json", other))
        assert found.dense_perplexity(found.subjects[0]) is None
    found = put_together(pruned, one, same)
    assert found.dense_perplexity(found.subjects[0]) == 12.5
    found = put_together(pruned, one, made_up.write(tmp_path / "sweep.json", made_up.sweep(dense={"perplexity": 12.25})))
    assert found.dense_perplexity(found.subjects[0]) == 12.25


def test_the_mean_change_of_accuracy_and_its_error(tmp_path):
    path = made_up.write(tmp_path / "e.json", made_up.evaluation(sparsity=0.5, tasks=made_up.tasks(), against=made_up.BASE))
    change = put_together(path).subjects[0].change
    assert change.value == pytest.approx((-0.10 - 0.01) / 2)
    assert change.error == pytest.approx(math.hypot(paired_error(2, 12, 100), paired_error(5, 6, 100)) / 2)


def test_a_task_that_two_results_have_counts_once(tmp_path):
    once = made_up.evaluation("pruned", 0.5, tasks=made_up.tasks(), against=made_up.BASE)
    again = made_up.evaluation("pruned", 0.5, tasks={"rte": made_up.tasks()["rte"]}, against=made_up.BASE)
    first, both = (
        put_together(*(made_up.write(tmp_path / f"{number}.json", facts) for number, facts in enumerate(all_of)))
        for all_of in ([once], [once, again])
    )
    assert both.subjects[0].change == first.subjects[0].change
    assert len(tables.accuracies(both.subjects).rows) == len(tables.accuracies(first.subjects).rows)
    assert sections._markers(both) == sections._markers(first)


def test_what_is_compared_with_another_pruned_model_is_not_called_a_change_from_the_dense_one(tmp_path):
    pruned = written(tmp_path, made_up.pruning(uniform=0.5))
    facts = {"tasks": made_up.tasks(), "closeness": made_up.closeness()}
    other = made_up.write(tmp_path / "other.json", made_up.evaluation("pruned", 0.5, against="/another/rival", **facts))
    dense = made_up.write(tmp_path / "dense.json", made_up.evaluation("pruned", 0.5, against=made_up.BASE, **facts))
    summary = put_together(pruned, other)
    found = summary.subjects[0]
    assert (found.change, found.closeness) == (None, None)
    assert [row[1] for row in tables.closeness(summary.subjects).rows] == ["rival"]  # but what was measured is shown
    assert {marker.series for marker in sections._markers(summary)} == {"rival", found.label}
    found = put_together(pruned, dense).subjects[0]
    assert found.change is not None
    assert found.closeness is not None


def test_paired_error_is_that_of_the_differences():
    values = [1] * 2 + [-1] * 12 + [0] * 86
    mean = sum(values) / 100
    assert paired_error(2, 12, 100) == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 99 / 100))
    assert paired_error(1, 0, 1) is None


def test_the_pareto_front_by_hand(tmp_path):
    (facts,) = put_together(made_up.write(tmp_path / "s.json", made_up.sweep())).tradeoffs
    assert [point.name for point in facts.points if point.front] == ["0.4 by model", "0.5 by model", "4:8", "0.6 by model"]
    assert "is 0.4 by model: 13.00 at 40.0%" in " ".join(
        sentences(put_together(made_up.write(tmp_path / "s.json", made_up.sweep())))
    )


def test_the_sweep_its_table_and_the_report_mark_the_same_rows(tmp_path):
    """2:4 beside a sparsity that is as high, reads better and takes more bytes; and what is larger and worse."""
    costs = [("2:4", None, 12.0, 100), ("0.5", "row", 11.0, 140), ("4:8", None, 13.0, 100), ("0.5", "model", math.inf, 90)]
    rows = [Row(pattern=p, scope=s, sparsity=0.5, perplexity=ppl, bytes=size) for p, s, ppl, size in costs]
    for known in (rows, [row.model_copy(update={"bytes": None}) for row in rows]):
        sweep = Sweep(**made_up.sweep(rows=marked(known)))
        stars = [row.pareto for row in sweep.rows]
        assert stars == [known is rows, True, False, False]
        (printed,) = sweep_tables(sweep)
        sweep.write(tmp_path / "s.json")
        (facts,) = put_together(tmp_path / "s.json").tradeoffs
        shown = {row[0]: row[-1] == "yes" for row in tables.tradeoff(facts).rows}
        assert [shown[f"{p} by {s}" if s else p] for p, s, *_ in costs] == stars
        first, *_, last = ([*column.cells] for column in printed.columns)
        assert {name: mark == "yes" for name, mark in zip(first, last, strict=True)} == shown


def test_pruned_models_measured_alike_make_a_tradeoff(tmp_path):
    paths = [written(tmp_path, made_up.pruning(uniform=sparsity), name) for sparsity, name in ((0.5, "half"), (0.1, "tenth"))]
    paths += [
        made_up.write(tmp_path / f"{n}.json", made_up.evaluation(n, s, p))
        for n, s, p in (("half", 0.5, 20.0), ("tenth", 0.1, 13.0))
    ]
    (facts,) = put_together(*paths, made_up.write(tmp_path / "dense.json", made_up.dense())).tradeoffs
    assert [(point.label, point.sparsity, point.perplexity) for point in facts.points] == [
        ("tenth", 0.1, 13.0),
        ("half", 0.5, 20.0),
    ]
    assert facts.dense == 12.5
    paths[-1] = made_up.write(tmp_path / "tenth.json", made_up.evaluation("tenth", 0.1, 13.0, length=32))
    assert put_together(*paths).tradeoffs == []


def test_matrices_by_block_and_kind():
    matrices = {
        "model.layers.0.attn.q": {"shape": (2, 2), "sparsity": 0.25},
        "model.layers.1.mlp.experts.0.up": {"shape": (1, 3), "sparsity": 1.0},
        "model.layers.1.mlp.experts.1.up": {"shape": (1, 1), "sparsity": 0.0},
        "extra": {"shape": (1, 1), "sparsity": 0.5},
    }
    grid = Pruning(**made_up.pruning(matrices=matrices)).grid
    assert grid == {("0", "attn.q"): 0.25, ("1", "mlp.experts.*.up"): 0.75, ("none", "extra"): 0.5}


@pytest.mark.parametrize("spelled", ["experts.{}.{}", "experts.{1}.{0}"])
def test_experts_have_one_column_for_each_of_their_matrices(spelled):
    """Whether each is a module (its number comes first), or all are one stack."""
    names = [f"model.layers.{i}.mlp.{spelled.format(j, part)}" for i in range(4) for j in range(8) for part in ("up", "down")]
    pruning = Pruning(**made_up.pruning(matrices={name: {"shape": (1, 2), "sparsity": len(name) / 99} for name in names}))
    kinds = [f"mlp.{spelled.format('*', part)}" for part in ("up", "down")]
    assert list(pruning.grid) == [(str(i), kind) for i in range(4) for kind in kinds]
    assert [row[0] for row in tables.kinds(pruning.grid).rows] == kinds
    plot = plots.heatmap("h", pruning.grid)
    assert [re.search(f">{part}<", plot.svg) is not None for part in ("up", "down", "[*]")] == [True, True, False]


def test_when_the_held_out_windows_judged():
    assert ControllerRecord(loss=[1.0] * 9, held_out_loss=[1.0] * 6, judged_every=2).judged_at == [0, 2, 4, 6, 8, 9]
    assert ControllerRecord(loss=[1.0] * 8, held_out_loss=[1.0] * 5).judged_at == [0, 2, 4, 6, 8]  # from before it was recorded


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (29.444, "29.44"),
        (2721.9, "2,722"),
        (3.2e9, "3.20e+09"),
        (0.03125, "0.0312"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_names_and_patterns():
    assert short("/home/someone/models/Toy.gguf") == "Toy"
    assert short("C:\\models\\Toy") == "Toy"
    assert short("org/model-1.5") == "org/model-1.5"
    assert Pruning(**made_up.pruning()).pattern_words == "one budget for the whole model"
    assert Pruning(**made_up.pruning(pattern="what <else>", structure=None)).pattern_words == "what <else>"
    assert points(-0.0525, 0.02) == "\N{MINUS SIGN}5.2 ± 2.0"


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_section_of_a_full_report(tmp_path):
    outline = Outline(made(tmp_path, *made_up.everything(tmp_path)))
    assert outline.open == []
    assert [attributes["id"] for attributes in outline.all("section")] == SECTIONS
    texts = {section: " ".join(text.split()) for section, text in outline.texts.items()}
    summary = texts["summary"]
    assert "12.50 \N{RIGHTWARDS ARROW} 18.25" in summary
    assert "18.25, 1.46 times the dense model's 12.50" in summary
    assert "\N{MINUS SIGN}5.5 ± 2.5 points of accuracy on tasks" in summary
    assert "unstructured 1.50 times as fast" in summary
    assert NOTE in summary
    assert "4:8" in texts["tradeoff"]
    assert "4.9 MB" in texts["tradeoff"]
    assert "within 10% of the dense 12.50 is 0.4 by model" in texts["tradeoff"]
    assert "model.layers.2.mlp.down_proj" in texts["sparsity"]
    assert "9 steps on 9,216 tokens" in texts["controller"]
    assert "31.50" in texts["perplexity"]
    assert "WikiText-2, sequence length 64" in texts["perplexity"]
    assert "60.0% 4.9% 70.0% 2 12 0.013" in texts["zero-shot"]
    assert "73.4%" in texts["closeness"]
    assert "The first 5 of 6 tokens are the same." in texts["generations"]
    assert "text / sha256" in texts["protocol"]
    assert "/data/" not in "".join(texts.values())  # this machine's folders are nobody's business
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawn = [attributes for attributes in outline.all("div") if attributes.get("role") == "img"]
    assert len(drawn) == len(outline.all("svg")) == 6
    assert all(attributes["aria-label"].endswith(".") for attributes in drawn)
    assert all("scope" in attributes for attributes in outline.all("th"))


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        (made_up.pruning(), ["summary", "sparsity", "controller", "protocol"]),
        (made_up.pruning(controller=None), ["summary", "sparsity", "protocol"]),
        (made_up.evaluation(), ["summary", "protocol"]),
        (made_up.evaluation(perplexity=None, tasks=made_up.tasks()), ["summary", "zero-shot", "protocol"]),
        (made_up.evaluation(lm_eval={"mmlu": {"acc": 0.25, "acc_stderr": 0.01}}), ["summary", "zero-shot", "protocol"]),
        (made_up.evaluation(closeness=made_up.closeness()), ["summary", "closeness", "protocol"]),
        (made_up.evaluation(generations=made_up.generations()), ["summary", "generations", "protocol"]),
        (made_up.sweep(), ["summary", "tradeoff", "protocol"]),
        (made_up.speeds(), ["summary", "speed", "protocol"]),
        (made_up.packing(), ["summary", "protocol"]),
        (made_up.evaluation(word_perplexity=3.5), ["summary", "perplexity", "protocol"]),
        (made_up.sweep(dense=None, protocol={}), ["summary", "tradeoff", "protocol"]),
    ],
)
def test_sections_only_where_there_is_something(tmp_path, facts, shown):
    outline = Outline(made(tmp_path, made_up.write(tmp_path / "one.json", facts)))
    assert [attributes["id"] for attributes in outline.all("section")] == shown


@pytest.mark.parametrize(
    ("model", "against", "parts"),
    [
        (" Paris, the city of lights", " Paris, the city of love", ("Paris, the city of ", "lights", "love")),
        ("yes", "yes", ("yes", "", "")),
        ("one, two", "one", ("one", ", two", "")),
        (" a", "b", ("", " a", "b")),
        ("", "b", ("", "", "b")),
    ],
)
def test_generations_are_marked_from_the_first_word_that_differs(model, against, parts):
    found = dialogue(Generation(prompt="p", model=model, against=against))
    assert (found.same, found.model, found.against) == parts


def test_a_model_whose_perplexity_overflowed(tmp_path):
    outline = Outline(made(tmp_path, made_up.write(tmp_path / "e.json", made_up.evaluation(perplexity=math.inf))))
    assert "has perplexity ∞ on toy.txt, 4 samples of 64 tokens" in outline.texts["summary"]


def test_a_uniform_pattern_is_said_and_not_drawn(tmp_path):
    outline = Outline(made(tmp_path, written(tmp_path, made_up.pruning(uniform=0.5, controller=None))))
    assert "Each of the 12 matrices has sparsity 50.0%: 2:4" in outline.texts["sparsity"]
    assert outline.all("svg") == []


def test_what_apply_and_the_published_controller_write(tmp_path):
    facts = made_up.pruning(controller={"targets": ["2:4"], "steps": 3, "tokens": 96, "loss": [3.0, 2.5, 2.75]})
    del facts["recipe"], facts["calibration"]
    outline = Outline(made(tmp_path, written(tmp_path, facts)))
    assert "3 steps on 96 tokens" in outline.texts["controller"]
    assert "controller's loss over 3 steps, from 3.00 to 2.75" in str(outline.all("div"))


def test_what_is_not_finite_is_said(tmp_path):
    rows = [*made_up.sweep()["rows"], {"pattern": "0.9", "scope": "row", "sparsity": 0.9, "perplexity": math.inf}]
    rows += [{"pattern": "0.95", "scope": "row", "sparsity": 0.95, "perplexity": math.nan}]
    record = made_up.pruning()["controller"] | {"loss": [1.0, math.nan, math.inf], "held_out_loss": [0.5, math.nan]}
    paths = [made_up.write(tmp_path / "sweep.json", made_up.sweep(rows=rows))]
    paths += [written(tmp_path, made_up.pruning(controller=record))]
    paths += [made_up.write(tmp_path / "e.json", made_up.evaluation("elsewhere", perplexity=math.inf))]
    outline = Outline(made(tmp_path, *paths))
    assert "∞" in outline.texts["tradeoff"]
    assert "not a number" in outline.texts["tradeoff"]
    assert "∞" in outline.texts["models"]
    assert "at best" in str(outline.all("div"))


@pytest.mark.parametrize("perplexity", [math.inf, math.nan, 0.0, 1e300])
def test_a_sweep_with_nothing_to_draw_still_makes_a_page(tmp_path, perplexity):
    rows = [{"pattern": "2:4", "scope": None, "sparsity": 0.5, "perplexity": perplexity}]
    facts = made_up.sweep(rows=rows, dense={"perplexity": perplexity})
    outline = Outline(made(tmp_path, made_up.write(tmp_path / "s.json", facts)))
    assert len(outline.all("svg")) == (perplexity == 1e300)


def hostile_sources(folder):
    """Every text that a source may hold says something hostile."""
    pruned = made_up.pruning(
        model={"name": HOSTILE},
        pattern=HOSTILE,
        matrices={f"{HOSTILE}.{i}.{HOSTILE}": {"shape": (2, 2), "sparsity": i / 4} for i in range(3)},
        recipe={HOSTILE: HOSTILE},
    )
    pruned["controller"]["targets"] = [HOSTILE]
    generation = {"prompt": HOSTILE, "model": f"a {HOSTILE}", "against": HOSTILE, "same_tokens": 1, "tokens": 2}
    full = made_up.evaluation(
        HOSTILE,
        tasks={HOSTILE: made_up.tasks()["rte"]},
        against=HOSTILE,
        text={"text": HOSTILE},
        closeness=made_up.closeness() | {"text": {"text": HOSTILE}},
        generations=[generation],
        protocol={HOSTILE: {HOSTILE: [HOSTILE]}},
        lm_eval={HOSTILE: {HOSTILE: 0.5}},
        by_position={HOSTILE: 3.0},
        comparable=[{"protocol": HOSTILE, "metric": HOSTILE}],
    )
    timed = made_up.speeds(model=HOSTILE, device=HOSTILE, verdicts=[HOSTILE], notes=[HOSTILE])
    row = {"pattern": HOSTILE, "scope": HOSTILE, "sparsity": 0.5, "perplexity": 3.0}
    swept = made_up.sweep(model=HOSTILE, rows=[row, row | {"sparsity": 0.6}, row | {"scope": None, "pattern": f"2:4{HOSTILE}"}])
    return [
        written(folder, pruned, "<script>alert(3)</script>".replace("/", "_")),
        made_up.write(folder / "<img src=x>.json", full),
        made_up.write(folder / "sweep.json", swept),
        made_up.write(folder / "bench.json", timed),
    ]


def test_hostile_strings_are_inert(tmp_path):
    text = made(tmp_path, *hostile_sources(tmp_path))
    outline = Outline(text)
    assert outline.open == []
    assert [attributes["id"] for attributes in outline.all("section")] == SECTIONS
    assert len(outline.all("script")) == len(outline.all("style")) == 1
    assert outline.all("img") == []
    links = outline.all("a")[len(SECTIONS) - 1 :]
    assert links
    assert all(
        each["class"] == "download" and re.fullmatch(r"data:text/csv;charset=utf-8,[\w%.~/-]+", each["href"]) for each in links
    )
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert HOSTILE.replace("\ud800", "?") in outline.texts["generations"]


def test_names_are_no_formulas(tmp_path):
    tasks = {"$\\frac{$": made_up.tasks()["rte"], "_hidden": made_up.tasks()["rte"], "测试": made_up.tasks()["rte"]}
    outline = Outline(made(tmp_path, made_up.write(tmp_path / "e.json", made_up.evaluation("_hidden", 0.5, tasks=tasks))))
    for name in ("$\\frac{$", "测试"):
        assert outline.texts["zero-shot"].count(name) == 2  # in the plot and in the table


def test_nothing_is_fetched(tmp_path):
    text = made(tmp_path, *made_up.everything(tmp_path))
    outline = Outline(text)
    policy = next(each["content"] for each in outline.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for _, attributes in outline.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:,", "data:text/csv;"))
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_same_sources_give_the_same_bytes(tmp_path):
    paths = made_up.everything(tmp_path)
    first, second = tmp_path / "1.html", tmp_path / "2.html"
    for output in (first, second):
        uniprune.report(paths, output)
    assert first.read_bytes() == second.read_bytes()


def test_facts_are_those_of_the_sources(tmp_path):
    paths = made_up.everything(tmp_path)
    facts = uniprune.report(paths, tmp_path / "report.html")
    assert [source.kind for source in facts.sources] == ["pruning", "evaluation", "evaluation", "sweep", "bench"]
    assert facts.sources[3].result == json.loads(paths[3].read_text())
    pruned, dense = facts.models
    assert (pruned.perplexity, pruned.dense_perplexity, pruned.kl) == (18.25, 12.5, 0.3125)
    assert (dense.label, dense.pattern) == ("Toy-1M", None)


def test_large_figures_are_those_of_one_model(tmp_path):
    paths = made_up.everything(tmp_path)
    assert [figure.label for figure in figures(put_together(*paths))] == ["Sparsity", "Perplexity", "Accuracy", "KL divergence"]
    two = put_together(*paths, written(tmp_path, made_up.pruning(), "other"))
    assert figures(two) == []
    assert two.title == "Toy-1M: 2 pruned models"
    assert sentences(two)[0] == "2 pruned models, 51.2% of their prunable weights zero: pruned, other."


# ------------------------------------------------------------------------------------------------------------ the command


def test_outputs_are_kept_and_whole(tmp_path, monkeypatch):
    path, output = made_up.write(tmp_path / "e.json", made_up.evaluation()), tmp_path / "report.html"
    output.write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        uniprune.report([path], output)
    with pytest.raises(InputError, match=r"let its name end in \.html"):
        uniprune.report([path], tmp_path / "report.pdf")
    monkeypatch.setattr("uniprune.entrypoints.report.render", lambda *arguments: None)  # fails while it is written
    with pytest.raises(TypeError):
        uniprune.report([path], output, overwrite=True)
    assert output.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, output]
    monkeypatch.undo()
    uniprune.report([path], output, overwrite=True)
    assert output.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("name", "form"), [("pruning.json", "json"), ("README.md", "md")])
def test_what_a_report_is_of_is_not_replaced(tmp_path, name, form):
    made_up.write(tmp_path / "pruned" / "pruning.json", made_up.pruning())
    (tmp_path / "pruned" / "README.md").write_text("card")
    before = (tmp_path / "pruned" / name).read_text()
    with pytest.raises(InputError, match="the input"):
        uniprune.report([tmp_path / "pruned"], tmp_path / "pruned" / name, format=form, overwrite=True)
    assert (tmp_path / "pruned" / name).read_text() == before
    for _ in range(2):
        uniprune.report([tmp_path / "pruned"], tmp_path / "pruned" / f"report.{form}", format=form, overwrite=True)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "uniprune.reporting.sections", raising=False)
    monkeypatch.delitem(sys.modules, "uniprune.reporting.plots", raising=False)
    monkeypatch.delattr(uniprune, "plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        uniprune.report([made_up.write(tmp_path / "e.json", made_up.evaluation())], tmp_path / "report.html")


def test_the_command(capsys, monkeypatch, tmp_path):
    paths, output = made_up.everything(tmp_path), tmp_path / "report.html"
    code, printed, errors = run(capsys, monkeypatch, "report", *paths, "-o", output)
    assert (code, errors) == (0, "")
    assert "18.25" in printed
    assert "dense with zeros" in printed
    code, printed, errors = run(capsys, monkeypatch, "report", *paths, "-o", output)
    assert (code, printed) == (2, "")
    assert "--overwrite" in errors
    code, printed, errors = run(capsys, monkeypatch, "report", *paths, "-o", output, "--overwrite", "--json")
    assert (code, errors, printed.count("\n")) == (0, "", 1)
    assert json.loads(printed)["output"] == str(output)
    code, printed, errors = run(capsys, monkeypatch, "report", tmp_path / "gone", "-o", tmp_path / "other.html")
    assert code == 2
    assert errors.startswith("error: ")
    assert "gone" in errors


def test_hostile_strings_do_not_move_the_terminal(capsys, monkeypatch, tmp_path):
    code, printed, errors = run(capsys, monkeypatch, "report", *hostile_sources(tmp_path), "-o", tmp_path / "report.html")
    assert (code, errors) == (0, "")
    assert "\x1b" not in printed
    assert "[red]" in printed


def test_real_results_make_a_report(tmp_path, folder):
    """What the commands write today is what a report reads."""
    recipe = uniprune.Recipe(sparsity="0.5", windows=8, length=32)
    pruned = tmp_path / "half"
    uniprune.prune(str(folder), recipe, pruned)
    paths = [pruned]
    for name, model in (("half", pruned), ("dense", folder)):
        paths.append(tmp_path / f"{name}.json")
        uniprune.evaluate(str(model), windows=4, length=32).write(paths[-1])
    outline = Outline(made(tmp_path, *paths))
    assert [attributes["id"] for attributes in outline.all("section")] == [*SECTIONS[:2], *SECTIONS[3:6], "protocol"]
    assert "times the dense model's" in outline.texts["summary"]
    assert len(ControllerRecord(**json.loads((pruned / "pruning.json").read_text())["controller"]).judged_at) > 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_mixture_is_reported_by_kind(fused, tmp_path):
    tiny("qwen3_moe", num_experts=4).save_pretrained(tmp_path, save_original_format=not fused)
    found = find_matrices(skeleton(resolve(tmp_path)))
    matrices = {name: {"shape": matrix.shape, "sparsity": 0.5} for name, matrix in found.items()}
    grid = Pruning(**made_up.pruning(matrices=matrices)).grid
    stacked = ["experts.gate_up_proj.*", "experts.down_proj.*"]
    kinds = stacked if fused else [f"experts.*.{kind}_proj" for kind in ("gate", "up", "down")]
    kinds = [*(f"self_attn.{kind}_proj" for kind in "qkvo"), *(f"mlp.{kind}" for kind in kinds)]
    assert sorted(grid) == sorted((str(block), kind) for block in range(2) for kind in kinds)


def test_plots_take_their_colours_from_the_page():
    plot = plots.heatmap("h", Pruning(**made_up.pruning()).grid)
    assert not re.search(r"#(?!h-)[0-9a-f]{6}", plot.svg)
    assert "var(--heat)" in plot.svg
    assert "currentColor" in plot.svg
    assert "from 20.0%" in plot.says
    assert "to 80.0%" in plot.says


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/a/m/model", "/b/m/model", False),
        ("/a/m/model", "/a/x/../m/model", True),
        ("../m/model", "/a/m/model", True),
        ("../n/model", "/a/m/model", False),
        ("org/name", "org/name", True),
        ("org/name", "other/name", False),
        ("name", "org/name", False),
        (None, "org/name", False),
        (".", "/a/m/model", False),
        ("..", "/a/m/model", False),
    ],
)
def test_a_model_is_its_path(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same


def test_an_axis_between_two_steps_has_numbers():
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    plots._log(axes, "y", [11.8, 12.2, 12.9])
    assert [round(float(tick), 3) for tick in axes.get_yticks()] == [11.8, 12.9]
    plt.close(figure)
