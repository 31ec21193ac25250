"""Tars named by NeMo's wdinfo.pkl, by a list, or by braces."""

import pickle
from pathlib import Path

import pytest

from imagen_core.store import Store
from pipeline.config import load_config
from pipeline.errors import ConfigError
from stages.sources.tars import WebdatasetConfig
from tests.runs import precompute
from tests.stages.precompute.test_given_embeddings import sample, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(3):
        write_tar(tmp_path / "tars" / f"{number:05d}.tar", {f"{number}{i}": sample(f"c{number}{i}") for i in range(2)})
    return tmp_path / "tars"


def captions(out: Path, *source: str) -> list[str]:
    settings = ("images.sizes_px=[16]", "encoders=[]", "shard_size=3", "source.kind=webdataset")
    precompute(out, *settings, *source)
    return [one.captions[0] for one in Store.open(out / "store")]


def test_wdinfo_names_the_tars_in_its_order_and_counts_their_samples(tars: Path, tmp_path: Path) -> None:
    info = {"tar_files": ["00002.tar", "00000.tar"], "total_key_count": 4, "chunk_size": 2}
    (tmp_path / "wdinfo.pkl").write_bytes(pickle.dumps(info))
    settings = (f"source.path={tars}", f"source.file_list={tmp_path}/wdinfo.pkl")
    assert captions(tmp_path / "run", *settings) == ["c20", "c21", "c00", "c01"]
    config = load_config(WebdatasetConfig, None, [setting.removeprefix("source.") for setting in settings])
    assert config.build().estimate_rows() == 4


def test_a_list_of_text_names_the_tars_too(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("00001.tar\n")
    assert captions(tmp_path / "run", f"source.path={tars}", f"source.file_list={tmp_path}/list.txt") == ["c10", "c11"]


def test_braces_name_the_tars(tars: Path, tmp_path: Path) -> None:
    assert captions(tmp_path / "run", f"source.path={tars}/{{00001..00002}}.tar") == ["c10", "c11", "c20", "c21"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"tars": []}), "wdinfo.pkl has no list `tar_files` of names"),
        (pickle.dumps({"tar_files": ["00009.tar"]}), "00009.tar does not exist"),
        (pickle.dumps({"tar_files": [print]}), "wdinfo.pkl: the pickle has builtins.print, which is not plain data"),
        (b"no pickle", "wdinfo.pkl: not a pickle of plain data"),
    ],
)
def test_a_wdinfo_that_cannot_be_followed_is_refused(tars: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "wdinfo.pkl").write_bytes(content)
    config = WebdatasetConfig(path=str(tars), file_list=str(tmp_path / "wdinfo.pkl"))
    with pytest.raises(ConfigError, match=message):
        config.build().check()
