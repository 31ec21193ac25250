"""`pipeline push`: puts a store, an export of one, or a trained model into a repository of the Hugging Face hub."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from imagen_core.store import MANIFEST_NAME
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import PLAN, STORE
from pipeline.storage.scratch import temporary_folder
from pipeline.units import human_bytes
from stages.hub.exports import export_folder, export_package
from stages.hub.models import diffusers_package, model_package
from stages.hub.package import CARD, DIFFUSERS, FORMS, UNKNOWN, Item, Package
from stages.hub.remote import Remote, connect, hub_errors, parse_repository
from stages.hub.stores import store_package

if TYPE_CHECKING:
    from huggingface_hub import CommitOperation
    from huggingface_hub.hf_api import RepoFile

_COMMIT_FILES = 250
"""The hub slows down with more files per commit, and takes 128 commits an hour."""
_COMMIT_BYTES = 10 << 30
"""Of a store behind a URL so much is copied to this machine at a time."""
_HISTORY = (
    "note: {} files were deleted, but the history of the repository still has them: `huggingface_hub."
    "HfApi().super_squash_history` drops it"
)


def push_command(
    path: str,
    *,
    repo: str,
    revision: str | None = None,
    license: str | None = None,
    private: bool = False,
    weights: str | None = None,
) -> CommandResult:
    """Uploads the files that the repository lacks, the one that makes it complete last, and a card.

    Killed at any moment, the same command goes on: what the hub has is not sent again. A dataset is made of a store or
    of an export, a model of a checkpoint, a file of `pipeline export` or a diffusers folder.

    Args:
        repo: USER/NAME; it is created if there is none.
        revision: branch, which is created if there is none; None means main.
        license: identifier of the hub, for the card; None keeps that of the repository's card, else `unknown`.
        private: create it as private.
        weights: of a training: `model`, or one of the averages; None means the slowest average.
    Raises:
        ConfigError: nothing of the kind is there, it is unfinished, damaged, or has removed samples in its files; or
            the repository has another form, is public where a private one was asked for, or the hub refuses the card.
        LockedError: a run is at work on it.
        MachineError: the token is missing, or may not do it.
        UnavailableError: the hub cannot be reached.
    """
    from huggingface_hub import RepoCard

    name, kind = parse_repository(repo)
    package = open_package(path, weights)
    repo_type = package.form.repo_type
    if kind not in (None, repo_type):
        raise ConfigError(f"REPO {repo}: is a {kind}, but {package.form.words} is pushed as a {repo_type}")
    remote = Remote(connect(), name, repo_type, revision or "main")
    with hub_errors(repo, revision):
        _create(remote, private=private)
        there = remote.files()
        _refuse_other_form(remote, package, there)
        card = package.card(name, license or _license_of(remote, there) or UNKNOWN).encode()
        missing = [item for item in package.items if not _has(there, item, package)]
        stale = _stale(package, there)
        if not _is(there.get(CARD), card):
            RepoCard(card.decode()).validate(repo_type=repo_type)  # before anything is uploaded
        commit = _upload(remote, package, missing, stale, card, there)
    result: dict[str, object] = {
        "repository": remote.name,
        "revision": remote.revision,
        "url": remote.url,
        "form": package.form.name,
        "files": len(package.items),
        "bytes": package.num_bytes,
        "added_files": len(missing),
        "added_bytes": sum(item.bytes for item in missing),
        "deleted_files": len(stale),
        "commit": commit,
    }
    lines = [
        f"{package.form.name} -> {remote.url}: {len(package.items)} files, {human_bytes(package.num_bytes)}; "
        f"{len(missing)} added, {len(package.items) - len(missing)} were there"
    ]
    lines += package.notes
    if stale:
        lines.append(_HISTORY.format(len(stale)))
    at = "" if revision is None else f" --revision {revision}"
    lines.append(f"get it: pipeline pull {remote.name}{at} --out FOLDER")
    return result, lines, EXIT_OK


def open_package(path: str, weights: str | None) -> Package:
    """What is at a path or URL, ready to be pushed.

    Raises:
        ConfigError: it is unfinished, or neither a store, nor an export, nor a model.
    """
    storage = open_storage(path)
    is_file = path.endswith(".safetensors")
    if not is_file and any(storage.size(name) is not None for name in (MANIFEST_NAME, f"{STORE}/{MANIFEST_NAME}")):
        _refuse_weights(weights)
        return store_package(path)
    if not is_file and (export := export_folder(path)) is not None:
        _refuse_weights(weights)
        return export_package(path, export)
    if not is_file and storage.size(DIFFUSERS.head) is not None:
        _refuse_weights(weights)
        return diffusers_package(path)
    plan = None if is_file else storage.read_json_if_whole(PLAN)
    if isinstance(plan, dict) and plan.get("workflow") in ("precompute", "export"):
        raise ConfigError(
            f"{path}: this {plan['workflow']} is not finished; run the same command to its end, then push it"
        )
    if not is_file and next(storage.names("samples"), None) is not None:
        raise ConfigError(f"{path}: is no complete store, as it has no {MANIFEST_NAME}; finish its run, then push it")
    try:
        return model_package(path, weights)
    except ConfigError as error:
        if "has no checkpoint" in str(error):
            raise ConfigError(
                f"PATH {path}: is neither a store, nor an export of one, nor a trained model; give one of these"
            ) from error
        raise


def _refuse_weights(weights: str | None) -> None:
    if weights is not None:
        raise ConfigError(f"--weights {weights}: is for checkpoints of a training; leave it out")


def _create(remote: Remote, *, private: bool) -> None:
    """Makes sure that the repository and the branch exist."""
    api, repo, repo_type = remote.api, remote.repo, remote.repo_type
    api.create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo, repo_type=repo_type).private:
        raise ConfigError(
            f"--private: {remote.name} exists and is public; make it private in its settings, or leave --private out"
        )
    if remote.revision != "main":
        api.create_branch(repo, repo_type=repo_type, branch=remote.revision, exist_ok=True)


def _refuse_other_form(remote: Remote, package: Package, there: Mapping[str, Any]) -> None:
    for form in FORMS:
        if form.repo_type == remote.repo_type and form is not package.form and form.head in there:
            raise ConfigError(
                f"REPO {remote.name}: holds {form.words} ({form.head}), and this is {package.form.words}; give "
                "another repository, or another --revision"
            )


def _license_of(remote: Remote, there: Mapping[str, Any]) -> str | None:
    """The licence in the card of the repository, so that one that was given there stays."""
    from huggingface_hub import RepoCard

    if CARD not in there:
        return None
    with temporary_folder() as folder:
        path = remote.api.hf_hub_download(
            remote.repo, CARD, repo_type=remote.repo_type, revision=remote.revision, local_dir=folder
        )
        try:
            license = RepoCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
        except ValueError:  # no card that can be read: it is replaced
            return None
    return license if isinstance(license, str) else None


def _has(there: "Mapping[str, RepoFile]", item: Item, package: Package) -> bool:
    """Whether the repository has a file with these bytes."""
    found = there.get(item.name)
    if found is None:
        return False
    if found.lfs is not None:
        return found.lfs.sha256 == item.sha256
    if found.size != item.bytes:
        return False
    with package.open(item) as path:
        return _is(found, path.read_bytes())


def _is(found: "RepoFile | None", data: bytes) -> bool:
    return found is not None and found.blob_id == _git_digest(data)


def _git_digest(data: bytes) -> str:
    """The name that git gives a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(package: Package, there: Mapping[str, Any]) -> list[str]:
    """Files of this form in the repository that are no part of it any more."""
    if package.owned is None:
        return []
    wanted = {item.name for item in package.items}
    return sorted(name for name in there if name not in wanted and package.owned.fullmatch(name))


