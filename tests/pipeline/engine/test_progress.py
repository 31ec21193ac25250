"""Progress shows a drop at the stage that found it, and fits the terminal."""

import io
from pathlib import Path

import pytest

from pipeline.engine.progress import Lines, Progress
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


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_a_job_fits_the_terminal_and_loses_whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "step 100,000/500,000  loss 0.0123  1,234.5 img/s  12.3 h left  waiting for data 12.3%"
    monkeypatch.setenv("COLUMNS", "80")
    shown = _Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    Lines().show(text)
    assert shown.getvalue() == f"\r\x1b[K[    0 s] {text.removesuffix('  waiting for data 12.3%')}"
    monkeypatch.setattr("sys.stderr", plain := io.StringIO())
    Lines().show(text, final=True)
    assert plain.getvalue() == f"[    0 s] {text}\n"
