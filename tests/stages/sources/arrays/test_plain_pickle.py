"""Pickles of plain data are read as pickle would, and nothing else is, whatever it is."""

import collections
import contextlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from stages.sources.arrays.plain_pickle import read_pickle
from stages.sources.files import Damaged

NUMBERS = np.arange(12, dtype=np.float16).reshape(3, 4)
PLAIN: dict[str, Any] = {
    "lists": [1, 2.5, None, True, False, "text é", b"bytes", b"", 10**30, -3, (1, 2, 3, 4), (), [], {}],
    "arrays": {
        "c": NUMBERS,
        "fortran": np.asfortranarray(NUMBERS),
        "big endian": NUMBERS.astype(">f4"),
        "bool": np.array([True, False]),
        "none": np.empty((0, 4), np.float32),
    },
    "scalar": np.float32(3.5),
    "ordered": collections.OrderedDict(a=1),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_arrays_are_read_as_pickle_reads_them(protocol: int) -> None:
    np.testing.assert_equal(read_pickle(pickle.dumps(PLAIN, protocol), "file"), PLAIN)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int8", "bool"])
def test_tensors_are_read_with_their_strides(dtype: str, protocol: int) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    views = {"whole": tensor, "turned": tensor.T, "column": tensor[1:, 2], "none": tensor[:0]}
    found = read_pickle(pickle.dumps(views, protocol), "file")
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view.float().numpy(), err_msg=name)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_with_code_is_refused_by_name_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"encodings": Payload(tmp_path / "ran")}, protocol)
    with pytest.raises(ConfigError, match=r"^some file: the pickle has posix.mkdir, which is not plain data"):
        read_pickle(data, "some file")
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)
    assert (tmp_path / "ran").exists(), "the payload is none"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "EMPTY_SET"),
        (print, "builtins.print"),
        (1j, "builtins.complex"),
        (np.array([None], object), "an array of object"),
        (np.array(["a"]), "an array of <U1"),
        (np.zeros(2, np.complex64), "an array of complex64"),
        (np.zeros(2, [("a", "f4")]), r"an array of \|V4"),
        (np.random.default_rng(0), "numpy.random"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Path("x"), "pathlib"),
    ],
)
def test_what_is_not_plain_data_is_refused_by_name(value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_pickle(pickle.dumps([value], 4), "file")


def test_names_that_are_known_do_only_what_they_are_for() -> None:
    opcodes = {
        "eval of a known function's attribute": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.view\x93.",
        "state of a function": b"\x80\x02c_codecs\nencode\n}b.",
        "call of a type": b"\x80\x02cnumpy\nndarray\n)R.",
        "a name as data": b"\x80\x02cnumpy\nndarray\n.",
        "call of text": b"\x80\x02X\x01\x00\x00\x00x)R.",
    }
    for what, data in opcodes.items():
        with pytest.raises((ConfigError, Damaged)):
            raise AssertionError(f"{what}: {read_pickle(data, 'file')!r}")


def test_damage_is_told_as_damage_and_nothing_else() -> None:
    chance = random.Random(0)
    for data in (pickle.dumps(PLAIN, 4), pickle.dumps(PLAIN, 2), pickle.dumps(torch.ones(3, 2), 4)):
        for _ in range(300):
            damaged = bytearray(data[: chance.randrange(1, len(data) + 1)])
            for _ in range(chance.randrange(3)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            with contextlib.suppress(ConfigError, Damaged):
                read_pickle(bytes(damaged), "file")


def test_what_is_shared_is_read_once() -> None:
    nested: list[Any] = ["x"]
    for _ in range(60):  # 2^60 items, if each were read for itself
        nested = [nested, nested]
    found = read_pickle(pickle.dumps(nested, 4), "file")
    assert found[0] is found[1]


def test_a_tensor_may_not_reach_outside_its_storage() -> None:
    data = pickle.dumps(torch.arange(6.0).reshape(2, 3), 4)
    strides = data.rindex(b"K\x03K\x01\x86")
    beyond = data[: strides + 1] + b"\x7f" + data[strides + 2 :]
    with pytest.raises(Damaged, match="out of bounds"):
        read_pickle(beyond, "file")