def _upload(
    remote: Remote,
    package: Package,
    missing: Sequence[Item],
    stale: Sequence[str],
    card: bytes,
    there: "Mapping[str, RepoFile]",
) -> str | None:
    """Uploads in commits of some files each; returns the last commit, None if there was nothing to do.

    Where files would be replaced, the head is deleted in the first commit, so that no one takes a mixture for a whole.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = package.form.head
    data = [item for item in missing if item.name != head]
    commit = None
    first: list[CommitOperation] = []
    if head in there and any(item.name in there for item in data):
        first = [CommitOperationDelete(head)]
    for batch in _batches(data):
        with ExitStack() as stack:
            added = [CommitOperationAdd(item.name, stack.enter_context(package.open(item))) for item in batch]
            commit = _commit(remote, [*first, *added], f"Upload {len(added)} files")
            first = []
    last: list[CommitOperation] = [CommitOperationDelete(name) for name in stale]
    if not _is(there.get(CARD), card):
        last.append(CommitOperationAdd(CARD, card))
    package.confirm()
    with ExitStack() as stack:
        for item in package.items:
            if item.name == head and (data or item in missing):
                last.append(CommitOperationAdd(head, stack.enter_context(package.open(item))))
        return _commit(remote, last, f"Upload {package.form.name}") if last else commit


def _commit(remote: Remote, operations: "list[CommitOperation]", message: str) -> str:
    done = remote.api.create_commit(
        remote.repo,
        operations,
        commit_message=message,
        repo_type=remote.repo_type,
        revision=remote.revision,
    )
    return done.oid


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (len(batch) == _COMMIT_FILES or size + item.bytes > _COMMIT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.bytes
    if batch:
        yield batch
