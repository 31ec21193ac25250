"""The fields of a sample beside its images and embeddings."""

from typing import Any

from imagen_core.store import SampleRow

ANNOTATIONS = ("transcription", "safebox", "label")


def fields_of(row: SampleRow) -> dict[str, Any]:
    """As JSON: key, captions, url, sha256, width and height, the annotations that are known, and the kept columns.

    Columns of the source are under `columns`.
    """
    known = {name: value for name in ANNOTATIONS if (value := getattr(row, name)) is not None}
    fields = {"key": row.key, "captions": list(row.captions), "url": row.url, "sha256": row.sha256}
    columns = {"columns": dict(row.columns)} if row.columns else {}
    return {**fields, "width": row.width, "height": row.height, **known, **columns}
