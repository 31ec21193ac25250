"""A stage of another package adds a score and a ragged mask to a store."""

import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.store import Sample, Store, verify_store
from pipeline.errors import ConfigError
from pipeline.executors.task import release_stages
from pipeline.options import RunOptions
from pipeline.plan import Plan
from pipeline.stage import Group, GroupResult, Stage, Task
from pipeline.storage.run_folder import RunFolder
from tests.added_packages import PACKAGE, on_path
from tests.commands import Result, call, precompute, summary, tree
from workflows.precompute import Precompute, PrecomputeConfig

MEANS = {"red": 76.245, "green": 149.685, "blue": 29.07}
BRIGHT = "{kind: bright_pixels, from_px: 16}"
GROUPS = ("array-bright-mean", "array-bright-mask")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example package, installed as its pyproject.toml says."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))["project"]
    info = site / "extension_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extension-example\nVersion: 1.0\n")
    points = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in points]
    (info / "entry_points.txt").write_text("".join(lines))
    shutil.copytree(PACKAGE / "extension_example", site / "extension_example")
    with on_path(site):
        yield site
    for name in [name for name in sys.modules if name.startswith("extension_example")]:
        del sys.modules[name]


def make(out: Path, *overrides: str, stages: str = BRIGHT) -> Result:
    """Shards of two samples: red and green, blue and red, green and blue. A run is continued in its format."""
    small = ("source={kind: solid, num_samples: 6}", "shard_size=2", "images.sizes_px=[16]", "encoders=[]")
    manifest = out / "store/manifest.json"
    store_format = (
        json.loads(manifest.read_text())["groups"]["images-16"]["format"] if manifest.exists() else "parquet"
    )
    settings = (f"stages=[{stages}]", f"store.format={store_format}", "execution.max_attempts=1")
    return precompute(out, *small, *settings, *overrides)


