"""Tables in a terminal of 80 columns: numbers and names are never split."""

from typing import Any

import pytest

from pipeline.cli import show

NARROW = 80
LARGE, HUGE = 123_456_789, 123_456_789_012
DROPS = {"unsupported_range": LARGE, "http_404": LARGE}
GROUP: dict[str, Any] = {"shards": LARGE, "rows": LARGE, "bytes": 10**15, "drops": DROPS}
GROUP["counters"] = {"requests": LARGE, "tokens_in": HUGE, "tokens_out": HUGE}
PLANNED = {"shards_done": LARGE, "shards_to_do": LARGE, "bytes_done": 10**15, "bytes_to_do": 10**15}
STAGE = {
    "stage": "encode-t5-xxl",
    "rows": HUGE,
    "tokens": HUGE,
    "bytes": 10**15,
    "alone_s": 10**6,
    "busy_s": 10**6,
    "gpu_hours": 1234.5,
    "usd_per_month": 12345.67,
}
ESTIMATE = {
    "stages": [STAGE],
    "bottleneck": {"name": "GPU", "busy": 0.9},
    "object_store": {"bytes": 10**15, "files": LARGE, "usd_per_month": 1.0, "usd_to_write": 1.0},
    "usd_compute": 1.0,
    "seconds": 10**6,
    "basis": "a profile",
    "spot": None,
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(NARROW))


def summary() -> None:
    tally = {
        "groups": {"samples": GROUP, "text-t5-xxl": GROUP},
        "shards_skipped": 0,
        "input_rows": LARGE,
        "shards": LARGE,
    }
    show.show_summary({"tally": tally, "outcome": "finished", "seconds": 1.0}, [])


def preview() -> None:
    result: dict[str, Any] = {
        "stages": [{"name": "encode-t5-xxl", "groups": ["text-t5-xxl"]}],
        "groups": {"text-t5-xxl": PLANNED},
        "input_rows": LARGE,
        "shards": LARGE,
        "out": "run",
        "estimate": ESTIMATE,
    }
    show.show_preview(result)


def status() -> None:
    metrics = {"step": LARGE, "loss": 0.12345678}
    groups = {"samples": GROUP, "text-t5-xxl": GROUP}
    show.show_status({"groups": groups, "metrics": metrics, "running": True, "workflow": "precompute"})


def values() -> None:
    show.show_values({"parameters": LARGE, "memory_bytes": 10**15, "a long name of a value": "word " * 40})


def models() -> None:
    show.show_table(["model", "parameters", "description"], [["nemo-base64-500m", f"{LARGE:,}", "words " * 30]])


def checks() -> None:
    show.show_checks([{"status": "bad", "name": "transformers", "message": "found " * 40}])


@pytest.mark.parametrize("table", [summary, preview, status, values, models, checks])
def test_no_table_splits_a_number_or_a_name_at_80_columns(table: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table()
    printed = capsys.readouterr().out
    words = {
        summary: [str(LARGE), "909.5 TiB", "unsupported_range", "text-t5-xxl"],
        preview: [str(LARGE), f"{HUGE:,}", "909.5 TiB", "encode-t5-xxl", "text-t5-xxl", "12,345.67"],
        status: [str(LARGE), "unsupported_range", f"{LARGE:,}", "text-t5-xxl"],
        values: [f"{LARGE:,}", "909.5 TiB"],
        models: [f"{LARGE:,}", "nemo-base64-500m"],
        checks: ["transformers"],
    }[table]
    assert "…" not in printed
    for word in words:
        assert word in printed, word
    if table is not preview:
        assert max(map(len, printed.splitlines())) <= NARROW
