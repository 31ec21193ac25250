"""Progress shows a drop at the stage that found it."""

from pathlib import Path

from pipeline.engine.progress import Progress
from pipeline.executors.task import TaskOutcome
from tests.runs import precompute


def test_a_row_that_was_not_fetched_is_a_drop_of_fetch_and_an_unreadable_image_one_of_resize(
    tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.ppm").write_bytes(b"P6 16 16 255\n" + bytes(768))
    (folder / "bad.ppm").write_bytes(b"P6 16 16 255\n")
    (folder / "captions.jsonl").write_text(
        "".join(f'{{"file": "{name}.ppm", "caption": "a"}}\n' for name in ("good", "bad", "absent", "gone"))
    )
    seen: list[Progress] = []
    done = Progress.task_done

    def task_done(progress: Progress, outcome: TaskOutcome) -> None:
        done(progress, outcome)
        seen.append(progress)

    monkeypatch.setattr(Progress, "task_done", task_done)
    settings = ["source.kind=folder", f"source.path={folder}", "encoders=[]", "images.sizes_px=[16]"]
    summary = precompute(tmp_path / "run", *settings, "max_drop_fraction=1")
    assert summary["tally"]["groups"]["samples"]["drops"] == {"missing_file": 2, "truncated": 1}
    assert {name: count.drops for name, count in seen[-1].counts.items()} == {"fetch": 2, "resize": 1}
