"""Images that a table names by the paths of their files, as `Dataset.to_parquet` does."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from stages.sources.records.cells import BadCell
from stages.sources.tree import Tree


def read_image_file(name: str, folders: Sequence[str]) -> bytes:
    """The bytes of a file below one of `folders`; the name is relative to it or absolute.

    Raises:
        BadCell: the name leads out of the folders (`unsafe_path`), or there is no such file, or it cannot be read.
    """
    path = PurePosixPath(name)
    is_inside = False
    for tree in map(Tree, folders):
        root = tree.url.removeprefix("file://")
        below = path.relative_to(root) if path.is_absolute() and path.is_relative_to(root) else path
        if below.is_absolute() or ".." in below.parts or "\0" in name or "://" in name:
            continue
        is_inside = True
        content = next(tree.read([[str(below)]]))
        if isinstance(content, bytes):
            return content
        if not isinstance(content, FileNotFoundError):
            raise BadCell("unreadable_file", content.strerror or str(content))
    if is_inside:
        raise BadCell("missing_file", f"{name} is not found below {folders[0]}")
    raise BadCell("unsafe_path", f"{name} is not below {folders[-1]}; source.image_folder may name another folder")
