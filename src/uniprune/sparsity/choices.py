"""The names that settings choose from, for those who do not load PyTorch."""

from typing import Literal

Scope = Literal["row", "matrix", "block", "model"]
Unsupported = Literal["refuse", "dense", "unstructured"]
