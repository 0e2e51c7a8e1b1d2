"""Models that are pruned in place, without a run: what is tested here does not depend on how masks were chosen."""

from uniprune.models.matrices import find_matrices
from uniprune.sparsity.patterns.spelling import parse


def prune(model, spec):
    """Zeroes the smallest weights of every matrix of a model, in the pattern ``spec``."""
    for matrix in find_matrices(model).values():
        mask = dict(parse(spec)({"": matrix.weight.float().abs()}))[""]
        matrix.parameter.masked_fill_(~(mask.T if matrix.transposed else mask), 0.0)
    return model
