"""Metrics that are read while they are written."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from imagen_core.train.logs import JsonLines
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.open import open_storage
from stages.browse.training.metrics import MetricsFile
from tests.object_store import object_store
from tests.stages.browse.training.trainings import lines


class Counted(LocalStorage):
    """Counts the bytes that are read."""

    bytes_read = 0

    def read_part(self, name: str, start: int, length: int) -> bytes:
        data = super().read_part(name, start, length)
        self.bytes_read += len(data)
        return data


def curve(metrics: MetricsFile, name: str = "loss") -> dict[int, float]:
    x, y = metrics.read().curve(name)
    return dict(zip(x.astype(int).tolist(), y.tolist(), strict=True))


def test_metrics_are_those_of_the_file_and_a_missing_one_leaves_a_gap(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5, "lr": 0.25}\n{"step": 2, "validation_loss": 1.75}\n'
    )
    found = MetricsFile(LocalStorage(tmp_path)).read()
    assert found.steps.tolist() == [1, 2]
    assert [found.curve(name)[1].tolist() for name in ("loss", "lr", "validation_loss", "none")] == [
        [2, 1.5],
        [0.25],
        [1.75],
        [],
    ]
    assert found.last() == {"loss": (2, 1.5), "lr": (2, 0.25), "validation_loss": (2, 1.75)}
    assert found.curve("loss", 2)[0].tolist() == [2]
    assert found.curve("loss", None, 1)[0].tolist() == [1]


def test_only_new_bytes_are_read_again(tmp_path: Path) -> None:
    path, storage = tmp_path / "metrics.jsonl", Counted(tmp_path)
    path.write_text(lines(range(1, 5001), loss=0.5))
    metrics = MetricsFile(storage)
    assert len(curve(metrics)) == 5000
    assert storage.bytes_read == path.stat().st_size
    first = metrics.read()
    assert metrics.read() is first
    with path.open("a") as file:
        file.write(lines([5001], loss=0.5))
    storage.bytes_read = 0
    assert curve(metrics)[5001] == 5001.5
    assert storage.bytes_read < 400


def test_a_line_that_is_half_written_comes_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = MetricsFile(LocalStorage(tmp_path))
    assert curve(metrics) == {1: 1.0}
    with path.open("a") as file:
        file.write('ss": 3.0}\n')
    assert curve(metrics) == {1: 1.0, 2: 3.0}
    assert metrics.read().unreadable == 0


def test_a_step_that_was_done_again_has_the_later_value(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(range(1, 8), loss=0.0) + lines(range(4, 6), loss=100.0))
    metrics = MetricsFile(LocalStorage(tmp_path))
    assert curve(metrics) == {1: 1, 2: 2, 3: 3, 4: 104, 5: 105}


def test_a_training_that_resumes_while_it_is_read_shows_what_its_file_has(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in range(1, 301):
        first.scalars(step, {"loss": float(step)})
    metrics = MetricsFile(LocalStorage(tmp_path))
    assert len(curve(metrics)) == 300
    first.close()
    again = JsonLines(path, 200)  # as a start from the checkpoint of step 200
    assert list(curve(metrics)) == list(range(1, 201))
    for step in range(201, 401):
        again.scalars(step, {"loss": -float(step)})
    again.close()
    assert curve(metrics) == {step: step if step <= 200 else -step for step in range(1, 401)}


def test_a_file_that_was_replaced_by_a_longer_one_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(1, 50), loss=0.0))
    metrics = MetricsFile(LocalStorage(tmp_path))
    assert len(curve(metrics)) == 49
    path.write_text(lines(range(1, 101), loss=0.5))
    assert curve(metrics) == {step: step + 0.5 for step in range(1, 101)}


def test_a_file_that_comes_late_or_goes_is_no_error(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.jsonl", MetricsFile(LocalStorage(tmp_path))
    assert curve(metrics) == {}
    path.write_text(lines([1], loss=0.0))
    assert curve(metrics) == {1: 1}
    path.unlink()
    assert curve(metrics) == {}


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[1]",
        "null",
        '{"step": -1, "loss": 1}',
        '{"step": "2"}',
        '{"step": 2, "loss": "<script>"}',
        '{"loss": 3}',
        "\0\xff",
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_counted_and_the_others_are_shown(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines([1], loss=0.0) + damage + "\n" + lines([3], loss=0.0))
    metrics = MetricsFile(LocalStorage(tmp_path))
    assert curve(metrics) == {1: 1, 3: 3}
    assert metrics.read().unreadable == 1


def test_values_beyond_all_numbers_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1e300, "grad_norm": NaN, "lr": Infinity}\n')
    found = MetricsFile(LocalStorage(tmp_path)).read()
    assert found.curve("loss")[1].tolist() == [np.inf]
    assert found.curve("grad_norm")[1].tolist() == []
    assert found.unreadable == 0


def test_of_more_steps_than_are_kept_the_extremes_stay(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[[1234, 8765]] = 50.0, -50.0
    rows = (
        {"step": step, "loss": value} | ({"validation_loss": 7.0} if step == 999 else {})
        for step, value in enumerate(values.tolist())
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = MetricsFile(LocalStorage(tmp_path), most_rows=1000).read()
    steps, loss = found.curve("loss")
    assert found.thinned
    assert len(found.steps) <= 1000
    assert (np.diff(found.steps) > 0).all()
    assert (loss.max(), loss.min()) == (50, -50)
    assert abs(steps[loss.argmax()] - 1234) <= 120
    assert abs(steps[loss.argmin()] - 8765) <= 120
    assert np.diff(steps).max() <= 120  # the earliest steps are as fine as the last
    assert found.curve("validation_loss")[1].tolist() == [7.0]
    assert found.last()["loss"] == (9999, np.float32(values[-1]))


def test_what_takes_long_is_read_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.browse.training.metrics._CHUNK_BYTES", 1000)
    (tmp_path / "metrics.jsonl").write_text(lines(range(1, 201), loss=0.0))
    metrics, seen = MetricsFile(LocalStorage(tmp_path)), []
    while not seen or seen[-1] < 1:
        seen.append(metrics.read(within_s=0).read)
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert list(curve(metrics)) == list(range(1, 201))


@pytest.fixture
def far() -> Iterator[Callable[[], Storage]]:
    with object_store() as store:
        yield lambda: open_storage(f"{store.url}/training")


@pytest.mark.slow
def test_a_training_on_an_object_store_is_read_as_it_grows_and_resumes(far: Callable[[], Storage]) -> None:
    writer, metrics = far(), MetricsFile(far())
    assert curve(metrics) == {}
    for text, expected in (
        (lines(range(1, 6), loss=0.0), {step: step for step in range(1, 6)}),
        (lines(range(1, 9), loss=0.0), {step: step for step in range(1, 9)}),
        (lines(range(1, 4), loss=0.0) + lines([4], loss=0.5), {1: 1, 2: 2, 3: 3, 4: 4.5}),
    ):
        writer.write_text("metrics.jsonl", text)
        assert curve(metrics) == expected


def test_names_beyond_all_measure_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, f"m{n}": 1.0}) + "\n" for n in range(500)))
    assert len(MetricsFile(LocalStorage(tmp_path)).read().values) == 64
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