@pytest.fixture(scope="module", params=["parquet", "hdf5"])
def made(package: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the stage."""
    out = tmp_path_factory.mktemp("made") / "run"
    result = make(out, f"store.format={request.param}")
    assert result.code == 0, result.err
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(made, tmp_path / "run")


def test_a_stage_of_another_package_adds_a_score_and_a_ragged_mask(made: Path) -> None:
    store = Store.open(made / "store")
    assert store.arrays == ["bright-mask", "bright-mean"]
    for number, sample in enumerate(store):
        color = ("red", "green", "blue")[number % 3]
        mean, mask = sample.arrays["bright-mean"], sample.arrays["bright-mask"]
        assert (mean.dtype, mean.shape) == (np.float32, ())
        assert float(mean) == pytest.approx(MEANS[color], abs=0.01)
        np.testing.assert_array_equal(mask, np.ones((16, 16) if color == "green" else (0, 0), bool), strict=True)
    (batch,) = store.loader(batch_size=6, arrays=["bright-mean", "bright-mask"], shuffle=False)
    assert batch["arrays"]["bright-mask"].sum((1, 2)).tolist() == [0, 256, 0, 0, 256, 0]
    assert verify_store(made / "store").ok


def test_the_group_says_what_made_it(made: Path) -> None:
    groups = json.loads((made / "store/manifest.json").read_text())["groups"]
    assert [groups[name]["shape"] for name in GROUPS] == [[], [None, None]]
    assert groups["array-bright-mean"]["fingerprint"] == {
        "kind": "bright_pixels",
        "version": 1,
        "name": "bright",
        "from_px": 16,
        "threshold": 128,
        "least_mean": 0.0,
    }


def test_inspect_and_report_show_the_group(run: Path) -> None:
    shown = call("inspect", str(run))
    assert "bool (any, any), " in shown.out
    assert "threshold: 128" in shown.out
    found = json.loads(call("inspect", str(run), "--json").out)
    assert found["arrays"] == ["bright-mask", "bright-mean"]
    assert (found["groups"]["array-bright-mean"]["dtype"], found["groups"]["array-bright-mean"]["shape"]) == (
        "float32",
        [],
    )
    one = call("inspect", str(run), "--key", "solid-1").out
    assert "16 x 16 bool by bright_pixels" in one
    assert "one float32 by bright_pixels" in one
    report = json.loads(call("report", str(run), "--json").out)
    assert set(GROUPS) <= {group["name"] for group in report["groups"]}


def test_a_stage_added_later_leaves_all_other_files_as_they_are(package: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "run", stages="").code == 0
    store = tmp_path / "run/store"
    before = {name: ((store / name).stat().st_mtime_ns, (store / name).read_bytes()) for name in tree(store)}
    del before["manifest.json"]
    assert make(tmp_path / "run").code == 0
    assert {name: ((store / name).stat().st_mtime_ns, (store / name).read_bytes()) for name in before} == before
    assert summary(tmp_path / "run")["groups_in_store"] == [*sorted(GROUPS), "images-16", "samples"]
    assert len(Store.open(store)[1].arrays) == 2
    assert verify_store(store).ok


def test_without_the_package_the_store_opens_verifies_and_its_run_goes_on(package: Path, tmp_path: Path) -> None:
    source = "source={kind: synthetic, num_samples: 4}"
    assert make(tmp_path / "run", source).code == 0
    before = (tmp_path / "run/store/manifest.json").read_bytes()
    on_path(package).__exit__()
    try:
        assert (
            "there is none of this name (got 'bright_pixels'); choose from clip_score"
            in make(tmp_path / "run", source).err
        )
        result = call("verify", str(tmp_path / "run/store"))
        assert result.code == 0, result.err
        assert make(tmp_path / "run", source, stages="").code == 0
        assert Store.open(tmp_path / "run/store")[0].arrays["bright-mask"].dtype == bool
    finally:
        on_path(package).__enter__()
    assert (tmp_path / "run/store/manifest.json").read_bytes() == before


def test_a_sample_that_a_stage_rejects_is_excluded_and_counted(package: Path, tmp_path: Path) -> None:
    result = make(tmp_path / "run", stages="{kind: bright_pixels, from_px: 16, least_mean: 50}")
    assert result.code == 0, result.err
    store = Store.open(tmp_path / "run/store")
    assert [sample.key for sample in store] == ["solid-0", "solid-1", "solid-3", "solid-4"]
    assert summary(tmp_path / "run")["tally"]["groups"]["array-bright-mean"]["drops"] == {"too_dark": 2}
    report = verify_store(tmp_path / "run/store")
    assert (report.ok, report.excluded, report.unaccounted) == (True, {"too_dark": 2}, 0)
    listed = (tmp_path / "run/quarantine/array-bright-mask/00001.jsonl").read_text()
    assert json.loads(listed)["detail"].startswith("mean brightness 29")


def test_a_changed_setting_of_a_stage_is_refused_with_the_difference(run: Path) -> None:
    result = make(run, stages="{kind: bright_pixels, from_px: 16, threshold: 99}")
    assert result.code == 2
    assert "array-bright-mean.fingerprint.threshold: 128 -> 99" in result.err


Faulty = Callable[[Iterable[Sample]], Iterator[Mapping[str, Any]]]


def faulty(change: Callable[[dict[str, Any]], dict[str, Any] | None], repeat: int = 1) -> Faulty:
    """Makes arrays, other ones for solid-3, the second sample of shard 1; None ends it there."""

    def measure(samples: Iterable[Sample]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            good = {"bright-mean": np.float32(1), "bright-mask": np.ones((1, 2), bool)}
            arrays = change(good) if sample.key == "solid-3" else good
            if arrays is None:
                return
            yield from [arrays] * (repeat if sample.key == "solid-3" else 1)

    return measure


ROW = "row 1 ('solid-3'): "
REPAIR = "; repair kind bright_pixels of extension_example"


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (
            faulty(lambda good: good | {"bright-mean": np.float64(1)}),
            f"array-bright-mean/00001: {ROW}float64 () is not float32 (){REPAIR}",
        ),
        (
            faulty(lambda good: good | {"bright-mask": np.ones(4, bool)}),
            f"array-bright-mask/00001: {ROW}bool (4,) is not bool (any, any){REPAIR}",
        ),
        (
            faulty(lambda good: good | {"bright-mean": np.float32("nan")}),
            f"array-bright-mean/00001: {ROW}a value is NaN or infinite{REPAIR}",
        ),
        (
            faulty(lambda good: {"bright-mean": np.float32(1)}),
            f"array-bright-mean/00001: {ROW}arrays ['bright-mean'] were made, not ['bright-mask', "
            f"'bright-mean']{REPAIR}",
        ),
        (
            faulty(lambda good: None),
            f"array-bright-mean/00001: {ROW}nothing was made of it and the rows behind it; kind bright_pixels of "
            "extension_example must yield once for each sample",
        ),
        (
            faulty(lambda good: good, repeat=2),
            "array-bright-mean/00001: more was made than its 2 samples; kind bright_pixels",
        ),
    ],
    ids=["dtype", "shape", "nan", "array missing", "too few", "too many"],
)
def test_a_stage_that_breaks_its_promise_fails_the_shard_and_the_others_finish(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: Faulty, says: str
) -> None:
    from extension_example.stage import BrightPixels  # pyright: ignore[reportMissingImports]

    with monkeypatch.context() as patched:
        patched.setattr(BrightPixels, "build", lambda self: measure)
        result = make(tmp_path / "run")
    assert result.code == 3
    assert f"make-bright-mean+bright-mask on shard 1: ArrayError: {says}" in result.err
    store = Store.open(tmp_path / "run/store")
    assert [sample.key for sample in store] == ["solid-0", "solid-1", "solid-4", "solid-5"]
    assert store.manifest.failed_shards == (1,)
    left = tree(tmp_path / "run/store")
    assert {name for name in left if name.startswith("array") and "00001" in name} == set()


def test_a_mended_stage_makes_only_the_shard_that_failed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extension_example.stage import BrightPixels  # pyright: ignore[reportMissingImports]

    nan = faulty(lambda good: good | {"bright-mean": np.float32("nan")})
    with monkeypatch.context() as patched:
        patched.setattr(BrightPixels, "build", lambda self: nan)
        assert make(tmp_path / "run").code == 3
    release_stages()  # as of another process
    assert make(tmp_path / "run").code == 0
    assert verify_store(tmp_path / "run/store").ok
    assert float(Store.open(tmp_path / "run/store")[0].arrays["bright-mean"]) == 1
    assert float(Store.open(tmp_path / "run/store")[3].arrays["bright-mean"]) == pytest.approx(MEANS["red"], abs=0.01)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (f"{BRIGHT}, {BRIGHT}", "stages.1: kind bright_pixels makes array-bright-mean, as an earlier stage does"),
        (
            "{kind: bright_pixels, from_px: 16, name: ../x}",
            "stages.0: kind bright_pixels: array name '../x-mean': use letters, digits",
        ),
        (
            "{kind: bright_pixels, from_px: 32}",
            "stages.0: kind bright_pixels reads images-32, which no earlier stage makes; it can read images-16",
        ),
        ("{kind: bright_pixels, from_px: 16, treshold: 9}", "stages.0.treshold: unknown key (got 9)"),
        ("{from_px: 16}", "stages.0.kind: needed, but not given"),
    ],
)
def test_a_stage_that_cannot_run_is_refused_before_anything_is_written(
    package: Path, tmp_path: Path, stages: str, says: str
) -> None:
    result = make(tmp_path / "run", stages=stages)
    assert result.code == 2
    assert says in result.err
    assert not (tmp_path / "run/store").exists()


def test_a_stage_can_be_used_twice_and_the_plan_knows_the_bytes_of_fixed_shapes(package: Path, tmp_path: Path) -> None:
    other = "{kind: bright_pixels, from_px: 16, name: other, threshold: 10}"
    small = ("source={kind: solid, num_samples: 6}", "images.sizes_px=[16]", "encoders=[]")
    result = call("plan", "precompute", *small, f"stages=[{BRIGHT}, {other}]", "--json")
    groups = json.loads(result.out)["groups"]
    assert groups["array-other-mean"]["bytes_to_do"] == 6 * 12
    assert groups["array-other-mask"]["bytes_to_do"] is None


def test_arrays_of_removed_samples_are_erased_and_a_later_stage_never_sees_them(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = call("remove", str(run), "--key", "solid-4", "--compact")
    assert result.code == 0, result.err
    assert verify_store(run / "store").ok
    (path,) = (run / "store/array-bright-mask").glob("00002.*")
    assert ".r1." in path.name
    from extension_example.stage import BrightPixels  # pyright: ignore[reportMissingImports]

    seen: list[str] = []

    def measure(samples: Iterable[Sample]) -> Iterator[Mapping[str, Any]]:
        for sample in samples:
            seen.append(sample.key)
            yield {"other-mean": np.float32(5), "other-mask": np.ones((1, 1), bool)}

    monkeypatch.setattr(BrightPixels, "build", lambda self: measure)
    result = make(run, stages=f"{BRIGHT}, {{kind: bright_pixels, from_px: 16, name: other}}")
    assert result.code == 0, result.err
    assert seen == [f"solid-{number}" for number in (0, 1, 2, 3, 5)]
    assert verify_store(run / "store").ok
    assert Store.open(run / "store")[4].arrays["other-mean"] == 5


class _Undescribed(Stage):
    """Writes a file of its own kind, as the store format knows none."""

    name = "score"
    inputs = ("samples",)
    groups = (Group("score", {"dtype": "float32"}),)

    def process(self, task: Task) -> None:
        task.output("score", ".npy").write_bytes(b"")
        task.done("score", GroupResult(0))


class _WithUndescribed(Precompute):
    def plan(self, run: RunFolder) -> Plan:
        plan = super().plan(run)
        return replace(plan, stages=(*plan.stages, _Undescribed()))


def test_a_group_that_no_manifest_could_describe_is_refused_before_the_run(tmp_path: Path) -> None:
    config = PrecomputeConfig.model_validate({"source": {"kind": "synthetic", "num_samples": 2}})
    with pytest.raises(ConfigError, match=r"group 'score': .* field 'kind', so the store cannot hold it"):
        _WithUndescribed(config).run(str(tmp_path / "run"), RunOptions(executor="inline", quiet=True))
    assert not (tmp_path / "run").exists()
