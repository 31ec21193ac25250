"""Stores to export, and what reads an export back with the target's own library."""

import glob
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.store_tools.remove import remove_command
from tests.commands import Result, call
from tests.runs import precompute

TARGETS = ("parquet", "webdataset", "mds")
ENCODERS = (
    "encoders=[{name: t5, kind: t5, model: tiny-random-t5, max_tokens: 16}, "
    "{name: T5.long, kind: t5, model: tiny-random-t5, max_tokens: 32}]"
)
REMOVED, DUPLICATE = "3.png", "7.png"


def skip_without(target: str) -> None:
    if target == "mds" and not all(map(find_spec, ("streaming", "zstd"))):
        pytest.skip("mosaicml-streaming is not installed")


def import_streaming(module: str) -> ModuleType:
    """`streaming.base.MODULE`, without the `__init__` of its packages, which import torchvision and transformers 4."""
    name = f"streaming.base.{module}"
    if name in sys.modules:
        return sys.modules[name]
    packages = ("streaming", "streaming.base")
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        stand_in = ModuleType(package)
        stand_in.__path__ = list(spec.submodule_search_locations or ())
        stand_in.__spec__ = spec
        sys.modules[package] = stand_in
    try:
        return importlib.import_module(name)
    finally:
        for package in packages:
            del sys.modules[package]


def make_run(root: Path, *settings: str) -> Path:
    """A run of 9 images in two shards, with one to three captions each; one is removed, and one a duplicate that
    readers do not see."""
    images = root / "images"
    images.mkdir()
    for number in range(9):
        seed = 4 if f"{number}.png" == DUPLICATE else number
        pixels = np.random.default_rng(seed).integers(1, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
        captions = [f"image number {number}", "a shared caption", "the third é"]
        (images / f"{number}.txt").write_text("\n".join(captions[: 1 + number % 3]), encoding="utf-8")
    settings = (f"source.path={images}", "source.kind=folder", "shard_size=5", "duplicates=drop", *settings)
    precompute(root / "run", "images.sizes_px=[16,48]", ENCODERS, *settings)
    remove_command(str(root / "run"), key=[REMOVED])
    return root / "run"


def export(store: Path | str, target: str, out: Path | str, *options: str) -> Result:
    return call("export", str(store), "--to", target, "--out", str(out), "--executor", "inline", "--quiet", *options)


def try_once(store: Path, target: str, out: Path) -> Result:
    """An export that tries no shard again."""
    settings = (f"store={store}", f"to={target}", "execution.max_attempts=1")
    return call("run", "export", "--out", str(out), "--executor", "inline", "--quiet", *settings)


def data_files(out: Path) -> dict[str, bytes]:
    """Every file of an export, without those of its run."""
    data = out / "data"
    return {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*") if path.is_file()}


def tar_samples(out: Path) -> Iterator[dict[str, Any]]:
    """With webdataset, decoded."""
    import webdataset

    tars = sorted(glob.glob(f"{out}/data/*.tar"))
    return iter(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))


def parquet_samples(out: Path) -> Any:
    """With `datasets`, streaming from the folder."""
    import datasets

    return datasets.load_dataset(os.fspath(out / "data"), split="train", streaming=True)


def mds_samples(out: Path) -> list[dict[str, Any]]:
    """With mosaicml-streaming."""
    dataset = import_streaming("dataset").StreamingDataset(local=os.fspath(out / "data"), batch_size=1)
    return [dataset[number] for number in range(dataset.num_samples)]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Dtype, shape and each bit."""
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def as_array(values: object, like: np.ndarray) -> np.ndarray:
    """Nested lists, as `datasets` gives them, in the dtype of another array; nothing may be rounded on the way."""
    exact = np.asarray(values, dtype=np.float64 if like.dtype.kind == "f" else None).reshape(like.shape)
    array = exact.astype(like.dtype)
    assert np.array_equal(array.astype(exact.dtype), exact)
    return array
