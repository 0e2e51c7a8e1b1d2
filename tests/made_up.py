"""Results that no model ever had, in the form in which the commands write them: for tests of what shows results."""

import json
import math

from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.spelling import parse
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.structure import structure
from uniprune.speed.timing import Result

BASE = "/somewhere/else/Toy-1M.gguf"
TEXT = {
    "text": "/data/toy.txt",
    "windows": 4,
    "length": 64,
    "available_windows": 9,
    "join": "\n\n",
    "bos": False,
    "sha256": "ab" * 32,
}
VERSIONS = {"python": "3.11.7", "uniprune": "0.1.0", "torch": "2.13.0"}
KINDS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}


def pruning(blocks=3, uniform=None, **changes):
    """A pruning.json: sparsities differ by matrix unless ``uniform`` is one for all."""
    matrices = {}
    for block in range(blocks):
        for index, (kind, shape) in enumerate(KINDS.items()):
            sparsity = (2 + (block + 2 * index) % 7) / 10 if uniform is None else uniform
            matrices[f"model.layers.{block}.{kind}"] = {"shape": shape, "sparsity": sparsity}
    size = sum(math.prod(each["shape"]) for each in matrices.values())
    total = sum(math.prod(each["shape"]) * each["sparsity"] for each in matrices.values())
    facts = {
        "model": {"name": BASE, "fingerprint": "f" * 64},
        "recipe": {"sparsity": "0.5", "metric": "wanda", "controller": "feedback", "tuning": {}, "windows": 16, "seed": 0},
        "pattern": "0.5 by model" if uniform is None else "2:4",
        "structure": structure(Unstructured(0.5, "model") if uniform is None else NM(2, 4)).model_dump(exclude_unset=True),
        "unsupported": {},
        "sparsity": total / size,
        "matrices": matrices,
        "calibration": TEXT,
        "versions": VERSIONS,
        "seconds": {"calibrate": 12.5},
        "controller": {
            "objective": "KL",
            "unit": "nats per token",
            "targets": ["0.5 by model"],
            "steps": 9,
            "judged_every": 2,
            "held_out_loss": [0.9, 0.6, 0.5, 0.45, 0.44, 0.43],
            "best_held_out_loss": 0.43,
            "tokens": 9216,
            "loss": [1.0, 0.8, 0.7, 0.62, 0.6, 0.58, 0.55, 0.54, 0.53],
            "flips": [0.02, 0.015, 0.012, 0.01, 0.008, 0.006, 0.004, 0.002, 0.001],
            "backed_off": 0,
        },
    }
    return facts | changes


def evaluation(model="pruned", sparsity=None, perplexity=18.25, **changes):
    """A result of evaluate, perplexity alone."""
    facts = {"model": model, "dtype": "float32", "perplexity": perplexity, "nats": 700.0, "tokens": 252, "windows": 4}
    facts |= {"length": 64, "stride": 64, "text": TEXT, "sparsity": sparsity, "versions": VERSIONS}
    return facts | changes


def dense(**changes):
    return evaluation(BASE, 0.0, 12.5, **changes)


def tasks():
    """Of 100 questions: a loss that is real, and one that is not."""
    return {
        "/data/piqa.jsonl": {
            "format": "piqa", "questions": 100, "sha256": "cd" * 32,
            "acc": 0.60, "acc_stderr": 0.0492, "acc_norm": 0.61, "acc_norm_stderr": 0.0490,
            "against": {
                "acc": {"reference": 0.70, "gained": 2, "lost": 12, "p": 0.0129},
                "acc_norm": {"reference": 0.69, "gained": 3, "lost": 11, "p": 0.0574},
            },
        },
        "rte": {
            "format": "rte", "questions": 100, "sha256": "ef" * 32, "acc": 0.52, "acc_stderr": 0.0502,
            "against": {"acc": {"reference": 0.53, "gained": 5, "lost": 6, "p": 1.0}},
        },
    }  # fmt: skip


def closeness():
    return {
        "kl": 0.3125, "kl_stderr": 0.0125, "agreement": 0.734, "agreement_stderr": 0.011,
        "tokens": 2044, "windows": 4, "length": 64, "text": TEXT,
    }  # fmt: skip


def generations():
    return [
        {
            "prompt": "The capital of France is", "model": " Paris, the city of lights", "against": " Paris, the city of love",
            "same_tokens": 5, "tokens": 6,
        },
        {"prompt": "1, 2, 3,", "model": " 4, 5, 6", "against": " 4, 5, 6", "same_tokens": 6, "tokens": 6},
        {"prompt": "Once upon a time", "model": " there\nwas", "against": ", a king", "same_tokens": 0, "tokens": 4},
    ]  # fmt: skip


def protocol():
    return {
        "model": {"name": "pruned", "fingerprint": "0" * 64}, "against": None, "text": TEXT, "windows": 4, "length": 64,
        "stride": 64, "bos": False, "dtype": "float32", "device": "cpu", "threads": 2, "versions": VERSIONS,
        "tasks": {"piqa": "cd" * 32},
    }  # fmt: skip


