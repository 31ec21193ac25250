"""MDS datasets become stores, with their text latents bit for bit: written here as the format says, and by its own
writer."""

import bz2
import gzip
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from imagen_core.store import Store, verify_store
from pipeline.config import load_config
from pipeline.errors import ConfigError, PipelineError, StaleOutputError
from pipeline.storage.open import open_storage
from stages.precompute.given_embeddings import PrecomputedEmbeddingsStage
from tests.images import plain_png
from tests.object_store import object_store
from tests.runs import precompute, precompute_interrupted, store_bytes
from tests.stages.exports.exporting import export, import_streaming, make_run, skip_without
from tests.stages.sources.reading import outcomes
from workflows.precompute_config import PrecomputeConfig

DIM = 6
LENGTHS = (3, 1, 5, 2, 4)
LATENT, MASK = "latent_caption_t5gemma2b-256-bf16", "attention_mask_caption_t5gemma2b-256-bf16"
Column = tuple[str, int | None, Callable[[Any], bytes]]
"""Encoding, bytes if they are fixed, and what encodes a value."""


def states(seed: int, length: int = 8, dtype: Any = np.float16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, DIM)).astype(dtype)


def ndarray(array: np.ndarray) -> bytes:
    """An array whose type and shape are written before it."""
    code = {"uint8": 8, "int64": 65, "float16": 18, "float32": 34}[array.dtype.name]
    return bytes([code, array.ndim << 2 | 1]) + struct.pack(f"<{array.ndim}H", *array.shape) + array.tobytes()


def bf16(tensor: torch.Tensor) -> bytes:
    return struct.pack(f"<I{tensor.ndim}i", tensor.ndim, *tensor.shape) + tensor.view(torch.uint16).numpy().tobytes()


STR: Column = ("str", None, str.encode)
BYTES: Column = ("bytes", None, bytes)
ARRAY: Column = ("ndarray", None, ndarray)
INT: Column = ("int", 8, lambda value: struct.pack("<q", value))


