"""Runs from S3 to S3 (moto's server) against the same run on local folders."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import Store
from pipeline.storage.open import open_storage
from tests.commands import Result, call
from tests.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore, object_store

SETTINGS = ("source.kind=webdataset", "shard_size=4", "images.sizes_px=[16,32]", "store.format=hdf5")
PER_TAR, TARS = 6, 2


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@dataclass(frozen=True)
class Data:
    folder: Path
    url: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, s3: ObjectStore) -> Data:
    """Two tars of images with captions, on disk and on S3."""
    folder, remote = tmp_path_factory.mktemp("data"), open_storage(f"{s3.url}/data")
    for tar in range(TARS):
        path = folder / f"{tar:05d}.tar"
        with tarfile.open(path, "w") as archive:
            for index in range(PER_TAR):
                pixels = np.random.default_rng(100 * tar + index).integers(0, 256, (48, 40, 3), np.uint8)
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                broken = (tar, index) == (1, 2)
                members = {"png": b"no image" if broken else png.getvalue(), "txt": b"image %d" % index}
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{tar}{index:03d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, BytesIO(content))
        remote.write(path.name, path.read_bytes())
    return Data(folder, f"{s3.url}/data")


def run(out: str, source: str, executor: str = "inline", *more: str) -> Result:
    result = call(
        "run", "precompute", "--out", out, "--executor", executor, "--quiet", f"source.path={source}", *SETTINGS, *more
    )
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def local_store(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "run"
    run(str(out), str(data.folder))
    store = out / "store"
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def remote_run(data: Data, s3: ObjectStore) -> str:
    run(f"{s3.url}/run", data.url)
    return f"{s3.url}/run"


def test_a_run_from_s3_to_s3_gives_the_bytes_of_a_local_one(
    remote_run: str, s3: ObjectStore, local_store: dict[str, bytes]
) -> None:
    assert s3.keys("run/store/") == local_store
    assert not any(key.startswith("staging/") for key in s3.keys("run/"))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_run_gives_the_same_bytes_where_a_tenth_of_the_requests_to_s3_fail(
    executor: str, data: Data, s3: ObjectStore, local_store: dict[str, bytes]
) -> None:
    s3.faults.errors, s3.faults.slow, s3.faults.slow_s = 0.05, 0.05, 0.2
    before = s3.faults.count["error"]
    try:
        run(f"{s3.url}/faulty-{executor}", data.url, executor, "execution.num_cpus=2")
    finally:
        s3.faults.errors = s3.faults.slow = 0.0
    assert s3.faults.count["error"] > before
    assert s3.keys(f"faulty-{executor}/store/") == local_store


def test_no_credential_is_in_any_file_or_output(remote_run: str, s3: ObjectStore) -> None:
    everything = b"".join(s3.keys("run/").values())
    printed = "".join(result.out + result.err for result in (call("status", remote_run), call("inspect", remote_run)))
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret.encode() not in everything
        assert secret not in printed


@pytest.mark.slow
def test_the_same_command_again_finds_all_finished_and_changes_nothing(
    remote_run: str, data: Data, s3: ObjectStore
) -> None:
    before = s3.keys("run/store/")
    assert "3 already finished" in run(remote_run, data.url).out
    assert s3.keys("run/store/") == before


@pytest.mark.slow
def test_files_missing_or_truncated_on_s3_are_computed_again(
    data: Data, s3: ObjectStore, local_store: dict[str, bytes]
) -> None:
    url = f"{s3.url}/mended"
    run(url, data.url)
    storage = open_storage(url)
    storage.delete("store/images-32/00001.h5")
    storage.write("store/text-t5/00002.h5", b"cut")
    storage.delete("store/text-t5/null.safetensors")
    run(url, data.url)
    assert s3.keys("mended/store/") == local_store


@pytest.mark.slow
def test_a_changed_configuration_is_refused_on_s3_and_rebuilt_with_restart(data: Data, s3: ObjectStore) -> None:
    url = f"{s3.url}/changed"
    run(url, data.url)
    command = (
        "run",
        "precompute",
        "--out",
        url,
        "--executor",
        "inline",
        "--quiet",
        f"source.path={data.url}",
        *SETTINGS,
    )
    refused = call(*command, "images.filter=lanczos")
    assert refused.code == 2
    assert "images-16.config.filter: bicubic -> lanczos" in refused.err
    assert call(*command, "images.filter=lanczos", "--restart").code == 0
    assert Store.open(f"{url}/store").manifest.images[16].config["filter"] == "lanczos"


@pytest.mark.slow
def test_the_reading_commands_take_the_url(remote_run: str) -> None:
    assert "good: " in call("verify", remote_run).out
    assert "11 samples in 3 shards" in call("inspect", f"{remote_run}/store").out
    assert "precompute: finished" in call("status", remote_run).out
    assert json.loads(call("report", remote_run, "--json").out)["num_samples"] == 11
    assert open_storage(remote_run).size("report/index.html")
    assert call("plan", "precompute", "--out", remote_run, *SETTINGS, "source.path=x").code == 2


def test_a_second_run_on_the_same_url_is_refused(remote_run: str, data: Data) -> None:
    from pipeline.storage.run_folder import RunFolder

    with RunFolder(remote_run).lock():
        command = (
            "run",
            "precompute",
            "--out",
            remote_run,
            "--executor",
            "inline",
            f"source.path={data.url}",
            *SETTINGS,
        )
        refused = call(*command)
    assert refused.code == 4
    assert "another run is working" in refused.err


@pytest.mark.slow
def test_a_worker_of_a_run_that_lost_the_folder_commits_nothing(data: Data, s3: ObjectStore) -> None:
    from pipeline.storage.lock import LEASE
    from stages.precompute.fetch import FetchStage

    url = f"{s3.url}/lost"
    process: Any = FetchStage.process

    def with_a_thief(stage: FetchStage, task: Any) -> None:
        process(stage, task)
        task.run.storage.write(LEASE, json.dumps({**task.run.storage.read_json(LEASE), "owner": "thief"}).encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FetchStage, "process", with_a_thief)
        lost = call(
            "run", "precompute", "--out", url, "--executor", "inline", "--quiet", f"source.path={data.url}", *SETTINGS
        )
    assert lost.code == 4
    assert "this run lost the folder to" in lost.err
    assert not s3.keys("lost/staging/")
    assert not s3.keys("lost/state/samples/")
