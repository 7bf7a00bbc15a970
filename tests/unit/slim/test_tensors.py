"""Tensor files beside a spec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from viasd_calib.errors import SpecError
from viasd_calib.slim.tensors import read_tensors, write_bfloat16


def test_what_is_written_is_read_in_bfloat16(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    write_bfloat16({"a": weight, "b": weight.T}, tmp_path / "some.safetensors")
    read = read_tensors(tmp_path / "some.safetensors", "tensors")
    assert torch.equal(read["a"], weight.to(torch.bfloat16))
    assert torch.equal(read["b"], weight.T.to(torch.bfloat16))


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense"])
def test_a_file_that_cannot_be_read_is_named_with_the_mend(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"some\.safetensors cannot be read as bridges .*; export the spec again"):
        read_tensors(path, "bridges")
