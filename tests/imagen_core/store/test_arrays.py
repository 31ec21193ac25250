"""Groups of arrays that others add to a store: values, files, readers, verification, removal."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_core import store as st
from tests.imagen_core.store.arrays_added import MADE_BY, add_arrays, rewrite, values_of
from tests.imagen_core.store.handmade_store import Made, file_entry, remove, rewrite_manifest

Make = Callable[..., Made]
SCORE = st.ArraySpec("float32")
MASK = st.ArraySpec("bool", (None, None))
LATENT = st.ArraySpec("bfloat16", (4, 2, 2))
ROWS = 12


def group_of(root: Path, name: str) -> st.ArrayGroup:
    return st.Store.open(root).array_group(name)


@pytest.mark.parametrize("dtype", st.ArrayDtype.__args__)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4), (None,), (None, 2, None)])
def test_arrays_of_every_dtype_and_shape_come_back_as_they_were(
    tmp_path: Path, store_format: st.StoreFormat, dtype: st.ArrayDtype, shape: tuple[int | None, ...]
) -> None:
    spec = st.ArraySpec(dtype, shape)
    values, path = values_of(spec, 5), str(tmp_path / "file")
    with st.open_array_writer(path, spec, store_format, MADE_BY) as writer:
        for row, value in enumerate(values):
            writer.append(value, str(row))
    group = st.ArrayGroup("array-x", "x", spec, store_format, MADE_BY)
    for mapped in (True, False):
        arrays = st.open_arrays(path, path, group, mapped=mapped)
        for row, value in enumerate(values):
            np.testing.assert_array_equal(arrays.value(row), value, strict=True)
            assert arrays.shape(row) == value.shape


def test_a_file_without_rows_and_one_of_empty_arrays_are_read(tmp_path: Path, store_format: st.StoreFormat) -> None:
    for spec, values in ((SCORE, []), (MASK, []), (MASK, [np.zeros((0, 3), bool)] * 2)):
        path = str(tmp_path / "file")
        with st.open_array_writer(path, spec, store_format, MADE_BY) as writer:
            for value in values:
                writer.append(value, "key")
        arrays = st.open_arrays(path, path, st.ArrayGroup("array-x", "x", spec, store_format, MADE_BY))
        assert [arrays.value(row).shape for row in range(arrays.num_rows)] == [value.shape for value in values]


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path, store_format: st.StoreFormat) -> None:
    for name in ("a", "b"):
        with st.open_array_writer(tmp_path / name, MASK, store_format, MADE_BY) as writer:
            for value in values_of(MASK):
                writer.append(value, "key")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("rows", [20, 1000])
def test_the_size_of_a_file_is_known_before_it_is_written(
    tmp_path: Path, store_format: st.StoreFormat, rows: int
) -> None:
    spec = st.ArraySpec("float16", (64, 32))
    with st.open_array_writer(tmp_path / "file", spec, store_format, MADE_BY) as writer:
        for _ in range(rows):
            writer.append(np.zeros((64, 32), np.float16), "key")
    expected = st.array_shard_bytes(spec, rows)
    assert expected is not None
    assert abs(expected / (tmp_path / "file").stat().st_size - 1) < 0.01
    assert st.array_shard_bytes(MASK, rows) is None


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (SCORE, np.float64(1), r"float64 \(\) is not float32 \(\)"),
        (SCORE, np.zeros(2, np.float32), r"float32 \(2,\) is not float32 \(\)"),
        (MASK, np.zeros((2, 2), np.uint8), r"uint8 \(2, 2\) is not bool \(any, any\)"),
        (LATENT, np.zeros((4, 2, 3), np.float32), r"is not bfloat16 \(4, 2, 2\)"),
        (SCORE, np.float32("nan"), "a value is NaN or infinite"),
        (LATENT, np.full((4, 2, 2), 3.4e38, np.float32), "a value is not finite as bfloat16"),
    ],
)
def test_an_array_that_is_not_what_was_declared_is_refused_and_leaves_no_file(
    tmp_path: Path, store_format: st.StoreFormat, spec: st.ArraySpec, value: np.ndarray, message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        st.open_array_writer(tmp_path / "file", spec, store_format, MADE_BY) as writer,
    ):
        writer.append(np.asarray(value), "key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("complex64", (), "dtype 'complex64': use one of bool, "),
        ("float32", (0,), "an axis has a length of 1 or more, or None"),
        ("float32", [2], "give a tuple"),
        ("float32", (1 << 20, 1 << 10), "bytes, more than"),
    ],
)
def test_a_spec_that_no_file_can_have_is_refused(dtype: st.ArrayDtype, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.ArraySpec(dtype, shape)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", ".a"])
def test_a_name_that_is_no_part_of_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="use letters, digits"):
        st.array_group(name)


@pytest.fixture
def made(make: Make, store_format: st.StoreFormat) -> Made:
    """A store with a score, a ragged mask and latents; row 1 of shard 0 is excluded."""
    made = make(store_format=store_format, excluded={0: [1]})
    for name, spec in {"score": SCORE, "mask": MASK, "latent": LATENT}.items():
        add_arrays(made.path, name, spec, values_of(spec), store_format)
    return made


def kept(spec: st.ArraySpec) -> list[np.ndarray]:
    return [value for row, value in enumerate(values_of(spec)) if row != 1]


def test_a_sample_has_its_arrays(made: Made) -> None:
    store = st.Store.open(made.path)
    assert store.arrays == ["latent", "mask", "score"]
    for copy in (store, pickle.loads(pickle.dumps(store))):
        for sample, score, mask, latent in zip(copy, kept(SCORE), kept(MASK), kept(LATENT), strict=True):
            np.testing.assert_array_equal(sample.arrays["score"], score, strict=True)
            np.testing.assert_array_equal(sample.arrays["mask"], mask, strict=True)
            np.testing.assert_array_equal(sample.arrays["latent"], latent, strict=True)
    assert "'mask': bool[0, 1]" in repr(store[0])


def test_a_loader_reads_arrays_only_when_asked(made: Made) -> None:
    store = st.Store.open(made.path)
    (batch,) = store.loader(batch_size=20, images=[8], shuffle=False)
    assert "arrays" not in batch
    for shard in range(3):
        assert not store.shard(shard).arrays
    (batch,) = store.loader(batch_size=20, arrays=["latent", "mask", "score"], shuffle=False)
    assert batch["arrays"]["score"].tolist() == [float(value) for value in kept(SCORE)]
    assert batch["arrays"]["latent"].dtype == torch.bfloat16
    np.testing.assert_array_equal(batch["arrays"]["latent"].float(), np.stack(kept(LATENT)))
    masks = kept(MASK)
    assert batch["arrays"]["mask"].shape == (11, 3, 3)
    assert list(batch["array_sizes"]) == ["mask"]
    assert batch["array_sizes"]["mask"].tolist() == [list(mask.shape) for mask in masks]
    for row, mask in zip(batch["arrays"]["mask"].numpy(), masks, strict=True):
        height, width = mask.shape
        np.testing.assert_array_equal(row[:height, :width], mask)
        assert row.sum() == mask.sum()


def test_a_loaders_order_and_resume_do_not_depend_on_arrays(made: Made) -> None:
    store = st.Store.open(made.path)
    plain, loader = (store.loader(batch_size=4, arrays=arrays) for arrays in (None, ["score"]))
    batches = list(zip(plain, loader, strict=True))
    assert all(a["keys"] == b["keys"] for a, b in batches)
    scores = {sample.key: float(sample.arrays["score"]) for sample in store}
    assert all(b["arrays"]["score"].tolist() == [scores[key] for key in b["keys"]] for _, b in batches)
    assert plain.state_dict() == loader.state_dict()


def test_an_empty_batch_has_arrays_of_no_rows(made: Made) -> None:
    loader = st.Store.open(made.path).loader(batch_size=4, arrays=["mask", "latent", "score"])
    batch = loader.skip()
    assert {name: tuple(array.shape) for name, array in batch["arrays"].items()} == {
        "mask": (0, 0, 0),
        "latent": (0, 4, 2, 2),
        "score": (0,),
    }
    assert batch["array_sizes"]["mask"].shape == (0, 2)


def test_an_array_that_the_store_lacks_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"array 'depth' is not in the store; it has \['latent', 'mask', 'score'\]"):
        st.Store.open(made.path).loader(batch_size=2, arrays=["depth"])


def test_a_store_with_arrays_verifies(made: Made) -> None:
    report = st.verify_store(made.path)
    assert report.ok, report
    assert (report.files_checked, report.warnings) == (3 * 7 + 2, [])


def problem(root: Path) -> str:
    report = st.verify_store(root)
    assert len(report.problems) == 1, report
    assert report.problems[0].file.startswith("array-")
    return report.problems[0].message


def swap(rows: list[np.ndarray], keys: list[str]) -> None:
    keys[0], keys[2] = keys[2], keys[0]


def test_verify_finds_arrays_in_each_others_place(made: Made) -> None:
    rewrite(made.path, group_of(made.path, "score"), swap)
    assert problem(made.path) == "2 arrays do not belong to their samples, the first in row 0 ('000-000')"


def test_verify_finds_values_that_are_not_finite(made: Made) -> None:
    for name in ("score", "latent"):
        group = group_of(made.path, name)
        nan = np.full(group.spec.blank().shape, 0x7FC0 if name == "latent" else np.nan, group.spec.disk_dtype)
        rewrite(made.path, group, lambda rows, keys, nan=nan: rows.__setitem__(3, nan))
        assert problem(made.path) == "1 arrays are wrong, the first in row 3, which is not finite"
        rewrite(made.path, group, lambda rows, keys, spec=group.spec: rows.__setitem__(3, spec.blank()))
        assert st.verify_store(made.path).ok


def test_verify_finds_masks_that_are_neither_true_nor_false(made: Made) -> None:
    group = group_of(made.path, "mask")
    rewrite(made.path, group, lambda rows, keys: rows.__setitem__(2, rows[2] + np.uint8(2)))
    assert "the first in row 2, which holds values other than 0 and 1" in problem(made.path)


def test_verify_counts_rows(made: Made) -> None:
    rewrite(made.path, group_of(made.path, "mask"), lambda rows, keys: rows.pop() is None)
    assert problem(made.path) == "4 rows, the manifest says 5"


def test_verify_finds_a_flipped_byte_and_a_missing_file(made: Made, store_format: st.StoreFormat) -> None:
    path = made.path / st.shard_path("array-mask", 1, store_format)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert problem(made.path).startswith("sha256 ")
    path.unlink()
    assert problem(made.path) == "missing"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "float64"}, "not {'dtype': 'float64'"), ({"shape": [1]}, "'shape': '[1]'"), ({"fingerprint": {}}, "")],
)
def test_verify_finds_another_dtype_shape_or_maker_than_the_manifest_says(
    made: Made, change: dict[str, object], message: str
) -> None:
    groups = dict(st.load_manifest(made.path).header["groups"])
    groups["array-score"] = groups["array-score"] | change
    rewrite_manifest(made.path, groups=groups)
    problems = st.verify_store(made.path).problems
    assert [found.file.split("/")[0] for found in problems] == ["array-score"] * 3
    assert (message or "made by another stage: fingerprint ") in problems[0].message


def test_arrays_of_removed_samples_are_gone_for_readers_and_may_be_erased(made: Made) -> None:
    folder = remove(made.path, key=["000-002"])
    store = st.Store.open(made.path)
    assert [sample.key for sample in store][:3] == ["000-000", "000-003", "000-004"]
    group = store.array_group("mask")
    np.testing.assert_array_equal(store[1].arrays["mask"], values_of(MASK)[3])
    samples = st.SamplesFile(folder.path("samples/00000.parquet"), "samples")
    erased = st.ErasedShard.of(0, samples, [2])
    new = made.path / "new"
    assert erased.write(group, folder.path(st.shard_path(group.name, 0, group.format)), new) == 5
    arrays = st.open_arrays(str(new), "new", group)
    for row, value in enumerate(values_of(MASK)[:5]):
        np.testing.assert_array_equal(arrays.value(row), np.zeros((0, 0), bool) if row == 2 else value)


def test_a_group_of_a_kind_of_a_later_version_is_left_alone(make: Make, store_format: st.StoreFormat) -> None:
    made = make(store_format=store_format)
    groups = dict(st.load_manifest(made.path).header["groups"])
    groups["depth"] = {"kind": "depth", "format": store_format, "unit": "m"}
    (made.path / "depth").mkdir()

    def add(shards: list[dict]) -> None:
        for shard in shards:
            path = st.shard_path("depth", shard["index"], store_format)
            (made.path / path).write_bytes(b"of tomorrow")
            shard["files"]["depth"] = file_entry(made.path, path, shard["rows"])

    rewrite_manifest(made.path, add, groups=groups)
    store = st.Store.open(made.path)
    assert len(store) == ROWS
    assert store[0].arrays == {}
    assert store.manifest.groups["depth"] == st.OtherGroup("depth", "depth", store_format)
    report = st.verify_store(made.path)
    assert report.ok
    assert [(warning.file, warning.message.split(";")[0]) for warning in report.warnings] == [
        ("depth", "kind 'depth' is of a later version")
    ]
    remove(made.path, key=["000-002"])
    assert st.load_manifest(made.path).header["groups"] == groups
    (made.path / st.shard_path("depth", 2, store_format)).write_bytes(b"of tomorrow!")
    assert [found.file for found in st.verify_store(made.path).problems] == [st.shard_path("depth", 2, store_format)]
