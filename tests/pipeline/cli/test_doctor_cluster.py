"""`pipeline doctor --cluster` on a cluster of several nodes on this machine."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.doctor_command import local_places
from tests.commands import Result, call
from tests.pipeline.executors.cluster import RayNodes, ray_nodes
from tests.runs import command
from tests.stages.encoders.tiny_models import t5


def test_the_places_of_a_configuration_are_its_paths_and_not_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5").mkdir()
    (tmp_path / "google" / "t5-small").mkdir(parents=True)
    config = {
        "encoders": [{"name": "t5", "model": "google/t5-small"}, {"model": "google/t5-v1_1-xxl"}],
        "source": {"path": "/data/{00..09}.tar", "list": "./list.txt", "url": "s3://bucket/x", "file": "/a/b.parquet"},
        "shard_size": 8,
    }
    assert dict(local_places(config)) == {
        "encoders.0.model": "google/t5-small",
        "source.path": "/data",
        "source.list": "./list.txt",
        "source.file": "/a/b.parquet",
    }


def test_what_only_a_cluster_has_is_refused_without_it() -> None:
    result = call("doctor", "-c", "urls-t5-xxl")
    assert result.code == 2
    assert "only --cluster looks at them" in result.err
    result = call("doctor", "--cluster", "--out", "runs/one")
    assert result.code == 2
    assert "--out runs/one: every node must access it" in result.err


def test_a_cluster_that_is_not_there_is_named_in_one_line() -> None:
    result = call("doctor", "--cluster", "--address", "127.0.0.1:9")
    assert result.code == 4
    assert result.err.startswith("error: --address 127.0.0.1:9: cannot be reached ([Errno 111]")
    assert result.err.count("\n") == 1


def versioned(folder: Path, **packages: str) -> Path:
    """A folder of packages with nothing but versions."""
    for name, version in packages.items():
        place = folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    return folder


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Three nodes; each sees behind some paths the disk of its current folder: its own, or a shared one."""
    top = tmp_path_factory.mktemp("v")
    shared = top / "shared"
    (shared / "runs").mkdir(parents=True)
    (shared / "model").mkdir()
    t5(shared / "model")
    for name in ("runs", "model"):
        (top / name).symlink_to(f"/proc/self/cwd/disk/{name}")
    for name in ("head", "old", "blind"):
        (top / name).mkdir()
    for name in ("head", "old"):
        (top / name / "disk").symlink_to(shared)
    (top / "blind" / "disk" / "model").mkdir(parents=True)
    (top / "blind" / "disk" / "model" / "config.json").write_text("{}")
    with ray_nodes(top / "n") as nodes:
        nodes.start("head", "--num-cpus=1", folder=top / "head")
        packages = versioned(top / "packages", pyarrow="0.0.1", imagen_precompute="0.0.2")
        nodes.start("old", "--num-cpus=1", folder=top / "old", packages=packages)
        nodes.start("blind", "--num-cpus=1", "--num-gpus=1", folder=top / "blind")
        yield {"top": top, "nodes": nodes}


def doctor(views: dict[str, Any], *arguments: str, **environment: str) -> Result:
    """The command on the head, with the variables of its environment changed."""
    nodes: RayNodes = views["nodes"]
    done = subprocess.run(
        command("doctor", "--cluster", *arguments),
        env={**nodes.environment, **environment},
        cwd=views["top"] / "head",
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.ray
def test_each_node_is_examined_and_what_will_not_work_is_named(views: dict[str, Any]) -> None:
    out, model = views["top"] / "runs" / "new" / "run", views["top"] / "model"
    options = ["--out", str(out), "--json", f"encoders.0.model={model}", "encoders.0.num_gpus=2"]
    result = doctor(views, *options, "--address", views["nodes"].address)
    assert result.code == 4, result.err
    found = json.loads(result.out)
    assert found["address"] == views["nodes"].address
    assert [node["resources"].get("GPU", 0) for node in found["nodes"]].count(1.0) == 1
    order = sorted(
        found["nodes"], key=lambda node: (node["resources"].get("GPU", 0), node["facts"]["versions"]["pyarrow"])
    )
    old, head, blind = (node["node"] for node in order)
    bad = {(c["node"], c["name"]): c["message"] for c in found["checks"] if c["status"] == "bad"}
    assert bad.keys() == {
        (old, "versions"),
        (blind, "run folder"),
        (blind, "encoders.0.model"),
        (blind, "gpus"),
        ("", "encode-t5"),
    }
    assert bad[old, "versions"].startswith("imagen-precompute 0.0.2 (here ")
    assert bad[blind, "run folder"].startswith("there is no such folder; mount the same file system")
    assert bad[blind, "encoders.0.model"].startswith(f"{model}: 1 files, 2 B; here ")
    assert bad[blind, "gpus"].startswith("Ray offers 1, nvidia-smi shows 0")
    assert bad["", "encode-t5"].startswith("needs CPU 1, GPU 2, and none of 3 nodes has it")
    notes = {(c["node"], c["name"]): c["message"] for c in found["checks"] if c["status"] == "note"}
    assert notes[old, "versions"].startswith("pyarrow 0.0.1 (here ")
    fine = {(c["node"], c["name"]) for c in found["checks"] if c["status"] == "ok"}
    assert {(head, name) for name in ("versions", "run folder", "encoders.0.model", "clock")} <= fine
    assert {(old, name) for name in ("run folder", "encoders.0.model", "clock")} <= fine
    assert os.listdir(views["top"] / "shared" / "runs") == [], "nothing is left"
    assert sorted(os.listdir(views["top"] / "blind" / "disk")) == ["model"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_cluster_of_the_environment_is_examined_in_a_table(views: dict[str, Any]) -> None:
    views["nodes"].kill("blind")
    result = doctor(views, RAY_ADDRESS=views["nodes"].address)
    assert result.code == 4, result.err
    assert re.search(r"[23] nodes; not so: ", result.out), "Ray may not have noticed yet that a node is gone"
    assert "imagen-precompute 0.0.2" in "".join(result.out.split("\n")).replace("  ", "") or "0.0.2" in result.out
