"""`pipeline pull`: gets a store, an export or a trained model from a repository of the Hugging Face hub."""

import shutil
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_core.store import FileEntry, Manifest, StoreError, StoreFolder, TextGroup, load_manifest, load_removals
from pipeline.commands import CommandResult
from pipeline.config import local_path
from pipeline.errors import EXIT_OK, ConfigError, MachineError, UnavailableError
from pipeline.storage.files import commit_folder, unfinished_folder
from pipeline.units import human_bytes
from stages.checkpoints.imported import check_above
from stages.hub.package import FORMS, MODEL, STORE, Form, RepositoryType
from stages.hub.remote import Remote, connect, hub_errors, parse_repository

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_IGNORED = ".gitattributes"
_CACHE = ".cache"
"""Where huggingface_hub keeps what it knows of a folder's downloads."""


def pull_command(repo: str, *, out: str, revision: str | None = None) -> CommandResult:
    """Downloads a repository next to `out`, compares every byte with its digests, and then makes it appear.

    Killed at any moment, the same command goes on with the bytes that are there. Where `out` has it already, it is
    compared and stays.

    Args:
        repo: USER/NAME, or datasets/USER/NAME or models/USER/NAME if there are both.
        out: a new folder.
        revision: branch, tag or commit; None means main.
    Raises:
        ConfigError: there is no such repository or revision, it holds nothing that is complete, or `out` holds
            something else.
        MachineError: the token is missing or may not do it, or the repository itself is damaged.
        UnavailableError: the hub cannot be reached, or bytes were damaged on their way; the same command goes on.
    """
    target = local_path(out, "--out").absolute()
    check_above(target, out)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a new folder")
    name, kind = parse_repository(repo)
    with hub_errors(repo, revision):
        remote = _find(connect(), repo, name, kind, revision or "main")
        files = {path: file for path, file in remote.files().items() if path != _IGNORED}
    form = _form_of(remote, files)
    is_there = target.exists() and any(target.iterdir())
    with nullcontext(target) if is_there else unfinished_folder(target, resume=True) as folder:
        if not is_there:
            with hub_errors(repo, revision):
                _download(remote, folder)
        bad, others = _compare(remote, folder, repo, revision)
        if bad and is_there:
            raise ConfigError(
                f"--out {out}: is not empty, and {bad[0]} is not that of {remote.name}; give a new folder"
            )
        if bad:
            _forget(folder, bad)
            raise UnavailableError(
                f"{repo}: {len(bad)} files are missing or came damaged, the first {bad[0]}; the same command gets "
                "them again"
            )
        details = _check_store(folder, remote, files) if form is STORE else []
        if not is_there:
            for left in others:  # of another commit, which a killed pull began with
                (folder / left).unlink()
            shutil.rmtree(folder / _CACHE, ignore_errors=True)
            commit_folder(folder, target)
    return _report(remote, form, files, out, details, is_there=is_there)


def _report(
    remote: Remote, form: Form, files: "dict[str, RepoFile]", out: str, details: list[str], *, is_there: bool
) -> CommandResult:
    num_bytes = sum(file.size for file in files.values())
    result: dict[str, object] = {
        "repository": remote.name,
        "commit": remote.revision,
        "form": form.name,
        "folder": out,
        "files": len(files),
        "bytes": num_bytes,
        "was_there": is_there,
    }
    done = "is there already, unchanged" if is_there else "pulled and verified"
    lines = [f"{form.name} of {remote.name}: {done}: {len(files)} files, {human_bytes(num_bytes)} in {out}", *details]
    if form is STORE:
        lines.append(f"use it: pipeline run train store={out} ..., or pipeline verify {out}")
    elif form is MODEL:
        lines.append(f"sample: pipeline run sample 'stages=[{{checkpoint: {out}}}]' 'prompts=[...]'")
    return result, lines, EXIT_OK


def _find(api: "HfApi", repo: str, name: str, kind: RepositoryType | None, revision: str) -> Remote:
    """The repository at the commit that the revision is now."""
    from huggingface_hub.errors import RepositoryNotFoundError

    kinds: tuple[RepositoryType, ...] = ("dataset", "model") if kind is None else (kind,)
    found: list[Remote] = []
    missing: RepositoryNotFoundError | None = None
    for each in kinds:
        try:
            info = api.repo_info(name, repo_type=each, revision=revision)
        except RepositoryNotFoundError as error:
            missing = error
            continue
        found.append(Remote(api, name, each, str(info.sha)))
    if len(found) > 1:
        raise ConfigError(f"REPO {repo}: is a dataset and a model; give datasets/{name} or models/{name}")
    if not found:
        assert missing is not None
        raise missing
    return found[0]


def _form_of(remote: Remote, files: Collection[str]) -> Form:
    for form in FORMS:
        if form.repo_type == remote.repo_type and form.head in files:
            return form
    heads = " or ".join(form.head for form in FORMS if form.repo_type == remote.repo_type)
    raise ConfigError(
        f"{remote.name}: has no {heads}, so it is not complete, or nothing that `pipeline push` made; if a push is "
        "not finished, wait for it"
    )


def _download(remote: Remote, folder: Path) -> None:
    """Gets what the folder lacks; half of a file is gone on with."""
    remote.api.snapshot_download(
        remote.repo,
        repo_type=remote.repo_type,
        revision=remote.revision,
        local_dir=folder,
        ignore_patterns=[_IGNORED],
    )


def _compare(remote: Remote, folder: Path, repo: str, revision: str | None) -> tuple[list[str], list[str]]:
    """Names of the files that are missing in a folder, or have other bytes than the hub says; and of all others."""
    with hub_errors(repo, revision):
        found = remote.api.verify_repo_checksums(
            remote.repo, repo_type=remote.repo_type, revision=remote.revision, local_dir=folder
        )
    missing = [name for name in found.missing_paths if name != _IGNORED]
    return sorted([*missing, *(each["path"] for each in found.mismatches)]), found.extra_paths


def _forget(folder: Path, names: Collection[str]) -> None:
    """Deletes files that came damaged, and what huggingface_hub knows of them, so that they are downloaded again."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / _CACHE / "huggingface" / "download" / f"{name}.metadata").unlink(missing_ok=True)


def _check_store(folder: Path, remote: Remote, files: "dict[str, RepoFile]") -> list[str]:
    """Compares all files with the manifest, whose own digest is in it; returns lines to print.

    A file that the hub stores by its sha256 was compared with that before, so the two digests are compared here.

    Raises:
        MachineError: the repository has other files than its manifest says.
    """
    store = StoreFolder(folder)
    try:
        manifest = load_manifest(store)
        load_removals(store, listed=manifest.listed_removals)
        for entry in _entries(manifest):
            file = files.get(entry.path)
            if file is None or file.lfs is None or (file.lfs.sha256, file.size) != (entry.sha256, entry.bytes):
                store.check_bytes(entry)
    except StoreError as error:
        raise MachineError(
            f"{remote.name}: the files on the hub do not fit its manifest ({error}); whoever pushed it has to push "
            "it again"
        ) from error
    return [f"{manifest.num_samples} samples in {manifest.num_shards} shards, manifest {manifest.sha256}"]


def _entries(manifest: Manifest) -> list[FileEntry]:
    entries = [entry for shard in manifest.shards() for entry in shard.files.values()]
    for group in manifest.groups.values():
        if isinstance(group, TextGroup):
            entries += [entry for entry in (group.null, group.probe) if entry is not None]
    return entries
