"""`pipeline remove`: takes samples out of a store, for good."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from imagen_core.store import (
    IDENTIFIERS,
    MANIFEST_NAME,
    SAMPLES_GROUP,
    Blocklist,
    Removal,
    RemovalRaceError,
    SamplesFile,
    StoreError,
    StoreFolder,
    add_removal,
    find_blocked,
    find_rows,
    load_manifest,
    load_removals,
    read_header,
    rewrite_manifest,
    value_digest,
)
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError, LockedError, LostFileError
from pipeline.storage.lock import describe_holder
from pipeline.storage.run_folder import RunFolder
from pipeline.units import human_bytes
from stages.duplicates.find import read_duplicates
from stages.lines import split_lines
from stages.store_tools.compact import compact
from stages.stores import open_place

_MAX_LISTED = 20
_MOST_TRIES = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

Shards = Iterator[tuple[int, SamplesFile, Mapping[int, str]]]


def remove_command(
    place: str,
    *,
    key: Sequence[str] = (),
    url: Sequence[str] = (),
    sha256: Sequence[str] = (),
    reason: str = "",
    compact_files: bool = False,
    grace_s: float | None = None,
    dry_run: bool = False,
) -> CommandResult:
    """Hides the samples with these keys, URLs or sha256 from readers at once; they are never stored again.

    While a run is at work on the store, it honours the removal: it drops what it meets later, and its manifest leaves
    out what it has already. Only compaction needs the store for itself.

    Args:
        place: a run folder, or a store: a folder or a fsspec URL.
        key, url, sha256: files with one value per line, or values.
        compact_files: also erase removed samples, of this call and of earlier ones, from all files.
        grace_s: how long compaction keeps the files that it replaced, see `compact`.
        dry_run: only say what would be removed.
    Raises:
        ConfigError: nothing was requested, a value that is not valid, or a store that cannot be changed.
        LockedError: compaction of a store that a run, or another removal, is at work on.
    """
    given: dict[str, Sequence[str]] = dict(zip(IDENTIFIERS, (key, url, sha256), strict=True))
    values = {name: _read_values(name, texts) for name, texts in given.items()}
    if not any(values.values()) and not compact_files:
        raise ConfigError("nothing to remove: give --key, --url or --sha256 with a file or a value, or --compact")
    folder, run = open_place(place)
    if compact_files and not folder.is_local:
        raise ConfigError(f"--compact: {place} is not on this machine; removals work there, but compact a local copy")
    try:
        if run is None:
            read_header(folder)  # there is a store, before its lock is made
        owner = run or RunFolder(folder.url)
        with _held(owner, dry_run=dry_run) as holder:
            folder.before_change = owner.storage.before_change
            result, lines = _remove(folder, run, values, given, reason, dry_run=dry_run, at_work=holder is not None)
            if run is not None and values["key"]:
                copies = result["copies"] = sorted(_copies(run, values["key"]))
                lines += _lines_of_copies(copies)
            if holder is not None:
                result["at_work"] = holder
                lines.append(f"note: at work on it, and honours the removal: {holder}")
            if compact_files and holder is not None:
                done = "the removal took effect, but its files were" if any(values.values()) else "the store was"
                raise LockedError(f"{place}: {done} not compacted, as this is at work on it: {holder}; wait for it")
            if compact_files and not dry_run:
                done = compact(Path(folder.path("")), run, grace_s, owner.check)
                result["compacted"] = {"files": done.files, "bytes_freed": done.bytes_freed}
                lines.append(f"compacted: {done.files} files written again, {human_bytes(done.bytes_freed)} less")
    except StoreError as error:
        raise ConfigError(str(error)) from error
    return result, lines, EXIT_OK


@contextmanager
def _held(owner: RunFolder, *, dry_run: bool) -> Iterator[str | None]:
    """Holds the run, or the store that has none, while the block runs; yields who holds it if another process does."""
    holder = None
    with ExitStack() as stack:
        if not dry_run:
            try:
                stack.enter_context(owner.lock())
            except LockedError:
                holder = describe_holder(owner.storage)
        yield holder


def samples_files(folder: StoreFolder, run: RunFolder | None, seen: set[int] | None = None) -> Shards:
    """Index, samples and excluded rows of each shard; of a run that has not finished, what it has so far.

    Args:
        seen: of a run that is at work: shards to leave out; the others are added.
    Raises:
        StoreError: not a store.
    """
    if run is not None and (seen is not None or not folder.exists(MANIFEST_NAME)):
        seen = set() if seen is None else seen
        for record in run.records(SAMPLES_GROUP):
            if record.shard in seen:
                continue
            seen.add(record.shard)
            copy = run.proven_copy(record.file)
            try:
                samples = SamplesFile(str(copy), record.file.path)
            finally:
                run.storage.release(copy)
            yield record.shard, samples, {}
        return
    manifest = load_manifest(folder)
    for position in range(manifest.num_shards):
        entry = manifest.file(SAMPLES_GROUP, position)
        if entry is not None:
            with folder.checked(entry, every_byte=True) as source:
                samples = SamplesFile(source, folder.path(entry.path))
            yield int(manifest.index[position]), samples, manifest.excluded.get(position, {})


def _remove(
    folder: StoreFolder,
    run: RunFolder | None,
    values: Mapping[str, set[str]],
    given: Mapping[str, Sequence[str]],
    reason: str,
    *,
    dry_run: bool,
    at_work: bool,
) -> tuple[dict[str, object], list[str]]:
    """Finds and logs; again if others changed the store meanwhile.

    Args:
        at_work: another process holds the store, so the manifest is left to it.
    """
    for tried in range(_MOST_TRIES):
        try:
            return _try_to_remove(folder, run, values, given, reason, dry_run=dry_run, at_work=at_work)
        except RemovalRaceError:
            if tried + 1 == _MOST_TRIES:
                raise
        except (StoreError, FileNotFoundError, LostFileError):  # such as a file that a compaction has just replaced
            if not at_work or tried >= 2:
                raise
    raise AssertionError("the last try returns or raises")


def _try_to_remove(
    folder: StoreFolder,
    run: RunFolder | None,
    values: Mapping[str, set[str]],
    given: Mapping[str, Sequence[str]],
    reason: str,
    *,
    dry_run: bool,
    at_work: bool,
) -> tuple[dict[str, object], list[str]]:
    removals = load_removals(folder)
    files = {name: {text for text in texts if Path(text).is_file()} for name, texts in given.items()}
    wanted = {name: values[name] | files[name] for name in IDENTIFIERS}
    seen: set[int] | None = set() if at_work else None
    found = find_rows(samples_files(folder, run, seen), removals, wanted)
    for name, names in files.items():
        if both := sorted(names & found.matched[name]):
            raise ConfigError(
                f"--{name} {both[0]}: is a file, and the {name} of a sample too; give ./{both[0]} for the file, or "
                "put the value into a file"
            )
    removed_before = _removed_before(removals)
    unmatched = {
        name: sorted(
            value for value in listed - found.matched[name] if value_digest(name, value) not in removed_before
        )
        for name, listed in values.items()
    }
    before = sum(value_digest(name, value) in removed_before for name, listed in values.items() for value in listed)
    _refuse_mistyped(given, files, unmatched, Blocklist(removals))
    removed = sum(len(rows) for rows in found.rows.values())
    if not dry_run and any(values.values()):
        time = datetime.now(UTC).isoformat(timespec="seconds")
        add_removal(folder, removals, found, values, time, reason, at_work=at_work)
        if at_work and run is not None:  # shards that were finished meanwhile; the run compares what it finishes later
            removals = load_removals(folder)
            late = find_blocked(samples_files(folder, run, seen), removals)
            add_removal(folder, removals, late, {}, time, reason, at_work=True)
            removed += sum(len(rows) for rows in late.rows.values())
        elif not at_work and folder.exists(MANIFEST_NAME):
            rewrite_manifest(folder)
    result: dict[str, object] = {
        "store": folder.path(""),
        "dry_run": dry_run,
        "removed": removed,
        "shards": len(found.rows),
        "removed_before": before,
        "values": {name: len(listed) for name, listed in values.items() if listed},
        "unmatched": {name: listed for name, listed in unmatched.items() if listed},
    }
    return result, _lines(result, unmatched, requested=any(values.values()))


def _lines(result: Mapping[str, object], unmatched: Mapping[str, list[str]], *, requested: bool) -> list[str]:
    if not requested:
        return []
    verb = "would be removed" if result["dry_run"] else "removed"
    lines = [f"{result['removed']} samples {verb}, in {result['shards']} shards"]
    if result["removed_before"]:
        lines.append(f"{result['removed_before']} values are of samples that were removed before")
    total = sum(len(listed) for listed in unmatched.values())
    if total:
        lines.append(f"{total} values match no sample; they are refused if they come later:")
        named = [f"  {name} {value}" for name, listed in unmatched.items() for value in listed]
        lines += named[:_MAX_LISTED]
        if total > _MAX_LISTED:
            lines.append(f"  ... and {total - _MAX_LISTED} more (--json lists all)")
    return lines


def _copies(run: RunFolder, keys: set[str]) -> set[str]:
    """The keys of samples that the run's list of duplicates has as equal to these, or nearly; without these."""
    groups = [{entry["key"], entry["same_as"].get("key", "")} for entry in read_duplicates(run)]
    found = {key for group in groups if group & keys for key in group}
    return {key for group in groups if group & found for key in group} - keys - {""}


