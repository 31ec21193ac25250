"""Embeddings that come with the data end up in the store as they are, row by row, or are refused."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imagen_core.store import Store, StoreError, verify_store
from pipeline.config import load_config
from pipeline.errors import ConfigError, PipelineError, StaleOutputError
from stages.precompute.given_embeddings import PrecomputedEmbeddingsStage
from tests.commands import call
from tests.images import plain_png
from tests.runs import precompute, precompute_interrupted, store_bytes
from workflows.precompute_config import PrecomputeConfig

DIM = 8
ANY_DROPS = "max_drop_fraction=1"
FLOAT32 = "store.dtype=float32"
NO_IMAGES = ("images.sizes_px=[]", FLOAT32)
MODEL = "openai/clip-vit-large-patch14"


def vectors(seed: int, rows: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def given(array: str, name: str = "clip", dim: int = DIM, **more: object) -> str:
    settings = {"name": name, "kind": "given", "array": array, "model": MODEL, "dim": dim, **more}
    return "[{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}]"


# ---- a folder of embeddings alone, as clip-retrieval writes it ----

FILES, ROWS = 2, 5


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    folder = tmp_path / "laion"
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for file in range(FILES):
        np.save(folder / "img_emb" / f"img_emb_{file:04d}.npy", vectors(file, ROWS).astype(np.float16))
        np.save(folder / "text_emb" / f"text_emb_{file:04d}.npy", vectors(10 + file, ROWS))
        write_metadata(folder, file, [f"caption {file} {row}" for row in range(ROWS)])
    return folder


def write_metadata(folder: Path, file: int, captions: Sequence[str | None]) -> None:
    table = pa.table({"caption": captions, "url": [f"http://x/{file}/{row}.jpg" for row in range(len(captions))]})
    pq.write_table(table, folder / "metadata" / f"metadata_{file:04d}.parquet")


def laion_source(folder: Path) -> tuple[str, ...]:
    arrays = f"{{img: {{folder: {folder}/img_emb}}, text: {{folder: {folder}/text_emb}}}}"
    return (
        *("source.kind=parquet", f"source.path={folder}/metadata", "source.image_column=null"),
        *("source.url_column=url", f"source.arrays={arrays}", "shard_size=3", *NO_IMAGES),
        *(f"encoders={given('text')}", f"image_encoders={given('img')}"),
    )


def assert_is_laion(store: Store) -> None:
    assert len(store) == FILES * ROWS
    for index, sample in enumerate(store):
        file, row = divmod(index, ROWS)
        assert (sample.key, sample.url) == (f"metadata_{file:04d}/{row:07d}", f"http://x/{file}/{row}.jpg")
        assert sample.captions == [f"caption {file} {row}"]
        assert (sample.sha256, sample.width, sample.height, sample.images) == ("", 0, 0, {})
        np.testing.assert_array_equal(
            sample.image_embeds["clip"], vectors(file, ROWS)[row].astype(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(sample.text["clip"], [vectors(10 + file, ROWS)[row : row + 1]])


@pytest.mark.parametrize("store_format", ["parquet", "hdf5"])
def test_a_folder_of_embeddings_becomes_a_store_without_images(laion: Path, tmp_path: Path, store_format: str) -> None:
    precompute(tmp_path / "run", *laion_source(laion), f"store.format={store_format}")
    store = Store.open(tmp_path / "run" / "store")
    assert_is_laion(store)
    assert store.image_sizes == []
    batch = next(iter(store.loader(batch_size=4, text="clip", image_embed="clip", shuffle=False)))
    np.testing.assert_array_equal(batch["image_embed"][1].float(), store[1].image_embeds["clip"])
    assert batch["text"].shape == (4, 1, DIM)
    assert verify_store(tmp_path / "run" / "store").ok
    for command in ("verify", "inspect", "report"):
        assert call(command, str(tmp_path / "run")).code == 0, command


def test_the_fingerprint_says_that_the_embeddings_were_given_and_by_which_model(laion: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *laion_source(laion))
    group = Store.open(tmp_path / "run" / "store").text_group("clip")
    assert group.fingerprint == {
        "kind": "given",
        "model": MODEL,
        "revision": None,
        "array": {"name": "text", "folder": True},
        "null_sha256": None,
    }
    with pytest.raises(StaleOutputError, match=r"fingerprint.model: openai/clip-vit-large-patch14 -> another"):
        precompute(tmp_path / "run", *laion_source(laion), "encoders.0.model=another")


def test_a_killed_run_goes_on_to_the_same_bytes(laion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precompute(tmp_path / "whole", *laion_source(laion))
    precompute_interrupted(
        PrecomputedEmbeddingsStage,
        (True, True, False, True, True, True, False),
        tmp_path / "run",
        *laion_source(laion),
        patch=monkeypatch,
    )
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")


def test_new_files_are_added_and_changed_arrays_are_refused(laion: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *laion_source(laion))
    before = store_bytes(tmp_path / "run")
    for name, seed in (("img_emb", 2), ("text_emb", 12)):
        np.save(laion / name / f"{name}_0002.npy", vectors(seed, 2))
    write_metadata(laion, 2, ["new 0", "new 1"])
    assert precompute(tmp_path / "run", *laion_source(laion))["num_samples"] == FILES * ROWS + 2
    after = store_bytes(tmp_path / "run")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    np.save(laion / "text_emb" / "text_emb_0001.npy", vectors(99, ROWS))  # as many bytes, other numbers
    with pytest.raises(StaleOutputError, match="made from other input rows"):
        precompute(tmp_path / "run", *laion_source(laion))


def test_plan_reads_what_the_run_would_write_and_writes_nothing(laion: Path, tmp_path: Path) -> None:
    arguments = ("precompute", "--out", str(tmp_path / "run"), "--json", *laion_source(laion))
    planned = call("plan", *arguments)
    assert planned.code == 0, planned.err
    assert '"image-embed-clip"' in planned.out
    assert not (tmp_path / "run").exists()
    assert call("plan", *arguments, "--probe", "--executor", "inline").code == 0


def test_rows_that_are_no_numbers_or_empty_are_counted_drops(laion: Path, tmp_path: Path) -> None:
    text = vectors(10, ROWS)
    text[1, 3], text[2, 0], text[4] = np.nan, np.inf, 0
    np.save(laion / "text_emb" / "text_emb_0000.npy", text)
    write_metadata(laion, 0, ["a", "b", "c", None, "e"])
    summary = precompute(tmp_path / "run", *laion_source(laion))
    assert summary["tally"]["groups"]["text-clip"]["drops"] == {"missing_embedding": 1, "non_finite_embedding": 2}
    assert summary["tally"]["groups"]["samples"]["drops"] == {"empty_caption": 1}
    store = Store.open(tmp_path / "run" / "store")
    assert [sample.captions[0] for sample in store][:2] == ["a", "caption 1 0"]
    np.testing.assert_array_equal(store[0].text["clip"][0][0], text[0])
    assert verify_store(tmp_path / "run" / "store").ok


def test_equal_captions_must_have_equal_embeddings(laion: Path, tmp_path: Path) -> None:
    text = vectors(10, ROWS)
    text[1] = text[0] * 1.001  # another batch
    write_metadata(laion, 0, ["same", "same", "same", "d", "e"])
    np.save(laion / "text_emb" / "text_emb_0000.npy", text)
    summary = precompute(tmp_path / "run", *laion_source(laion))
    assert summary["tally"]["groups"]["text-clip"]["drops"] == {"other_embedding": 1}
    store = Store.open(tmp_path / "run" / "store")
    assert [s.key[-1] for s in store][:3] == ["0", "1", "3"]
    np.testing.assert_array_equal(store[1].text["clip"][0][0], text[0])


def test_a_store_of_int8_keeps_given_captions_close_and_drops_those_it_cannot(laion: Path, tmp_path: Path) -> None:
    text = vectors(10, ROWS)
    text[1] = [200.0, *[0.7] * (DIM - 1)]  # one channel costs the others all their bits
    np.save(laion / "text_emb" / "text_emb_0000.npy", text)
    summary = precompute(tmp_path / "run", *laion_source(laion), "store.dtype=int8", "store.min_cosine=0.99999")
    counted = summary["tally"]["groups"]["text-clip"]
    assert counted["drops"]["quantisation_error"] >= 1
    assert counted["counters"]["int8_cosine_min"] >= 0.99999
    precompute(tmp_path / "whole", *laion_source(laion), "store.dtype=int8")
    one = Store.open(tmp_path / "whole" / "store")[0]
    np.testing.assert_allclose(one.text["clip"][0][0], text[0], atol=np.abs(text[0]).max() / 253)
    np.testing.assert_array_equal(one.image_embeds["clip"], vectors(0, ROWS)[0].astype(np.float16))


def replace_array(folder: Path, array: np.ndarray, *, allow_pickle: bool = False) -> None:
    np.save(folder / "img_emb" / "img_emb_0001.npy", array, allow_pickle=allow_pickle)


MISALIGNED = {
    "fewer rows": (
        lambda f: replace_array(f, vectors(1, ROWS - 1)),
        r"img_emb_0001.npy has 4 rows, but .*has 5 samples",
    ),
    "more rows": (lambda f: replace_array(f, vectors(1, ROWS + 1)), "has 6 rows, but .*metadata_0001.parquet has 5"),
    "missing file": (lambda f: (f / "img_emb" / "img_emb_0001.npy").unlink(), "has no .npy with the number 1 in"),
    "cut file": (
        lambda f: (f / "img_emb" / "img_emb_0001.npy").write_bytes(npy(vectors(1, ROWS))[:-1]),
        "img_emb_0001.npy is not a complete .npy",
    ),
    "no .npy": (lambda f: (f / "img_emb" / "img_emb_0001.npy").write_bytes(b"x" * 99), "is not a complete .npy"),
    "objects": (
        lambda f: replace_array(f, np.array([[None] * DIM] * ROWS, object), allow_pickle=True),
        r"img_emb_0001.npy: holds object \(5, 8\)",
    ),
    "text": (lambda f: replace_array(f, np.full((ROWS, DIM), "x")), "holds <U1"),
    "complex": (lambda f: replace_array(f, vectors(1, ROWS).astype(np.complex64)), "holds complex64"),
    "one dimension": (lambda f: replace_array(f, vectors(1, ROWS)[:, 0]), r"not a complete .npy of \(rows, dim\)"),
    "Fortran order": (lambda f: replace_array(f, np.asfortranarray(vectors(1, ROWS))), "is in Fortran order"),
    "no number": (lambda f: np.save(f / "img_emb" / "all.npy", vectors(1, ROWS)), "all.npy has no number at its end"),
    "number twice": (lambda f: np.save(f / "img_emb" / "b_1.npy", vectors(1, ROWS)), "has the number of"),
}


@pytest.mark.parametrize("case", MISALIGNED)
def test_arrays_that_do_not_fit_are_refused_by_name_before_anything_is_made(laion: Path, case: str) -> None:
    damage, message = MISALIGNED[case]
    damage(laion)
    config = load_config(PrecomputeConfig, None, laion_source(laion))
    with pytest.raises(ConfigError, match=message):
        config.source.build().check()


def test_another_width_is_refused(laion: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"img_emb_0000.npy row 0: shape \(8,\), which is not \(9,\)"):
        precompute(tmp_path / "run", *laion_source(laion), "image_encoders.0.dim=9")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoders.0.array=txt", "array 'txt' is not in source.arrays, which has: img, text"),
        ("images.sizes_px=[16]", "so there are no images, but images.sizes_px is"),
        ("image_encoders.0.null=x.npy", "only captions have an empty one"),
        ("source={kind: synthetic}", "only webdataset, parquet, folder and mds bring arrays"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    laion: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        precompute(tmp_path / "run", *laion_source(laion), override)


def test_the_encoding_of_the_empty_caption_can_be_given_too(laion: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "without", *laion_source(laion))
    with pytest.raises(StoreError, match="no null embedding"):
        Store.open(tmp_path / "without" / "store").null("clip")
    np.save(tmp_path / "null.npy", vectors(5, 1)[0])
    encoder = f"name: clip, kind: given, array: text, model: clip, dim: 8, null: {tmp_path / 'null.npy'}"
    precompute(tmp_path / "run", *laion_source(laion), f"encoders=[{{{encoder}}}]")
    np.testing.assert_array_equal(Store.open(tmp_path / "run" / "store").null("clip"), vectors(5, 1))
    assert verify_store(tmp_path / "run" / "store").ok


def test_what_was_given_is_never_encoded_again(laion: Path, tmp_path: Path) -> None:
    from stages.encoders.prompts import load_matching_encoder

    precompute(tmp_path / "run", *laion_source(laion))
    result = call("verify", str(tmp_path / "run"), "--reencode", "1")
    assert result.code == 0
    assert "nothing was encoded again, because the store has no encoder that could do it" in result.out
    group = Store.open(tmp_path / "run" / "store").text_group("clip")
    made_by = {"name": "clip", "dim": DIM, "dtype": "float32", "fingerprint": group.fingerprint}
    with pytest.raises(ConfigError, match="its embeddings came with the data"):
        load_matching_encoder(made_by, None, use_gpu=False, option="x")


# ---- tars ----


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def sample(caption: str, **members: bytes) -> dict[str, bytes]:
    return {"png": plain_png(), "txt": caption.encode(), **members}


def tar_source(folder: Path, arrays: str, *more: str) -> tuple[str, ...]:
    source = ("source.kind=webdataset", f"source.path={folder}", f"source.arrays={arrays}", "shard_size=3")
    return (*source, "images.sizes_px=[16]", FLOAT32, *(more or ("encoders=[]", f"image_encoders={given('a')}")))


def test_members_beside_the_image_are_its_embeddings(tmp_path: Path) -> None:
    image, text = vectors(0, 7), vectors(1, 7)
    for tar in range(2):
        rows = range(tar * 4, min(7, tar * 4 + 4))
        samples = {
            f"{row:04d}": sample(f"caption {row}", npy=npy(image[row]), **{"text.npy": npy(text[row : row + 1])})
            for row in rows
        }
        write_tar(tmp_path / "tars" / f"{tar:05d}.tar", samples)
    arrays = "{a: {member: npy}, b: {member: text.npy}}"
    more = (f"encoders={given('b')}", f"image_encoders={given('a')}")
    precompute(tmp_path / "run", *tar_source(tmp_path / "tars", arrays, *more))
    store = Store.open(tmp_path / "run" / "store")
    assert len(store) == 7
    for row, one in enumerate(store):
        np.testing.assert_array_equal(one.image_embeds["clip"], image[row])
        np.testing.assert_array_equal(one.text["clip"], [text[row : row + 1]])
        assert one.images[16].shape == (16, 16, 3)
    assert verify_store(tmp_path / "run" / "store").ok


def test_arrays_of_members_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "0.tar", {f"{i}": sample(f"c{i}", npy=npy(vectors(i, 1)[0])) for i in range(4)})
    precompute(tmp_path / "run", *tar_source(tmp_path / "tars", "{}", "encoders=[]"))
    before = store_bytes(tmp_path / "run")
    precompute(tmp_path / "run", *tar_source(tmp_path / "tars", "{a: {member: npy}}"))
    after = store_bytes(tmp_path / "run")
    assert {n: d for n, d in after.items() if n in before and n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }
    np.testing.assert_array_equal(Store.open(tmp_path / "run" / "store")[3].image_embeds["clip"], vectors(3, 1)[0])


def test_members_that_are_missing_or_damaged_are_counted_drops(tmp_path: Path) -> None:
    good = npy(vectors(0, 1)[0])
    samples = {
        "0": sample("a", npy=good),
        "1": sample("b"),
        "2": sample("c", npy=good[:-3]),
        "3": sample("d", npy=b"no array"),
        "4": sample("e", npy=npy(np.full(DIM, np.nan, np.float32))),
    }
    write_tar(tmp_path / "tars" / "0.tar", samples)
    summary = precompute(tmp_path / "run", *tar_source(tmp_path / "tars", "{a: {member: npy}}"), ANY_DROPS)
    drops = summary["tally"]["groups"]["image-embed-clip"]["drops"]
    assert drops == {"missing_embedding": 1, "unreadable_embedding": 2, "non_finite_embedding": 1}
    assert [one.key for one in Store.open(tmp_path / "run" / "store")] == ["0/0"]


def test_a_member_that_is_a_pickled_array_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([None], object), allow_pickle=True)
    write_tar(tmp_path / "tars" / "0.tar", {"0": sample("a", npy=buffer.getvalue())})
    with pytest.raises(PipelineError, match=r"0.tar: 0.npy: holds object \(1,\), and pickled objects"):
        precompute(tmp_path / "run", *tar_source(tmp_path / "tars", "{a: {member: npy}}"))


# ---- tars, and .npy files of a row for each possible key, as DALLE2-pytorch reads them ----


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Path, Path]:
    """Tars 3 and 4 of keys NNIIII; index 2 of tar 3 was never downloaded."""
    for tar, indices in ((3, (0, 1, 3)), (4, (0, 1))):
        samples = {f"{tar:02d}{index:04d}": sample(f"{tar} {index}") for index in indices}
        write_tar(tmp_path / "tars" / f"{tar:05d}.tar", samples)
        rows = np.zeros((max(indices) + 1, DIM), np.float32)
        rows[list(indices)] = vectors(tar, len(indices))
        (tmp_path / "embeddings").mkdir(exist_ok=True)
        np.save(tmp_path / "embeddings" / f"img_emb_{tar}.npy", rows)
    return tmp_path / "tars", tmp_path / "embeddings"


def index_arrays(folder: Path, width: object = 4) -> str:
    return f"{{a: {{folder: {folder}, index_width: {width}}}}}"


def test_keys_of_shard_number_and_index_find_their_rows(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    tars, embeddings = indexed
    precompute(tmp_path / "run", *tar_source(tars, index_arrays(embeddings)))
    store = Store.open(tmp_path / "run" / "store")
    assert [one.key for one in store] == [f"00003/03000{i}" for i in (0, 1, 3)] + [f"00004/04000{i}" for i in (0, 1)]
    found = [one.image_embeds["clip"] for one in store]
    np.testing.assert_array_equal(found, [*vectors(3, 3), *vectors(4, 2)])


def test_a_row_of_zeros_is_a_missing_embedding(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    tars, embeddings = indexed
    np.save(embeddings / "img_emb_4.npy", np.array([vectors(4, 2)[0], np.zeros(DIM)], np.float32))
    summary = precompute(tmp_path / "run", *tar_source(tars, index_arrays(embeddings)))
    assert summary["tally"]["groups"]["image-embed-clip"]["drops"] == {"missing_embedding": 1}


def test_without_an_index_width_the_rows_are_the_samples_in_order(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    tars, embeddings = indexed
    with pytest.raises(ConfigError, match=r"img_emb_3.npy has 4 rows, but 00003.tar has 3 samples"):
        precompute(tmp_path / "refused", *tar_source(tars, index_arrays(embeddings, "null")))
    np.save(embeddings / "img_emb_3.npy", vectors(3, 3))
    precompute(tmp_path / "run", *tar_source(tars, index_arrays(embeddings, "null")))
    found = [one.image_embeds["clip"] for one in Store.open(tmp_path / "run" / "store")]
    np.testing.assert_array_equal(found, [*vectors(3, 3), *vectors(4, 2)])


@pytest.mark.parametrize(
    ("width", "key", "message"),
    [
        (4, "050000", r"00004.tar has the key '050000', which is not the number of the tar and then 4"),
        (4, "image", "has the key 'image', which is not"),
        (5, "040001", "has the key '030000', which is not the number of the tar and then 5"),
        (4, "040002", r"img_emb_4.npy has 2 rows, but 00004.tar has the key '040002', which is row 2"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(indexed: tuple[Path, Path], width: int, key: str, message: str) -> None:
    tars, embeddings = indexed
    write_tar(tars / "00004.tar", {"040000": sample("a"), key: sample("b")})
    config = load_config(PrecomputeConfig, None, tar_source(tars, index_arrays(embeddings, width)))
    with pytest.raises(ConfigError, match=message):
        list(config.source.build().shards(100))


def test_a_tar_without_a_file_of_arrays_is_refused_before_anything_is_made(
    indexed: tuple[Path, Path], tmp_path: Path
) -> None:
    tars, embeddings = indexed
    (embeddings / "img_emb_4.npy").unlink()
    with pytest.raises(ConfigError, match=r"00004.tar has no .npy with the number 4 in .*glob in source.path"):
        precompute(tmp_path / "run", *tar_source(tars, index_arrays(embeddings)))
    assert not (tmp_path / "run" / "store").exists()


def test_tars_of_the_same_number_are_refused(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    tars, embeddings = indexed
    write_tar(tars / "more" / "00004.tar", {"040000": sample("a"), "040001": sample("b")})
    with pytest.raises(ConfigError, match=r"00004.tar and more/00004.tar have the same number, so .*img_emb_4.npy"):
        precompute(tmp_path / "run", *tar_source(tars, index_arrays(embeddings)))


# ---- NeMo's tars with pickled encodings ----

KEY = "embeddings_t5_xxl"
NEMO = (f"{{t5: {{member: pickle, pickle_key: {KEY}}}}}", f"encoders={given('t5', name='t5')}")


def padded(tokens: np.ndarray, length: int = 12) -> np.ndarray:
    return np.concatenate([tokens, np.zeros((length - len(tokens), DIM), tokens.dtype)])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_encodings_come_without_their_padding(tmp_path: Path, protocol: int) -> None:
    tokens = [vectors(row, 2 + row) for row in range(5)]
    mask = np.arange(12) < len(tokens[1])
    entries: list[dict[str, Any]] = [
        {"encodings": padded(tokens[0])},
        {"encodings": vectors(1, 12), "mask": mask.astype(np.int64)},
        {"encodings": tokens[2].astype(np.float16)},
        {"encodings": torch.from_numpy(padded(tokens[3]))},
        {"encodings": torch.from_numpy(tokens[4]), "mask": torch.ones(len(tokens[4]), dtype=torch.bool)},
    ]
    expected = [tokens[0], vectors(1, 12)[:3], tokens[2].astype(np.float16), tokens[3], tokens[4]]
    samples = {
        f"{row}": sample(f"caption {row}", pickle=pickle.dumps({KEY: entry, "other": [1, "x", None]}, protocol))
        for row, entry in enumerate(entries)
    }
    write_tar(tmp_path / "tars" / "0.tar", samples)
    precompute(tmp_path / "run", *tar_source(tmp_path / "tars", *NEMO))
    store = Store.open(tmp_path / "run" / "store")
    assert len(store) == 5
    for one, array in zip(store, expected, strict=True):
        np.testing.assert_array_equal(one.text["t5"][0], array)
    fingerprint = store.text_group("t5").fingerprint
    assert fingerprint["array"] == {"name": "t5", "member": "pickle", "pickle_key": KEY, "folder": False}


def test_a_pickle_without_the_key_or_whole_bytes_is_a_counted_drop(tmp_path: Path) -> None:
    good = pickle.dumps({KEY: {"encodings": vectors(0, 2)}})
    samples = {
        "0": sample("a", pickle=good),
        "1": sample("b", pickle=pickle.dumps({"another": {"encodings": vectors(0, 2)}})),
        "2": sample("c", pickle=good[:-20]),
        "3": sample("d"),
        "4": sample("e", pickle=pickle.dumps({KEY: {"encodings": np.zeros((3, DIM))}})),
    }
    write_tar(tmp_path / "tars" / "0.tar", samples)
    summary = precompute(tmp_path / "run", *tar_source(tmp_path / "tars", *NEMO), ANY_DROPS)
    drops = summary["tally"]["groups"]["text-t5"]["drops"]
    assert drops == {"missing_embedding": 3, "unreadable_embedding": 1}


def test_a_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    entry = {KEY: {"encodings": vectors(0, 4), "mask": np.ones(5)}}
    write_tar(tmp_path / "tars" / "0.tar", {"0": sample("a", pickle=pickle.dumps(entry))})
    with pytest.raises(PipelineError, match=r"0.tar: 0.pickle: 4 encodings with a mask of 5"):
        precompute(tmp_path / "run", *tar_source(tmp_path / "tars", *NEMO))


@pytest.mark.parametrize("suffix", ["pickle", "npz"])
def test_arrays_without_encodings_as_nemo_precaches_them(tmp_path: Path, suffix: str) -> None:
    arrays = [vectors(row, 2 + row).astype(np.float16) for row in range(3)]

    def written(array: np.ndarray) -> bytes:
        if suffix == "pickle":
            return pickle.dumps({"t5xxl": array})
        file = io.BytesIO()
        np.savez_compressed(file, t5xxl=array)
        return file.getvalue()

    samples = {f"{row}": sample(f"c{row}", **{suffix: written(array)}) for row, array in enumerate(arrays)}
    write_tar(tmp_path / "tars" / "0.tar", {**samples, "3": sample("c3", **{suffix: written(arrays[0])[:-30]})})
    source = f"{{a: {{member: {suffix}, pickle_key: t5xxl}}}}"
    summary = precompute(
        tmp_path / "run", *tar_source(tmp_path / "tars", source, f"encoders={given('a', 't5')}"), ANY_DROPS
    )
    assert summary["tally"]["groups"]["text-t5"]["drops"] == {"unreadable_embedding": 1}
    for one, array in zip(Store.open(tmp_path / "run" / "store"), arrays, strict=True):
        np.testing.assert_array_equal(one.text["t5"][0], array.astype(np.float32))


@pytest.mark.parametrize("arrays", ["{a: {}}", "{a: {member: npy, folder: x}}", "{a: {member: pickle}}"])
def test_an_array_is_a_member_or_a_folder(tmp_path: Path, arrays: str) -> None:
    with pytest.raises(ConfigError, match=r"source.arrays.a: (give either member or folder|pickle_key goes with)"):
        precompute(tmp_path / "run", *tar_source(tmp_path, arrays))


def test_images_are_not_decoded_where_none_are_stored(tmp_path: Path) -> None:
    broken = {"png": b"no image", "txt": b"a", "npy": npy(vectors(0, 1)[0])}
    write_tar(tmp_path / "tars" / "0.tar", {"0": broken})
    precompute(tmp_path / "run", *tar_source(tmp_path / "tars", "{a: {member: npy}}"), "images.sizes_px=[]")
    (one,) = Store.open(tmp_path / "run" / "store")
    np.testing.assert_array_equal(one.image_embeds["clip"], vectors(0, 1)[0])
