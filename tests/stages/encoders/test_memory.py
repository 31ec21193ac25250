"""A batch that does not fit into memory is halved, for good; the embeddings are those of larger batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from imagen_core.store import Store
from stages.encoders.batches.memory import is_out_of_memory, run_batches
from stages.encoders.clip_image import ClipImageConfig
from stages.encoders.encoder import load_encoder
from stages.encoders.packed.t5 import PackedT5
from stages.encoders.registry import AnyEncoder
from tests.runs import SMALL, precompute
from tests.stages.encoders import tiny_models

CAPTIONS = [f"a red circle and {'many ' * i} blue squares" for i in range(12)]
CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")


def small_memory(forward: Callable[..., Any], fits: Callable[..., bool], failures: list[int]) -> Callable[..., Any]:
    """The model on a device where only some batches fit."""

    def call(*arguments: Any, **named: Any) -> Any:
        if not fits(*arguments, **named):
            failures.append(1)
            if len(failures) % 2:
                raise CUDA_ERROR
            torch.empty(1 << 60)  # the CPU's allocator refuses in its own words
        return forward(*arguments, **named)

    return call


@pytest.mark.parametrize("make", [pytest.param(tiny_models.t5, marks=pytest.mark.slow), tiny_models.bert])
def test_captions_that_do_not_fit_together_are_encoded_in_smaller_batches(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = "t5" if make is tiny_models.t5 else "auto"
    settings = {"name": "text", "kind": kind, "model": str(tiny_models.write(make, tmp_path / "model"))}
    encoder = load_encoder(
        TypeAdapter(AnyEncoder).validate_python({**settings, "compute_dtype": "float32", "num_gpus": 0}), 1
    )
    expected = encoder.encode(CAPTIONS)
    assert expected.oom_halvings == 0
    assert expected.oom_counter() == {}
    most = max(len(e) for e in expected.embeddings) + 3
    failures: list[int] = []
    encoder.model = Small(encoder.model, small_memory(encoder.model, lambda ids, _: len(ids) <= most, failures))
    found = encoder.encode(CAPTIONS)
    assert found.oom_halvings == len(failures) > 1
    assert found.oom_counter() == {"oom_halvings": len(failures)}
    for a, b in zip(found.embeddings, expected.embeddings, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-5
    assert encoder.tokens_per_batch == 4096 >> len(failures)
    assert f"batches of at most {encoder.tokens_per_batch} from now on" in caplog.messages[-1]
    assert encoder.encode(CAPTIONS).oom_halvings == 0, "the worker remembers"


class Small:
    """A token model whose calls go elsewhere."""

    def __init__(self, model: Any, call: Callable[..., Any]):
        self.padded, self.pooled, self.call = model.padded, model.pooled, call

    def __call__(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        return self.call(ids, lengths)


def test_images_that_do_not_fit_together_are_encoded_in_smaller_batches(tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.clip, tmp_path / "clip")
    settings = {"name": "clip", "model": str(folder), "from_px": 32, "compute_dtype": "float32", "num_gpus": 0}
    encoder = load_encoder(ClipImageConfig.model_validate({**settings, "batch_size": 16}), 1)
    images = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), dtype=np.uint8)
    expected = encoder.encode(images).embeddings
    failures: list[int] = []
    encoder._model = small_memory(encoder._model, lambda pixel_values: len(pixel_values) <= 5, failures)
    found = encoder.encode(iter(images))
    assert (found.oom_halvings, encoder.batch_size) == (2, 4)
    assert len(found.embeddings) == 21
    assert np.abs(np.concatenate(found.embeddings) - np.concatenate(expected)).max() <= 1e-5


def test_a_single_item_that_does_not_fit_is_an_error_that_says_so() -> None:
    def split(items: Sequence[int], limit: int) -> list[list[int]]:
        return [list(items[i : i + limit]) for i in range(0, len(items), limit)]

    def forward(batch: list[int]) -> torch.Tensor:
        if 3 in batch:
            raise CUDA_ERROR
        return torch.tensor(batch)

    assert run_batches([0, 1, 2], 2, split, forward).results[1][0] == [2]
    with pytest.raises(MemoryError, match=r"a batch of one does not fit into memory \(CUDA out of memory.*GiB\.\)$"):
        run_batches(range(8), 8, split, forward)


def test_other_errors_of_a_model_are_not_taken_for_memory() -> None:
    def forward(_: list[int]) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_batches([1, 2], 2, lambda items, _: [list(items)], forward)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


@pytest.mark.slow
def test_a_run_short_of_memory_ends_well_and_counts_the_halvings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SMALL, "store.dtype=float32", "encoders.0.compute_dtype=float32", "encoders.0.max_tokens=40")
    precompute(tmp_path / "plenty", *settings)
    limited = small_memory(PackedT5.__call__, lambda _, ids, __: len(ids) <= 40, [])
    monkeypatch.setattr(PackedT5, "__call__", limited)
    summary = precompute(tmp_path / "short", *settings)
    assert summary["tally"]["groups"]["text-t5"]["counters"]["oom_halvings"] >= 1
    pairs = list(zip(Store.open(tmp_path / "short" / "store"), Store.open(tmp_path / "plenty" / "store"), strict=True))
    assert len(pairs) == 19
    for short, plenty in pairs:
        assert short.captions == plenty.captions
        assert np.abs(short.text["t5"][0] - plenty.text["t5"][0]).max() <= 1e-5
