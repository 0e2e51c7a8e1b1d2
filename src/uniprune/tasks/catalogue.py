"""Tasks by name: their data sets on the Hub, what they ask of a model, and the lists of them that papers report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Listed:
    """A data set and its split, those that lm-evaluation-harness takes. ``examples``: the split of solved ones.

    fewshot: how many examples it asks with by default.
    """

    path: str
    split: str
    examples: str
    options: dict[str, Any] = field(default_factory=dict)
    fewshot: int = 0


NAMES: dict[str, Listed] = {
    "piqa": Listed("baber/piqa", "validation", "train"),
    "arc_easy": Listed("allenai/ai2_arc", "test", "train", {"name": "ARC-Easy"}),
    "arc_challenge": Listed("allenai/ai2_arc", "test", "train", {"name": "ARC-Challenge"}),
    "openbookqa": Listed("allenai/openbookqa", "test", "train", {"name": "main"}),
    "winogrande": Listed("allenai/winogrande", "validation", "train", {"name": "winogrande_xl"}),
    "hellaswag": Listed("Rowan/hellaswag", "validation", "train"),
    "boolq": Listed("aps/super_glue", "validation", "train", {"name": "boolq"}),
    "rte": Listed("nyu-mll/glue", "validation", "train", {"name": "rte"}),
    "sciq": Listed("allenai/sciq", "test", "train"),
    "race": Listed("EleutherAI/race", "test", "test", {"name": "high"}),
    "lambada": Listed("EleutherAI/lambada_openai", "test", "test", {"name": "default"}),
    "mmlu": Listed("cais/mmlu", "test", "dev", {"name": "all"}),
    "gsm8k": Listed("openai/gsm8k", "test", "train", {"name": "main"}, fewshot=5),
}


@dataclass(frozen=True)
class Suite:
    """The tasks of a published table. ``fewshot``: of those that are not asked without examples."""

    tasks: tuple[str, ...]
    source: str
    fewshot: dict[str, int] = field(default_factory=dict)


_SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SUITES: dict[str, Suite] = {
    "wanda": Suite(
        ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        "Wanda, 2306.11695; also OWL, 2310.05175",
    ),
    "llm-pruner": Suite(_SEVEN, "LLM-Pruner, 2305.11627"),
    "roi": Suite(("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "race", "sciq"), "RoI, 2608.23048"),
    "leap": Suite(("piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "mmlu"), "LEAP, 2605.17289"),
    "slidesparse": Suite(
        ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "openbookqa", "mmlu"),
        "SlideSparse, 2603.05232",
        {"mmlu": 5},
    ),
}

CAPABILITIES: dict[str, tuple[str, ...]] = {
    "knowledge": ("mmlu", "arc", "arc_easy", "arc_challenge", "openbookqa", "sciq", "triviaqa", "nq_open", "commonsense_qa"),
    "reasoning": ("piqa", "hellaswag", "winogrande", "copa", "gsm8k", "gsm8k_cot", "gsm8k_platinum", "minerva_math500", "bbh"),
    "language": ("lambada", "lambada_openai", "lambada_standard", "race", "boolq", "rte"),
    "instructions": ("ifeval",),
    "code": ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus"),
}
"""What tasks, and formats of rows, ask for. Knowledge: facts. Reasoning: steps or common sense. Language: what a text says."""

_STEM = """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics
    college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology
    high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics high_school_statistics
    machine_learning"""
_HUMANITIES = """formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
    jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"""
_SOCIAL = """econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
    high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
    security_studies sociology us_foreign_policy"""
_OTHER = """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics
    miscellaneous nutrition professional_accounting professional_medicine virology"""
FIELDS: dict[str, str] = {
    subject: name
    for name, subjects in (
        ("STEM", _STEM),
        ("humanities", _HUMANITIES),
        ("social sciences", _SOCIAL),
        ("other", _OTHER),
    )
    for subject in subjects.split()
}
"""Subjects of MMLU (Hendrycks et al., 2009.03300) -> the four groups that it reports."""


def listed(name: str) -> Listed | None:
    """The data set of a task's name; ``mmlu_anatomy`` is one subject of MMLU."""
    subject = name.removeprefix("mmlu_")
    if name.startswith("mmlu_") and subject in FIELDS:
        return Listed("cais/mmlu", "test", "dev", {"name": subject})
    return NAMES.get(name)


def capability_of(name: str, format: str | None = None) -> str | None:
    """What a task asks for: by its name, else by the format of its rows."""
    for wanted in (name, format):
        for capability, tasks in CAPABILITIES.items():
            if wanted in tasks or ((wanted or "").startswith("mmlu_") and "mmlu" in tasks):
                return capability
    return None
