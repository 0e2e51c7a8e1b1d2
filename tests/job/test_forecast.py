"""What is forecast of a pass, against the tensors that it has."""

import pytest
import torch

from small_models import tiny
from uniprune import Recipe
from uniprune.job.forecast.memory import FRAGMENTATION, Work, _Parts
from uniprune.models.blocks import BATCH_TOKENS
from uniprune.models.live import Live
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import Wanda

WIDE = {"hidden_size": 64, "intermediate_size": 1024}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 512}),
        ("llama", WIDE),
        ("gpt2", {"n_embd": 128}),
        ("mixtral", WIDE),
        ("gpt_oss", WIDE),
        ("mamba2", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_pass_of_the_local_metric_takes_what_was_forecast(family, sizes, dtype):
    model = tiny(family, **sizes).to(dtype)
    matrices, length = find_matrices(model), 64
    parts = _Parts(Work(model, matrices, Recipe(controller="none"), dtype, dtype, length))
    ids = torch.randint(0, 64, (BATCH_TOKENS // length, length), generator=torch.Generator().manual_seed(0))
    with Live() as live:
        one_shot(Calibration(model, matrices, ids), Wanda())
    assert 0.5 * BATCH_TOKENS * parts.passing < live.most < FRAGMENTATION * BATCH_TOKENS * parts.passing


def test_live_tensors_are_counted():
    with Live() as live:
        one = torch.ones(100)
        view = one.view(10, 10)[:5]
        del one
        other = view + 1
        view.mul_(2)
        del view
        torch.ones(10)
    assert live.most == 400 + 200
    assert other.nbytes == 200
