"""Several stores by weight from the command line: what a plan shows, and what is refused in one line."""

import json
from pathlib import Path

import pytest
import yaml

from tests.commands import Result, call
from tests.imagen_core.train.small import make_config, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores a of 40 samples, b of 12, and one of another encoder; and a configuration without a store."""
    folder = tmp_path_factory.mktemp("mixture")
    make_store(folder / "a" / "store")
    make_store(folder / "b" / "store", rows=(12,))
    make_store(folder / "other", rows=(12,), model="other")
    config = make_config(Path("RUN/store")).model_dump(mode="json", exclude={"store", "stores"})
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return folder


def shares(folder: Path, *weighed: tuple[str, float]) -> str:
    return f"stores={json.dumps([{'path': str(folder / path), 'weight': weight} for path, weight in weighed])}"


def refused(folder: Path, *overrides: str) -> Result:
    out = folder / "out"
    result = call("run", "train", "-c", str(folder / "train.yaml"), "--out", str(out), "--quiet", *overrides)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1), result.err
    assert not (out / "checkpoints").exists()
    return result


def test_a_plan_names_each_store_with_its_share_and_its_epochs(folder: Path) -> None:
    stores = shares(folder, ("a/store", 3), ("b/store", 1))
    plan = call("plan", "train", "-c", str(folder / "train.yaml"), "--out", str(folder / "p"), "--json", stores)
    summary = json.loads(plan.out)["summary"]
    assert summary["stores"] == {name: str(folder / name / "store") for name in "ab"}
    assert summary["shares"] == {"a": 0.75, "b": 0.25}
    assert summary["stores_now"] == {"a": "40 samples: 0.9 epochs", "b": "12 samples: 1.0 epochs"}
    missing = shares(folder, ("a/store", 3), ("absent", 1))
    plan = call("plan", "train", "-c", str(folder / "train.yaml"), "--out", str(folder / "p"), "--json", missing)
    assert json.loads(plan.out)["summary"]["stores_now"] == "not there yet: absent"


def test_stores_of_different_encoders_are_refused_with_what_differs(folder: Path) -> None:
    err = refused(folder, shares(folder, ("a/store", 1), ("other", 1))).err
    assert 'store other: its text-t5 is not made as that of store a: fingerprint.model: "tiny" -> "other"' in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "store: is missing; name the store to train on, or several as stores"),
        (("store=x", "stores=[{path: a}]"), "stores: and store is 'x'; set store=null to mix stores"),
        (("stores=[{path: a, weight: 0}]",), "stores: all weights are 0"),
        (("stores=[{path: a, weight: .nan}]",), "stores.0.weight"),
        (("stores=[{path: a, weight: -1}]",), "stores.0.weight"),
    ],
)
def test_stores_that_mean_nothing_are_refused_in_one_line(
    folder: Path, overrides: tuple[str, ...], words: str
) -> None:
    assert words in refused(folder, *overrides).err
