"""Arrays of a file that may be anybody's."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.npz import load_npz

KINDS = arrays.integer_dtypes() | arrays.floating_dtypes(endianness="<") | arrays.unicode_string_dtypes(max_len=5)


@settings(max_examples=40, deadline=None)
@given(array=KINDS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))))
def test_what_numpy_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    named: dict[str, Any] = {"deep/name": array, "by_columns": np.asfortranarray(array)}
    np.savez(path, **named)
    found = load_npz(path, "arrays")
    assert set(found) == {"deep/name", "by_columns"}
    for back in found.values():
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
        assert back.flags.writeable


def _member(shape: str, kind: str, data: bytes) -> bytes:
    """A file whose array claims a shape."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (118 - len(header)) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "kind", "data"),
    [
        ("(1000000000000,)", "<f8", bytes(16)),  # numpy itself would allocate eight terabytes before it reads
        ("(1000000000000,)", "<U0", b""),
        ("(1, 2)", "<f8", bytes(24)),
        ("(-1,)", "<f8", bytes(8)),
        ("(1,)", "|O", bytes(8)),
        ("()", "no kind", bytes(8)),
    ],
)
def test_an_array_that_claims_what_it_is_not_is_refused(tmp_path: Path, shape: str, kind: str, data: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(_member(shape, kind, data))
    with pytest.raises(StoreError, match=r"expected arrays; got a file that does not fit at .*a\.npz"):
        load_npz(path, "arrays")


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000))
    with pytest.raises(StoreError, match="compressed members, which could unpack to any size"):
        load_npz(tmp_path / "a.npz", "arrays")
