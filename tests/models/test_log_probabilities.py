"""Log-probabilities over a large vocabulary, which PyTorch's own lose small terms of."""

import torch

from uniprune.models.output_head import log_probabilities


def test_small_terms_of_a_large_vocabulary_count():
    torch.manual_seed(0)
    logits = 2 * torch.randn(16, 151_936) - 4
    logits[:, 0] += 20
    tokens = torch.arange(16) * (torch.arange(16) % 2)
    true = logits.double().log_softmax(-1)
    assert float((log_probabilities(logits) - true).mean().abs()) < 1e-6
    of_one = true.gather(-1, tokens[:, None])[:, 0]
    assert float((log_probabilities(logits, tokens) - of_one).mean().abs()) < 1e-6


def test_any_type_and_what_is_not_finite():
    logits = torch.randn(2, 3, 50)
    found = log_probabilities(logits.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.bfloat16().float().log_softmax(-1), atol=1e-5)
    assert log_probabilities(torch.full((1, 5), float("inf"))).isnan().all()
