"""What the name of a matrix says: which block it lies in, and which kind it is.

A name is parts with dots between them, as checkpoints have it, and its first part that is a number is its block's:
``model.layers.7.mlp.experts.3.up_proj``. Experts are counted before a matrix's own name if each is a module, and after it if
they are one stacked tensor (``model.layers.7.mlp.experts.up_proj.3``; docs/masks.md). Neither spelling is a kind of its own.
"""

from __future__ import annotations

import re


def split_at_block(name: str) -> tuple[str, str]:
    """The name up to the block's number, and what follows: ``model.layers.7`` and ``mlp.up_proj``.

    The first is empty if no part is a number, and the second if the name ends with the block's.
    """
    parts = name.split(".")
    end = next((place for place, part in enumerate(parts, 1) if part.isdecimal()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def block_of(name: str) -> str:
    """The number of the block that a matrix lies in, as it is spelled; empty if the name has none."""
    return split_at_block(name)[0].rpartition(".")[2]


def kind_of(name: str) -> str:
    """The name with ``*`` for every number: the same at one place of all blocks, and of all experts."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def expression_for(name: str) -> str:
    """A regular expression for the names of this kind, whole."""
    return "^" + r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in kind_of(name).split(".")) + "$"
