"""The controller that stops at the start: local scores times what each output is worth to the loss."""

import pytest
import torch
from torch.nn import functional

from conftest import VOCABULARY, tiny_model
from small_models import tiny
from uniprune.controller.fisher import Fisher
from uniprune.models.matrices import find_matrices
from uniprune.saliency.calibration import Calibration, one_shot
from uniprune.saliency.metrics import RIA, Wanda
from uniprune.sparsity.patterns.nm import NM
from uniprune.sparsity.patterns.unstructured import Unstructured
from uniprune.sparsity.views import Comparable


def calibration(windows=6, length=16):
    model = tiny_model(initializer_range=0.3)
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))
    return Calibration(model, find_matrices(model), ids)


def test_scores_by_hand():
    """Wanda's, times the root of the mean squared gradient that the next-token loss has at an output."""
    given = calibration()
    found, record = Fisher(batch_tokens=32).calibrate(given, Wanda(), [], steps=2)
    windows, outputs = given.windows[:4], {name: [] for name in given.matrices}
    hooks = [
        matrix.module.register_forward_hook(lambda module, args, output, name=name: outputs[name].append(output))
        for name, matrix in given.matrices.items()
    ]
    with torch.enable_grad():
        leaf = given.model.get_input_embeddings()(windows).detach().requires_grad_()
        logits = given.model(inputs_embeds=leaf).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [output for (output,) in outputs.values()])
    for hook in hooks:
        hook.remove()
    local = one_shot(Calibration(given.model, given.matrices, windows), Wanda())
    for name, gradient in zip(outputs, gradients, strict=True):
        worth = gradient.flatten(0, -2).square().mean(0).sqrt()
        torch.testing.assert_close(found[name], local[name] * worth[:, None], rtol=1e-4, atol=1e-7)
    assert (record.steps, record.tokens) == (2, 4 * 16)


def test_rows_that_no_gradient_reaches_keep_the_metrics_order():
    """Units of a ReLU that no token switches on."""
    model = tiny("opt")
    for block in model.model.decoder.layers:
        block.fc1.bias[:8] = -1e3
    given = Calibration(model, find_matrices(model), torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(0)))
    found, _ = Fisher().calibrate(given, Wanda(), [])
    expected = dict(NM(2, 4)(one_shot(given, Wanda())))
    assert all(torch.equal(mask, expected[name]) for name, mask in NM(2, 4)(found))


@pytest.mark.parametrize("metric", [Wanda(), RIA()], ids=lambda one: type(one).__name__)
def test_within_a_row_the_metric_decides_and_across_rows_the_loss(metric, caplog):
    given = calibration()
    found, _ = Fisher().calibrate(given, metric, [Unstructured(0.5, "model")])
    assert not caplog.records
    Fisher().calibrate(given, metric, [NM(2, 4)], steps=1)
    assert "changes nothing at 2:4" in caplog.text
    local = one_shot(given, metric)
    for pattern in (NM(2, 4), Unstructured(0.5, "row")):
        masks = dict(pattern(found))
        assert all(torch.equal(mask, masks[name]) for name, mask in pattern(local))
    masks = dict(Unstructured(0.5, "model")(Comparable(found)))
    kept = torch.stack([mask.float().mean() for mask in masks.values()])
    assert float(kept.std()) > 0.05


def test_where_no_matrix_has_a_gradient_the_metric_decides():
    """Queries and keys alone, of values that are all 0: at 0 each, some would keep everything and others nothing."""
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.v_proj.weight.zero_()
    given = Calibration(model, find_matrices(model, ["[qk]_proj"]), calibration().windows)
    found, record = Fisher().calibrate(given, Wanda(), [])
    assert len(record.without_gradient) == len(given.matrices)
    pattern = Unstructured(0.5, "row")
    expected = dict(pattern(one_shot(given, Wanda())))
    assert all(torch.equal(mask, expected[name]) for name, mask in pattern(found))
    kept = [float(mask.float().mean()) for mask in dict(Unstructured(0.5, "model")(Comparable(found))).values()]
    assert 0.2 < min(kept) <= max(kept) < 0.8
