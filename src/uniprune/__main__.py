"""``python -m uniprune``, and what ``torchrun -m uniprune`` starts."""

from uniprune.cli import main

main()
