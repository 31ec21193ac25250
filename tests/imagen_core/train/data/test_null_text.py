"""Models that were trained on the empty caption read it in place of a dropped one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_core.diffusion import Denoiser
from imagen_core.store import Store
from imagen_core.train import TrainConfig, TrainError
from imagen_core.train.context import TrainingContext
from imagen_core.train.data.encoders import null_text
from imagen_core.train.data.example import make_example
from imagen_core.train.data.stores import open_stores
from imagen_core.train.evaluation import sample_grid, validation_loss
from imagen_core.train.loss import TrainingLoss
from tests.imagen_core.train.small import ALONE, BASE_UNET, DIM, first_batch, make_config

CPU = torch.device("cpu")
EMPTY = np.arange(7 * DIM, dtype=np.float32).reshape(7, DIM)
"""Longer than any caption of the store, which have 1 to 5 tokens."""


def config(store: Path, **changes: object) -> TrainConfig:
    unet = BASE_UNET | {"dropped_caption": "empty_caption"}
    return make_config(store, denoiser={"unet": unet, "size_px": 16}, **changes)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_whose_caption_is_dropped_are_those_of_the_empty_caption(store: Path, compiled: bool) -> None:
    compute = {"channels_last": False, "compile": compiled}
    settings = config(store, conditioning_dropout={"text": 0.5}, compute=compute)
    batch, denoiser, empty = first_batch(settings), Denoiser(settings.denoiser).double(), torch.from_numpy(EMPTY)
    found = make_example(batch, settings, denoiser, CPU, 0, null_text=empty).conditioning
    plain = make_config(store, conditioning_dropout={"text": 0.5})
    keep = make_example(batch, plain, denoiser, CPU, 0).conditioning.text_keep
    assert keep is not None
    assert 0 < int(keep.sum()) < len(keep)
    assert found.text is not None
    assert found.text_mask is not None
    assert (found.text_keep, found.null_text, found.null_text_mask) == (None, None, None)
    for row, kept in enumerate(keep.tolist()):
        expected = batch.raw["text"][row][batch.raw["text_mask"][row]].double() if kept else empty.double()
        assert torch.equal(found.text[row][found.text_mask[row]], expected)
        assert not found.text[row][~found.text_mask[row]].any()


def test_the_empty_caption_comes_from_the_store_or_the_online_encoder(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(store, max_tokens=3)
    stores = open_stores(settings)
    assert null_text(stores, make_config(store), None) is None, "a model that does not need it"
    with pytest.raises(TrainError, match=r"dropped_caption=empty_caption: .*'t5' has no null embedding; encode the"):
        null_text(stores, settings, None)
    monkeypatch.setattr(Store, "null", lambda self, encoder, layers: EMPTY.astype(np.float16))
    for encode in (None, lambda captions: [EMPTY for caption in captions if caption == ""]):
        found = null_text(stores, settings, encode)
        assert found is not None
        assert found.dtype == torch.float32
        assert found.tolist() == EMPTY[:3].tolist()


def test_validation_and_grids_have_it_too(store: Path) -> None:
    settings = config(store, validation={"num_samples": 8}, grid={"num_images": 2, "num_steps": 1, "guidance": 3.0})
    denoiser = Denoiser(settings.denoiser).double()
    loss = TrainingLoss(denoiser, settings, "cpu")
    context = TrainingContext(settings, open_stores(settings), ALONE, denoiser, loss, None, torch.from_numpy(EMPTY))
    assert np.isfinite(validation_loss(context, *context.stores))
    assert sample_grid(context).shape[-1] == 3
    with pytest.raises(ValueError, match="reads the empty caption instead; give null_text"):
        sample_grid(replace(context, null_text=None))
