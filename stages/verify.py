"""`pipeline verify`: checks a store file by file."""

from dataclasses import asdict
from pathlib import Path

from imagen_core.store import StoreError, verify_store
from pipeline.errors import EXIT_FAILED, EXIT_OK
from pipeline.show import human_bytes

CommandResult = tuple[dict[str, object], list[str], int]
"""JSON-able result, lines for people, exit code."""


_MAX_NOTES = 10


def store_folder(path: Path) -> Path:
    """The store itself, given a store or the run folder around it."""
    inner = path / "store"
    return inner if inner.is_dir() and not (path / "manifest.json").exists() else path


def verify_command(path: Path) -> CommandResult:
    """Recomputes every checksum and checks the alignment of all groups."""
    store = store_folder(path)
    try:
        report = verify_store(store)
    except StoreError as error:
        return {"ok": False, "problems": [{"file": str(store), "message": str(error)}]}, [f"bad: {error}"], EXIT_FAILED
    result = asdict(report)
    lines = [f"bad: {problem.file}: {problem.message}" for problem in report.problems]
    if lines:
        lines.append("Move the bad files away and run the same pipeline command again: it makes only those anew.")
    lines += [f"note: {warning.file}: {warning.message}" for warning in report.warnings[:_MAX_NOTES]]
    if len(report.warnings) > _MAX_NOTES:
        lines.append(f"note: ... and {len(report.warnings) - _MAX_NOTES} files more")
    checked = f"{report.files_checked} files, {human_bytes(report.bytes_checked)}, {report.num_samples} samples"
    lines.append(f"{'good' if report.ok else 'NOT good'}: {checked} checked in {store}")
    return result, lines, EXIT_OK if report.ok else EXIT_FAILED
