"""Logits by the output head alone are the model's, where they are as large as those of trained models, too."""

import pytest
import torch

import catalogue
from small_models import kind_of
from uniprune.models.blocks import after_backbone, last_hidden
from uniprune.models.output_head import Head, output_embeddings

CAPPED = ["gemma2", "mistral_large4", "muse_glimmer", "muse_spark", "nanochat", "recurrent_gemma", "vaultgemma", "xlstm"]
SCALED = ["cohere", "falcon_h1", "granite", "minicpm3"]


@pytest.mark.parametrize(("kind", "largest"), [*((kind, 25) for kind in CAPPED + SCALED), *((kind, 90) for kind in CAPPED)])
def test_large_logits_are_capped_after_they_are_scaled(kind, largest):
    """A random model's logits are near 0, where a cap changes nothing. Some that are far above it tell nothing of the scale."""
    config = catalogue.small(kind)
    torch.manual_seed(0)
    model = kind_of(config).from_config(config).eval().requires_grad_(False)
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    head = output_embeddings(model)
    head.weight.mul_(largest / model(input_ids=ids, use_cache=False).logits.abs().max())
    logits, hidden = model(input_ids=ids, use_cache=False).logits, last_hidden(model, ids)
    assert logits.abs().max() > 8
    fitted = Head(model).fit(model, lambda: model(input_ids=ids, use_cache=False), hidden)
    torch.testing.assert_close(fitted(hidden), logits)
    assert fitted._model is None
    torch.testing.assert_close(after_backbone(model, hidden), logits)
