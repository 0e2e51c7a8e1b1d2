"""The table of types against PyTorch and the safetensors library."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uniprune.storage.dtypes import BY_DTYPE, FLOATS, PLAIN, TABLE, word
from uniprune.storage.safetensors_index import entries


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_names_and_sizes_are_those_of_the_library(row, tmp_path):
    save_file({"x": torch.zeros(2, 3).to(row.dtype)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == row.name
    entry = entries([tmp_path / "x.safetensors"])["x"]
    assert (entry.dtype, entry.stop - entry.start) == (row.name, 6 * row.size)
    assert row.size == row.dtype.itemsize
    assert BY_DTYPE[row.dtype] is row


@pytest.mark.parametrize("row", [row for row in TABLE if row.exponent is not None], ids=lambda row: row.name)
def test_the_exponent_tells_what_is_not_finite(row):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.5, torch.finfo(row.dtype).max]).to(row.dtype)
    bits = values.view(torch.uint8).numpy().view(row.uint)
    assert ((bits & row.uint(row.exponent)) == row.uint(row.exponent)).tolist() == (~torch.isfinite(values.float())).tolist()


def test_what_models_compute_in():
    assert set(PLAIN) < FLOATS == {row.name for row in TABLE if row.dtype.is_floating_point}
    assert (word("BF16"), word("I64"), word("F4")) == ("bf16", "u64", "u8")