def _lines_of_copies(copies: Sequence[str]) -> list[str]:
    if not copies:
        return []
    more = [f"  ... and {len(copies) - _MAX_LISTED} more (--json lists all)"] if len(copies) > _MAX_LISTED else []
    named = [f"  key {key}" for key in copies[:_MAX_LISTED]]
    return [f"{len(copies)} samples are duplicates of these, and stay unless you remove them too:", *named, *more]


def _removed_before(removals: Sequence[Removal]) -> set[str | None]:
    """Digests of all identifiers of the removed samples."""
    rows = [row for removal in removals for rows in removal.rows.values() for row in rows]
    return {getattr(row, name) for row in rows for name in IDENTIFIERS}


def _refuse_mistyped(
    given: Mapping[str, Sequence[str]],
    files: Mapping[str, set[str]],
    unmatched: Mapping[str, list[str]],
    blocklist: Blocklist,
) -> None:
    """A key on the command line that no sample has is more likely the misspelt name of a file."""
    for text in given["key"]:
        if text not in files["key"] and text in unmatched["key"] and not blocklist.has("key", text):
            raise ConfigError(
                f"--key {text}: neither a file nor the key of a sample; keys that are not in the store yet are taken "
                "from a file"
            )


def _read_values(name: str, texts: Sequence[str]) -> set[str]:
    """The values in files of one value per line, and the values given directly."""
    values: set[str] = set()
    for text in texts:
        path = Path(text)
        try:
            is_file = path.is_file()
        except OSError:  # too long for a name
            is_file = False
        lines = split_lines(path.read_bytes()) if is_file else [text]
        for line in filter(None, map(str.strip, lines)):
            value = line.lower() if name == "sha256" else line
            if (name == "sha256" and not _SHA256.fullmatch(value)) or (name == "url" and "://" not in value):
                what = "64 hex digits" if name == "sha256" else "a URL"
                where = f" in {text}" if is_file else ": no such file, and"
                raise ConfigError(f"--{name}{where} {line!r} is not {what}")
            values.add(value)
    return values
