"""Rows in lm-evaluation-harness's format: by its own schema and readers where it is installed."""

import copy
import json
import sys
import types
from datetime import datetime

import pytest

import made_up
from uniprune.comparison import harness
from uniprune.comparison.results import Comparison

TEXT = "toy.txt_perplexity"
KEYS = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date"}


def test_each_row_has_a_file_of_its_own():
    found = Comparison(**made_up.comparison())
    files = dict(harness.files(found))
    assert [*files] == [
        "Toy-1M/results_2026-01-02T03-04-05+00-00.json",
        "Toy-1M-wanda-0.5/results_2026-01-02T03-04-05+00-00.json",
        "Toy-1M-ria__a=0.5-2__4/results_2026-01-02T03-04-05+00-00.json",
        "Toy-1M-sparsegpt-2__4/results_2026-01-02T03-04-05+00-00.json",
        "Toy-1M-feedback-0.5/results_2026-01-02T03-04-05+00-00.json",
    ]
    for (path, content), row in zip(files.items(), found.rows, strict=True):
        assert content.keys() >= KEYS
        assert path.startswith(f"{content['model_name_sanitized']}/")
        assert json.loads(json.dumps(content)) == content
        assert content["date"] == datetime.fromisoformat(row.measured).timestamp()
        read, task = content["results"][TEXT], content["results"]["arc_easy"]
        assert read["perplexity,none"] == row.perplexity
        assert read["perplexity_stderr,none"] == row.perplexity * row.nats_stderr
        assert (task["acc,none"], task["acc_stderr,none"]) == (row.tasks["data/arc_easy.jsonl"].acc, 0.1)
        assert (task["acc_norm,none"], task["acc_norm_stderr,none"]) == (0.5, "N/A")
        assert task["sample_len"] == content["n-samples"]["arc_easy"]["effective"] == 20
        assert content["higher_is_better"]["arc_easy"] == {"acc": True, "acc_norm": True}
        assert content["config"]["model_args"] == {"pretrained": made_up.BASE, "method": row.method, "sparsity": row.pattern}


def test_the_harness_reads_them():
    """Its schema, its table, its names of files, and its loggers."""
    pytest.importorskip("lm_eval")
    from lm_eval import result_schema
    from lm_eval.utils import get_file_datetime, get_results_filenames, make_table, sanitize_model_name

    for path, content in harness.files(Comparison(**made_up.comparison())):
        assert content.keys() <= result_schema.EvalResults.__annotations__.keys()
        assert content["config"].keys() <= result_schema._EvalConfig.__annotations__.keys()
        before = copy.deepcopy(content)
        lines = make_table(content).splitlines()
        assert content == before
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        assert any({"arc_easy", "acc", "0.4", "0.1"} <= {*line} for line in cells)
        assert any("perplexity" in line and "↓" in line for line in lines)
        assert get_results_filenames([f"lm_eval/{path}"])
        assert get_file_datetime(path) == "2026-01-02T03-04-05+00-00"
        assert sanitize_model_name(content["model_name_sanitized"]) == content["model_name_sanitized"]


def test_the_loggers_of_the_harness_take_them(monkeypatch):
    """Its loggers for W&B and Trackio, with modules in their places that keep what they are told."""
    pytest.importorskip("lm_eval")
    logged = []

    class Run(types.SimpleNamespace):
        def log(self, values, step=None):
            logged.append(values)

        def log_artifact(self, artifact):
            pass

    class Table:
        def __init__(self, columns):
            self.columns, self.rows = columns, []

        def add_data(self, *row):
            assert len(row) == len(self.columns)
            self.rows.append(row)

    class Artifact:
        def __init__(self, *given, **named):
            pass

        def new_file(self, *given, **named):
            return open("/dev/null", "w")

    config = types.SimpleNamespace(update=lambda *given, **named: None)
    run = Run(config=config, summary=config)
    wandb = types.SimpleNamespace(__version__="0.20.0", run=run, Table=Table, Artifact=Artifact)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackio = types.SimpleNamespace(init=lambda **given: run, log=run.log, config=config)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    from lm_eval.loggers import trackio_logger, wandb_logger

    monkeypatch.setattr(wandb_logger, "get_wandb_printer", lambda: None)
    for _, content in harness.files(Comparison(**made_up.comparison())):
        for logger in (wandb_logger.WandbLogger(), trackio_logger.TrackioLogger()):
            logged.clear()
            logger.post_init(content)
            logger.log_eval_result()
            assert logged[0]["arc_easy/acc"] == content["results"]["arc_easy"]["acc,none"]
            assert logged[0][f"{TEXT}/perplexity"] > 0