def sweep(**changes):
    rows = [
        ("0.4", "model", 0.4, 13.0, 3_100_000),
        ("0.5", "model", 0.5, 14.5, 2_700_000),
        ("0.6", "model", 0.6, 19.0, 2_300_000),
    ]
    rows += [("0.5", "row", 0.5, 17.0, 2_720_000), ("0.6", "row", 0.6, 31.0, 2_310_000)]
    rows += [("2:4", None, 0.5, 21.0, 2_500_000), ("4:8", None, 0.5, 18.5, 2_600_000)]
    keys = ("pattern", "scope", "sparsity", "perplexity", "bytes")
    facts = {
        "sweep": 1,
        "model": BASE,
        "scores": {"name": "scores.safetensors", "sha256": "12" * 32},
        "protocol": protocol(),
        "dense": {"perplexity": 12.5, "bytes": 4_900_000},
        "rows": [
            dict(zip(keys, row, strict=True))
            | {"structure": structure(parse(row[0], default=row[1] or "row")).model_dump(exclude_unset=True)}
            for row in rows
        ],
    }
    return facts | changes


def everything(folder):
    """Sources for every section, written to a folder; their paths."""
    pruned = pruning()
    full = evaluation(sparsity=pruned["sparsity"], tasks=tasks(), against=BASE, closeness=closeness())
    full |= {"generations": generations(), "protocol": protocol()}
    full |= {"word_perplexity": 31.5, "byte_perplexity": 1.875, "by_position": {"1-512": 18.5, "512-2k": 17.5}}
    full |= {"comparable": [{"protocol": "WikiText-2, sequence length 64", "metric": "perplexity"}]}
    return [
        write(folder / "pruned" / "pruning.json", pruned).parent,
        write(folder / "evaluation.json", full),
        write(folder / "dense.json", dense()),
        write(folder / "sweep.json", sweep()),
        write(folder / "bench.json", speeds()),
    ]


def speeds(**changes):
    """A result of bench on a CPU: unstructured masks are faster from 50 % on, 2:4 has no kernel."""
    row = {"kind": "unstructured", "kernel": "CSR", "dtype": "float32", "against": "float32", "batch": 1, "rounds": 9}
    row |= {"seconds": 0.001, "left_dense": {}}
    values = ((0.5, 1.5, 1.4, 1.6), (0.9, 3.0, 2.9, 3.1))
    keys = ("sparsity", "speedup", "low", "high")
    missing = {"kind": "2:4", "kernel": "semi-structured", "dtype": "float32", "reason": "2:4 products need a CUDA GPU"}
    facts = {
        **{"kind": "bench", "format": 1, "model": BASE, "device": "CPU", "threads": 2, "shapes": {"32 x 32": 3}},
        **{"dtypes": ["float32"], "batches": [1], "missing": [missing], "seconds": 1.0, "versions": VERSIONS},
        "results": [row | dict(zip(keys, each, strict=True)) for each in values],
        **{"verdicts": ["unstructured (CSR): in float32 at batch 1 faster from 50% on."], "notes": ["Measured: products."]},
    }
    return facts | changes


def timed(speedup, **facts):
    """A product against the dense one of its dtype, in rounds that hardly differ."""
    facts = {"against": facts["dtype"], "sparsity": 0.0, "rounds": 9, "seconds": 0.001, "left_dense": {}} | facts
    return Result(speedup=speedup, low=speedup - 0.01, high=speedup + 0.01, **facts)


def packing(**changes):
    """What pack --runtime says of a folder."""
    facts = {"kind": "packing", "format": 1, "source": {"fingerprint": "f" * 64}, "packed": 12, "left_dense": {}}
    return facts | {"bytes": 2_600_000, "ratio": 0.55, "ratio_of_packed": 0.5} | changes


def write(path, facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))
    return path


def comparison(**changes):
    """A comparison.json: the dense model, and three methods of which one updates weights; scopes differ."""
    accuracy = {"format": "arc", "questions": 20, "acc": 0.4, "acc_stderr": 0.1, "acc_norm": 0.5}
    rows = []
    for method, spec, scope, value in (
        ("dense", None, None, 20.0),
        ("wanda", "0.5", "row", 40.0),
        ("ria:a=0.5", "2:4", None, 90.0),
        ("sparsegpt", "2:4", None, 60.0),
        ("feedback", "0.5", "model", 30.0),
    ):
        row = {"method": method, "sparsity": 0.0 if spec is None else 0.5, "perplexity": value, "nats_stderr": 0.02}
        row |= {
            "tasks": {"data/arc_easy.jsonl": accuracy},
            "seconds": {"evaluate": 2.0},
            "measured": "2026-01-02T03:04:05+00:00",
        }
        if spec is not None:
            made = structure(parse(spec, scope) if scope else parse(spec)).model_dump(exclude_unset=True)
            row |= {"pattern": spec, "scope": scope, "structure": made, "masks_digest": "c" * 64}
            row |= {"updates_weights": method == "sparsegpt", "seconds": {"calibrate": 12.34, "mask": 0.5, "evaluate": 2.0}}
        row |= {"word_perplexity": 3 * value, "byte_perplexity": 1.5, "by_position": {"1-512": value}}
        row |= {"right": {"data/arc_easy.jsonl": {"acc": "ff" if spec is None else "f1"}}, "written": [f"{method} goes on"]}
        if scope == "model":
            row["matrices"] = {
                f"model.layers.{block}.{kind}": (2 + (block + 2 * index) % 7) / 10
                for block in range(3)
                for index, kind in enumerate(KINDS)
            }
        rows.append(row)
    text = {"text": TEXT, "calibration": TEXT, "windows": 4, "length": 64, "stride": 64}
    facts = {
        "kind": "comparison",
        "format": 1,
        "model": BASE,
        "methods": ["wanda", "ria:a=0.5", "sparsegpt", "feedback"],
        "sparsities": ["0.5", "2:4"],
        "protocol": {**text, "dtype": "float32", "versions": VERSIONS, "settings": {"limit": None}, "prompts": ["To be"]},
        "rows": rows,
    }
    return facts | changes
