"""Every example runs as its docstring says, on a tiny model."""

from pathlib import Path

import pytest

from processes import Forked, script

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWS = {
    "finetune": ["pruned: perplexity", "tuned: perplexity", "50.0% zeros"],
    "finetune --lora": ["pruned: perplexity", "merged: perplexity", "50.0% zeros"],
    "quickstart": ["50.0% of 21 matrices is zero", "perplexity: ", "KL to the dense model", "pruned: "],
    "own_metric": ["wanda", "peaky:a=0.5", "peaky:a=0 "],
    "own_text": ["the same masks: True"],
    "walkthrough": ["weights are prunable", "2:4: 50.0% removed", "nothing beats it", "pruning.json", "reproduced: True"],
}


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {name.split()[0] for name in SHOWS} | {
        "demo"
    }  # the demo is run by make demo


@pytest.mark.parametrize("name", SHOWS)
def test_examples_run(folder, tmp_path, name):
    name, *flags = name.split()
    arguments = [folder, tmp_path / "out"][: 1 if name == "own_metric" else 2]
    done = Forked(script, EXAMPLES / f"{name}.py", *arguments, *flags, folder=tmp_path).wait()
    assert done.code == 0, done.err
    for text in SHOWS[" ".join([name, *flags])]:
        assert text in done.out
