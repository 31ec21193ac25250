"""The arrays in files of caches: .npz, .safetensors, and what `torch.save` writes. Numbers only; nothing is run."""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, first_line
from stages.sources.arrays.npy import parse
from stages.sources.caches.base import Unusable
from stages.sources.files import Damaged
from stages.torch_files import NotTensorsError, read_torch_file

_GZIP = b"\x1f\x8b"
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_OTHERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?"}
_DTYPES = {**_FLOATS, **_OTHERS}


@dataclass(frozen=True, slots=True)
class Safetensors:
    """A .safetensors file in memory."""

    tensors: dict[str, dict[str, Any]]
    """By name, as the library reads them: `dtype`, `shape`, `data`."""
    metadata: dict[str, str]

    def array(self, name: str) -> np.ndarray:
        """A tensor; bfloat16 as float32 of the same values.

        Raises:
            Unusable: it is of a type that is not read.
        """
        tensor = self.tensors[name]
        if tensor["dtype"] not in _DTYPES:
            raise Unusable("unreadable_embedding", f"{name} is {tensor['dtype']}; {', '.join(_DTYPES)} are read")
        values = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        return widened(values) if tensor["dtype"] == "BF16" else values


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16 of its bits, as float32 of the same values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def read_npz(data: bytes, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz that it has.

    Raises:
        Unusable: it is damaged, or one of them does not hold numbers.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
            return {name: parse(archive.read(member), name) for name, member in members.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, Damaged) as error:
        raise unreadable(f"not an .npz: {error}") from error
    except ConfigError as error:
        raise unreadable(str(error)) from error


def read_safetensors(data: bytes) -> Safetensors:
    """What a .safetensors file holds.

    Raises:
        Unusable: it is damaged.
    """
    from safetensors import SafetensorError, deserialize

    try:
        tensors = dict(deserialize(data))
    except SafetensorError as error:
        raise unreadable(f"not a .safetensors file: {error}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Safetensors(tensors, header.get("__metadata__") or {})


def read_torch(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a dict that `torch.save` wrote, also compressed with gzip; bfloat16 as float32.

    Raises:
        Unusable: it is damaged, is no dict, or holds anything that would have to be run to be read.
    """
    import torch

    try:
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not compare checksums
                raise ValueError(f"the checksum of {damaged} differs")
        content = read_torch_file(io.BytesIO(data))
    except NotTensorsError as error:
        raise unreadable(f"the file {error}") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise unreadable(f"not a file of torch.save: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise unreadable(f"a {type(content).__name__}, not a dict of tensors; let the trainer write its cache again")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    try:
        return {name: (t.float() if t.is_floating_point() else t).detach().numpy() for name, t in tensors.items()}
    except (RuntimeError, TypeError) as error:  # sparse or quantised
        raise unreadable(f"not plain tensors: {first_line(error)}") from error


def unreadable(detail: str) -> Unusable:
    """A file that does not hold what it should."""
    return Unusable("unreadable_embedding", detail[:200])


def missing(name: str, present: Iterable[str]) -> Unusable:
    """A file without the wanted array."""
    return Unusable("missing_embedding", f"no {name}; it has: {', '.join(present)}"[:200])
