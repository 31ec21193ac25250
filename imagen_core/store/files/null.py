"""The null embedding (the encoding of "") of one encoder, as safetensors."""

import numpy as np
import safetensors
import safetensors.numpy

from imagen_core.store.errors import unreadable
from imagen_core.store.files.ragged import DISK_DTYPES, StoredEmbedding, cast_embedding, restore
from imagen_core.store.layout import NULL_TENSOR, StoreDtype

_DTYPES: dict[str, StoreDtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def dump_null(embedding: np.ndarray, dtype: StoreDtype) -> bytes:
    """The file of a float (n_tokens, dim) or (n_tokens, layers, dim) embedding, as tensor "embedding"; an int8 store
    keeps it as float16.

    Raises:
        ValueError: of another number of dimensions, or not finite after the cast.
    """
    dtype = "float16" if dtype == "int8" else dtype
    values = np.ascontiguousarray(cast_embedding(embedding, dtype).values)
    if dtype == "bfloat16":
        import torch
        from safetensors.torch import save

        tensor = torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
        return save({NULL_TENSOR: tensor})
    return safetensors.numpy.save({NULL_TENSOR: values})


def parse_null(data: bytes, file: str) -> tuple[np.ndarray, StoreDtype]:
    """The null embedding, float (n_tokens, dim) or (n_tokens, layers, dim), and the dtype it has on disk.

    Raises:
        StoreError: not safetensors, or without such a float tensor "embedding".
    """
    try:
        tensor = dict(safetensors.deserialize(data))[NULL_TENSOR]
        dtype = _DTYPES[tensor["dtype"]]
        values = np.frombuffer(tensor["data"], DISK_DTYPES[dtype]).reshape(tensor["shape"])
        if values.ndim not in (2, 3):
            raise ValueError(f"shape {values.shape}, not (n_tokens, dim) or (n_tokens, layers, dim)")
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise unreadable(file, "safetensors", error) from error
    return restore(StoredEmbedding(values), dtype), dtype
