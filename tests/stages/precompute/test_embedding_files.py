"""How the embeddings of an encoder of several layers are laid out in a group."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from imagen_core.store import StoreDtype
from stages.encoders.base import EncoderIdentity
from stages.precompute.embedding_files import EmbeddingFiles

LAYERS = (9, 18, 27)


def files_of(
    *, stacked: bool, dtype: StoreDtype = "int8", started: Mapping[str, Any] | None = None, dim: int = 24
) -> EmbeddingFiles:
    identity = EncoderIdentity(dim, {"model": "x"}, LAYERS, stacked)
    return EmbeddingFiles.of_text("text", identity, dtype, "hdf5", identity.fingerprint, started)


def test_stacked_layers_are_apart_and_others_have_a_scale_each_as_int8() -> None:
    stacked, joined = files_of(stacked=True), files_of(stacked=False)
    assert (stacked.dim, stacked.layers, stacked.num_scales) == (8, LAYERS, 1)
    assert (joined.dim, joined.layers, joined.num_scales) == (24, (), 3)
    assert stacked.config()["layers"] == [9, 18, 27]
    assert joined.config()["num_scales"] == 3
    assert stacked.token_values == joined.token_values == 24
    assert (stacked.blank.values.shape, joined.blank.values.shape) == ((0, 3, 8), (0, 24))


def test_a_row_is_split_into_its_layers_without_a_copy() -> None:
    row = np.arange(48, dtype=np.float32).reshape(2, 24)
    found = files_of(stacked=True).with_layers(row)
    np.testing.assert_array_equal(found[1], row[1].reshape(3, 8))
    assert np.shares_memory(found, row)
    assert files_of(stacked=False).with_layers(row) is row


def test_without_int8_and_without_stack_nothing_is_recorded_of_layers() -> None:
    files = files_of(stacked=False, dtype="bfloat16")
    assert files == EmbeddingFiles("text", "text", 24, "bfloat16", "hdf5", {"model": "x"})
    assert not {"layers", "num_scales"} & files.config().keys()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_group_that_an_earlier_version_started_goes_on_as_it_was(stacked: bool, dtype: StoreDtype) -> None:
    before = EmbeddingFiles("text", "text", 24, dtype, "hdf5", {"model": "x"})
    assert files_of(stacked=stacked, dtype=dtype, started={"config": before.config(0.99)}) == before


@pytest.mark.parametrize("stacked", [True, False])
def test_a_group_that_this_version_started_goes_on_as_it_was(stacked: bool) -> None:
    new = files_of(stacked=stacked)
    assert files_of(stacked=stacked, started={"config": new.config(0.99)}) == new