def write_shard(folder: Path, number: int, columns: Mapping[str, Column], samples: Sequence[Mapping[str, Any]]) -> Any:
    """A shard file; returns its entry in the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    entry = {
        "column_encodings": [columns[name][0] for name in names],
        "column_names": names,
        "column_sizes": [columns[name][1] for name in names],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": f"shard.{number:05d}.mds", "bytes": 0, "hashes": {}},
        "samples": len(samples),
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }
    encoded = []
    for sample in samples:
        values = [columns[name][2](sample[name]) for name in names]
        sizes = [len(value) for name, value in zip(names, values, strict=True) if columns[name][1] is None]
        encoded.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(values))
    header = json.dumps({key: entry[key] for key in ("column_encodings", "column_names", "column_sizes")}).encode()
    start = 4 * (len(samples) + 2) + len(header)
    offsets = np.cumsum([start, *map(len, encoded)])
    data = struct.pack(f"<I{len(offsets)}I", len(samples), *offsets) + header + b"".join(encoded)
    entry["raw_data"]["bytes"] = len(data)
    (folder / entry["raw_data"]["basename"]).write_bytes(data)
    return entry


def write_index(folder: Path, entries: Sequence[Any]) -> None:
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": list(entries)}))


PRX: dict[str, Column] = {"image": BYTES, "caption": STR, LATENT: ARRAY, MASK: ARRAY, "score": INT}


def prx_sample(seed: int) -> dict[str, Any]:
    """Latents without padding, and a mask of full length."""
    length = LENGTHS[seed]
    latent, mask = states(seed)[:length], (np.arange(8) < length).astype(np.uint8)
    return {"image": plain_png(), "caption": f"caption {seed}", LATENT: latent, MASK: mask, "score": 100 + seed}


@pytest.fixture
def prx(tmp_path: Path) -> Path:
    folder = tmp_path / "mds"
    shards = [write_shard(folder, i, PRX, [prx_sample(s) for s in rows]) for i, rows in enumerate(((0, 1, 2), (3, 4)))]
    write_index(folder, shards)
    return folder


def settings(folder: Path, array: str = f"{{column: {LATENT}, mask_column: {MASK}}}", *more: str) -> tuple[str, ...]:
    return (
        *("source.kind=mds", f"source.path={folder}", f"source.arrays={{t5: {array}}}", "shard_size=2"),
        *("images.sizes_px=[16]", "store.dtype=float32", *more),
        f"encoders=[{{name: t5, kind: given, array: t5, model: google/t5gemma-2b-2b-ul2, dim: {DIM}}}]",
    )


def test_latents_of_prx_are_in_the_store_bit_for_bit(prx: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *settings(prx), "source.keep_columns=[score]")
    store = Store.open(tmp_path / "run" / "store")
    keys = [*(f"shard.00000/{i:07d}" for i in range(3)), *(f"shard.00001/{i:07d}" for i in range(2))]
    assert [sample.key for sample in store] == keys
    for seed, sample in enumerate(store):
        assert (sample.captions, sample.columns) == ([f"caption {seed}"], {"score": 100 + seed})
        assert sample.images[16].shape == (16, 16, 3)
        np.testing.assert_array_equal(sample.text["t5"], [states(seed)[: LENGTHS[seed]].astype(np.float32)])
    assert verify_store(tmp_path / "run" / "store").ok
    array = {"name": "t5", "column": LATENT, "mask_column": MASK}
    assert store.text_group("t5").fingerprint["array"] == array


def test_a_killed_run_goes_on_to_the_same_bytes(prx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precompute(tmp_path / "whole", *settings(prx))
    precompute_interrupted(
        PrecomputedEmbeddingsStage, (True, False, True, False), tmp_path / "run", *settings(prx), patch=monkeypatch
    )
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_worker_processes_make_the_same_bytes_also_from_a_url(prx: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "inline", *settings(prx))
    precompute(tmp_path / "local", *settings(prx), executor="local")
    assert store_bytes(tmp_path / "local") == store_bytes(tmp_path / "inline")
    with object_store() as s3:
        for path in prx.iterdir():
            open_storage(f"{s3.url}/mds").write(path.name, path.read_bytes())
        precompute(tmp_path / "far", *settings(prx), f"source.path={s3.url}/mds")
    assert store_bytes(tmp_path / "far") == store_bytes(tmp_path / "inline")


def test_new_shards_are_added_and_a_changed_one_is_refused(prx: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *settings(prx))
    index = json.loads((prx / "index.json").read_text())["shards"]
    write_index(prx, [*index, write_shard(prx, 2, PRX, [{**prx_sample(0), "caption": "new"}])])
    assert precompute(tmp_path / "run", *settings(prx))["num_samples"] == len(LENGTHS) + 1
    longer = write_shard(prx, 1, PRX, [prx_sample(4), prx_sample(2)])
    write_index(prx, [index[0], longer])
    with pytest.raises(StaleOutputError, match=r"shard.00001.mds: 625 bytes then, 661 now"):
        precompute(tmp_path / "run", *settings(prx))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("zstd", lambda data: pa.compress(data, "zstd", asbytes=True))],
)
def test_compressed_shards_are_read(
    prx: Path, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    precompute(tmp_path / "raw", *settings(prx))
    index = json.loads((prx / "index.json").read_text())["shards"]
    for entry in index:
        raw = prx / entry["raw_data"]["basename"]
        entry["compression"] = suffix
        entry["zip_data"] = {"basename": f"{raw.name}.{suffix}", "bytes": 1, "hashes": {}}
        (prx / entry["zip_data"]["basename"]).write_bytes(compress(raw.read_bytes()))
        raw.unlink()
    write_index(prx, index)
    precompute(tmp_path / "run", *settings(prx))
    for one, other in zip(Store.open(tmp_path / "run/store"), Store.open(tmp_path / "raw/store"), strict=True):
        assert one.captions == other.captions
        np.testing.assert_array_equal(one.text["t5"], other.text["t5"])


def test_padded_latents_of_bytes_are_cut_by_their_mask(tmp_path: Path) -> None:
    columns = dict.fromkeys(("image", "T5_LATENTS", "T5_ATTENTION_MASK", "CLIP_POOLED_TEXT"), BYTES)
    samples = [
        {
            "image": plain_png(),
            "DESCRIPTION": f"caption {seed}",
            "T5_LATENTS": states(seed).tobytes(),
            "T5_ATTENTION_MASK": (np.arange(8) < LENGTHS[seed]).tobytes(),
            "CLIP_POOLED_TEXT": states(seed)[0].tobytes(),
        }
        for seed in range(3)
    ]
    folder = tmp_path / "mds" / "part"
    write_index(folder, [write_shard(folder, 0, {**columns, "DESCRIPTION": STR}, samples)])
    t5 = f"{{column: T5_LATENTS, mask_column: T5_ATTENTION_MASK, dtype: float16, dim: {DIM}}}"
    caption = "source.caption_column=DESCRIPTION"
    precompute(tmp_path / "run", *settings(tmp_path / "mds", t5, caption))
    for seed, sample in enumerate(Store.open(tmp_path / "run" / "store")):
        np.testing.assert_array_equal(sample.text["t5"], [states(seed)[: LENGTHS[seed]]])
    precompute(tmp_path / "keep", *settings(tmp_path / "mds", t5.replace("}", ", pads: keep}"), caption))
    for seed, sample in enumerate(Store.open(tmp_path / "keep" / "store")):
        np.testing.assert_array_equal(sample.text["t5"], [states(seed)])
    pooled = f"{{column: CLIP_POOLED_TEXT, dtype: float16, dim: {DIM}}}"
    precompute(tmp_path / "pooled", *settings(tmp_path / "mds", pooled, caption))
    for seed, sample in enumerate(Store.open(tmp_path / "pooled" / "store")):
        np.testing.assert_array_equal(sample.text["t5"], [states(seed)[:1]])


def test_bfloat16_of_prx_is_kept_in_all_its_bits(tmp_path: Path) -> None:
    latent = (torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)) * 1e6).to(torch.bfloat16)
    columns: dict[str, Column] = {"image": BYTES, "caption": STR, LATENT: ("bf16", None, bf16)}
    sample = {"image": plain_png(), "caption": "a", LATENT: latent}
    write_index(tmp_path / "mds", [write_shard(tmp_path / "mds", 0, columns, [sample])])
    precompute(tmp_path / "run", *settings(tmp_path / "mds", f"{{column: {LATENT}}}"), "store.dtype=bfloat16")
    (one,) = Store.open(tmp_path / "run" / "store")
    np.testing.assert_array_equal(one.text["t5"][0], latent.float())


def test_a_sample_without_a_usable_latent_is_a_counted_drop(tmp_path: Path) -> None:
    folder = tmp_path / "mds"
    mask = np.array([1, 0, 1, 0, 0, 0, 0, 0], np.uint8)
    changes: list[dict[str, Any]] = [
        {},
        {MASK: mask, LATENT: states(1)},
        {MASK: np.zeros(8, np.uint8), LATENT: np.full((1, DIM), np.nan, np.float32)},
        {LATENT: states(3)[:5]},
        {LATENT: np.ones((4, DIM + 1), np.float32)},
    ]
    samples = [{**prx_sample(seed), **change} for seed, change in enumerate(changes)]
    write_index(folder, [write_shard(folder, 0, PRX, samples)])
    summary = precompute(tmp_path / "run", *settings(folder), "max_drop_fraction=1", "shard_size=9")
    drops = {"mask_with_holes": 1, "missing_embedding": 1, "unreadable_embedding": 1, "other_width": 1}
    assert summary["tally"]["groups"]["text-t5"]["drops"] == drops
    assert [sample.captions for sample in Store.open(tmp_path / "run" / "store")] == [["caption 0"]]


def test_samples_behind_the_end_of_a_cut_shard_are_counted_drops(prx: Path, tmp_path: Path) -> None:
    shard = prx / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    source = load_config(PrecomputeConfig, None, settings(prx)).source.build()
    found = outcomes(source)
    assert found["shard.00000/0000001"] == ["caption 1"]
    assert found["shard.00000/0000002"] == "unreadable_row"
    summary = precompute(tmp_path / "run", *settings(prx))
    assert summary["tally"]["groups"]["samples"]["drops"] == {"unreadable_row": 1}
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "source.caption_column=text",
            r"source.caption_column: .*00000.mds has no column 'text'; it has: attent",
        ),
        ("source.image_column=score", r"source.image_column: 'score' of .* is encoded as int, which is no image file"),
        ("source.arrays={t5: {column: x}}", "source.arrays.t5.column: .* has no column 'x'"),
        ("source.arrays={t5: {column: image}}", "source.arrays.t5: 'image' of .* is of bytes, so give their dtype"),
        ("source.arrays={t5: {column: image, dim: 3}}", "dtype and dim go together"),
        ("source.where=score > 3", "where: is not for source.kind=mds"),
        ("source.path=/nowhere/at/all", "source.path: /nowhere/at/all is not a folder"),
        ("source.image_column=null", "source.image_column is null, so there are no images"),
        ("encoders.0.array=clip", "array 'clip' is not in source.arrays, which has: t5"),
    ],
)
def test_settings_that_cannot_work_are_refused(prx: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        precompute(tmp_path / "run", *settings(prx), override)
    assert not (tmp_path / "run" / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "xmd"}, "format 'xmd', version 2; mds 2 is read"),
        ({"compression": "br:11"}, "compression 'br:11'; zstd, gz, bz2 are read"),
        ({"raw_data": {"basename": "../shard.mds"}}, r"the shard '../shard.mds' is outside of the folder"),
        ({"column_sizes": []}, "0 sizes of 5 columns"),
    ],
)
def test_an_index_that_is_not_understood_is_refused(prx: Path, change: dict[str, Any], message: str) -> None:
    index = json.loads((prx / "index.json").read_text())["shards"]
    write_index(prx, [{**index[0], **change}])
    with pytest.raises(ConfigError, match=message):
        load_config(PrecomputeConfig, None, settings(prx)).source.build().check()


def test_a_shard_that_does_not_exist_is_refused(prx: Path) -> None:
    (prx / "shard.00001.mds").unlink()
    with pytest.raises(ConfigError, match=r"shard.00001.mds is in the index and does not exist"):
        load_config(PrecomputeConfig, None, settings(prx)).source.build().check()


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no index.json, nor has a folder in it"):
        load_config(PrecomputeConfig, None, settings(tmp_path)).source.build().check()


def test_a_pickled_column_is_never_read(prx: Path, tmp_path: Path) -> None:
    index = json.loads((prx / "index.json").read_text())["shards"]
    for entry in index:
        entry["column_encodings"] = ["pkl" if each == "str" else each for each in entry["column_encodings"]]
    write_index(prx, index)
    summary = precompute(tmp_path / "run", *settings(prx), "max_drop_fraction=1")
    assert summary["tally"]["groups"]["samples"]["drops"] == {"unsupported_type": len(LENGTHS)}


def test_a_configured_width_that_no_sample_has_is_refused(prx: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PipelineError, match=rf"shard.00000.mds sample 0: {LATENT}: shape \(3, 6\), which is not \(7,\)"
    ):
        precompute(tmp_path / "run", *settings(prx), "encoders.0.dim=7")


def test_what_the_writer_of_mosaicml_streaming_writes_is_read(tmp_path: Path) -> None:
    skip_without("mds")
    columns = {
        "image": "png",
        "caption": "str",
        "static": f"ndarray:float32:4,{DIM}",
        LATENT: "ndarray",
        MASK: "ndarray",
    }
    columns |= {"half": "ndarray:float16", "label": "json"}

    with import_streaming("format.mds.writer").MDSWriter(
        columns=columns, out=str(tmp_path / "mds"), compression="zstd:3", hashes=["sha1"], size_limit=1500
    ) as out:
        for seed, length in enumerate(LENGTHS):
            sample = prx_sample(seed)
            sample |= {"image": Image.new("RGB", (20, 20)), "static": states(seed, 4, np.float32), "label": {"x": 1}}
            out.write({name: sample.get(name, states(seed)[:length]) for name in columns})
    assert len(list((tmp_path / "mds").glob("*.zstd"))) > 1
    for array, expected in {
        f"{{column: {LATENT}, mask_column: {MASK}}}": lambda seed, length: states(seed)[:length],
        "{column: static}": lambda seed, length: states(seed, 4, np.float32),
        "{column: half}": lambda seed, length: states(seed)[:length],
    }.items():
        run = tmp_path / array.split()[1].strip(",}")
        precompute(run, *settings(tmp_path / "mds", array))
        store = Store.open(run / "store")
        assert [sample.captions for sample in store] == [[f"caption {seed}"] for seed in range(len(LENGTHS))]
        for seed, sample in enumerate(store):
            np.testing.assert_array_equal(sample.text["t5"], [expected(seed, LENGTHS[seed])])


@pytest.mark.slow
def test_an_export_becomes_the_store_that_it_was_made_of(tmp_path: Path) -> None:
    skip_without("mds")
    run = make_run(tmp_path, "store.dtype=float32")
    assert export(run, "mds", tmp_path / "out").code == 0
    array = "{column: latent_caption_t5, mask_column: attention_mask_caption_t5}"
    dim = Store.open(run / "store").text_group("t5").dim
    config = settings(tmp_path / "out" / "data", array)
    precompute(tmp_path / "again", *config, f"encoders.0.dim={dim}", "images.sizes_px=[16,48]")
    made = {sample.captions[0]: sample for sample in Store.open(run / "store")}
    found = {sample.captions[0]: sample for sample in Store.open(tmp_path / "again" / "store")}
    assert found.keys() == made.keys()
    for caption, sample in found.items():
        np.testing.assert_array_equal(sample.images[48], made[caption].images[48])
        np.testing.assert_array_equal(sample.text["t5"][0], made[caption].text["t5"][0])
