"""How many groups of 2:4 magnitude cannot tell apart: where the second and the third largest of four weights are equal.

    python benchmarks/ties.py

SmolLM2-135M comes as a GGUF file in 4 bits: dequantised, many weights of a block have exactly the same size, and ties go to the
lower index. Writes results/ties.json; seconds.
"""

from __future__ import annotations

import uniprune
from common import save, smollm2
from uniprune.models.matrices import find_matrices


def main() -> None:
    loaded = uniprune.load(smollm2(), dtype="float32", device="cpu")
    groups = tied = 0
    for matrix in find_matrices(loaded.model).values():
        ranked = matrix.weight.abs().reshape(-1, 4).sort(-1).values
        groups, tied = groups + len(ranked), tied + int((ranked[:, 1] == ranked[:, 2]).sum())
    save("ties", {"groups": groups, "tied": tied})
    print(f"{tied} of {groups} groups: {tied / groups:.1%}")


if __name__ == "__main__":
    main()
