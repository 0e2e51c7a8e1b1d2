"""``python -m uniprune``, and what ``torchrun -m uniprune`` starts."""

from uniprune.cli.main import main

main()
