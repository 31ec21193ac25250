"""`pipeline verify`: checks a store file by file, row by row, and against its encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from imagen_core.store import Problem, Store, StoreError, VerifyReport, verify_store
from pipeline.commands import CommandResult
from pipeline.engine.division import view_parts
from pipeline.errors import EXIT_FAILED, EXIT_OK, ConfigError
from pipeline.storage.lock import describe_holder, is_running
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import scratch
from pipeline.units import human_bytes
from stages.stores import open_place, store_folder

if TYPE_CHECKING:
    from stages.store_tools.reencode import Comparison


_MAX_NOTES = 10
_MODEL = ("--encoder-model", "MODEL", "t5=/models/t5-v1_1-xxl")
_ENCODER = ("--encoder", "CONFIG", "t5='{kind: t5, model: google/t5-v1_1-xxl, max_tokens: 512}'")
_HINT = "of embeddings that came with the data, --encoder NAME=CONFIG says what made them"
_AT_WORK = (
    "note: a run is at work on it ({}): what it makes is not in the manifest yet, and what it makes again is missing; "
    "verify again when it has ended"
)


def verify_command(
    path: str,
    *,
    reencode: float | None = None,
    seed: int = 0,
    encoder_models: Sequence[str] = (),
    encoders: Sequence[str] = (),
) -> CommandResult:
    """Recomputes every checksum, checks the alignment of all groups row by row, and accounts for every input row.

    Args:
        reencode: fraction of the captions to encode again; None disables it. Skipped if files are bad already.
        encoder_models: `NAME=MODEL`, where an encoder's model is now.
        encoders: `NAME=CONFIG`, what is said to have made embeddings that came with the data: a YAML mapping as in
            `encoders` of a configuration, or a file with one.
    """
    store = store_folder(path)
    models = dict(_name_and_value(text, *_MODEL) for text in encoder_models)
    stated = [_name_and_value(text, *_ENCODER) for text in encoders]
    if reencode is None and stated:
        raise ConfigError(f"--encoder {encoders[0]}: goes with --reencode FRACTION; add it")
    missing = _missing_parts(run := _run_of(path))
    holder = describe_holder(run.storage) if is_running(run.storage) else None
    at_work, note = ({}, []) if holder is None else ({"at_work": holder}, [_AT_WORK.format(holder)])
    try:
        report = verify_store(store, scratch=scratch())
    except StoreError as error:
        problems = [*missing, {"file": store, "message": str(error)}]
        lines = [f"bad: {error}", *(f"bad: {problem['file']}: {problem['message']}" for problem in missing), *note]
        return {"ok": False, "problems": problems, **at_work}, lines, EXIT_FAILED
    report.problems = [*(Problem(**each) for each in missing), *report.problems]
    report.ok = not report.problems
    comparisons = {}
    if reencode is not None and report.ok:
        from stages.store_tools.reencode import reencode as encode_again
        from stages.store_tools.stated import stated_encoder

        said = {name: stated_encoder(name, text) for name, text in stated}
        comparisons = encode_again(Store.open(store), reencode, seed=seed, models=models, encoders=said)
        report.problems += [problem for comparison in comparisons.values() for problem in comparison.problems]
        report.ok = not report.problems
    result = {**asdict(report), **at_work}
    if reencode is not None:
        result["reencoded"] = {name: comparison.summary() for name, comparison in comparisons.items()}
    lines = [f"bad: {problem.file}: {problem.message}" for problem in report.problems]
    lines += [f"note: {warning.file}: {warning.message}" for warning in report.warnings[:_MAX_NOTES]]
    if len(report.warnings) > _MAX_NOTES:
        lines.append(f"note: ... and {len(report.warnings) - _MAX_NOTES} files more")
    if reencode is not None and not comparisons:
        why = "files are bad" if not report.ok else f"the store has no encoder that could do it; {_HINT}"
        lines.append(f"note: nothing was encoded again, because {why}")
    lines += [_comparison_line(name, comparison) for name, comparison in comparisons.items()]
    if report.input_rows is not None:
        lines.append(_coverage_line(report))
    lines += note
    if len(report.problems) > len(missing) and holder is None:
        lines.append("Move the bad files away and run the same pipeline command again: it makes only these again.")
    checked = f"{report.files_checked} files, {human_bytes(report.bytes_checked)}, {report.num_samples} samples"
    lines.append(f"{'good' if report.ok else 'NOT good'}: {checked} checked in {store}")
    return result, lines, EXIT_OK if report.ok else EXIT_FAILED


def _run_of(path: str) -> RunFolder:
    """The run around a store, or the store itself, which has leases too."""
    folder, run = open_place(path)
    return run or RunFolder(folder.url)


def _missing_parts(run: RunFolder) -> list[dict[str, str]]:
    """A problem if parts of a run are not done, or not put together."""
    view = view_parts(run)
    if view is None or view.division.finished:
        return []
    again = f"run them, or pipeline finish {run.url} if none is left"
    if view.missing:
        message = f"{view.missing_text()} of {view.division.parts} are missing; {again}"
    else:
        message = f"all {view.division.parts} are done, but not put together; {again}"
    return [{"file": "parts", "message": message}]


def _name_and_value(text: str, option: str, what: str, example: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigError(f"{option} {text}: give NAME={what}, for example {example}")
    return name, value


def _coverage_line(report: VerifyReport) -> str:
    return (
        f"{report.input_rows} input rows: {report.num_samples} samples, {_counts('dropped', report.dropped)}, "
        f"{_counts('excluded', report.excluded)}, {report.unaccounted} unaccounted"
        + (f"; {report.filtered} other rows filtered by source.where" if report.filtered else "")
    )


def _counts(what: str, by_reason: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in by_reason.items())
    return f"{sum(by_reason.values())} {what}" + (f" ({reasons})" if reasons else "")


def _comparison_line(name: str, comparison: "Comparison") -> str:
    return (
        f"{name}: {comparison.captions} captions encoded again, {comparison.tokens} tokens; cosine "
        f"{comparison.mean_cosine:.6f} mean, {comparison.min_cosine:.6f} least; error of a token at most "
        f"{comparison.max_relative_error:.3%} ({comparison.tolerance:.3%} allowed), of an element "
        f"{comparison.max_absolute_error:.3g}"
    )
