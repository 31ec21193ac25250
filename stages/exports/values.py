"""The fields of a sample beside its images and embeddings."""

from typing import Any

from stages.exports.samples import ExportSample

ANNOTATIONS = ("transcription", "safebox", "label")


def fields_of(sample: ExportSample) -> dict[str, Any]:
    """As JSON: key, captions, url, sha256, width and height, the annotations that are known, and the kept columns.

    Captions of further sets are under `caption_sets`, columns of the source under `columns`.
    """
    row = sample.row
    known = {name: value for name in ANNOTATIONS if (value := getattr(row, name)) is not None}
    fields = {"key": row.key, "captions": list(row.captions), "url": row.url, "sha256": row.sha256}
    columns = {"columns": dict(row.columns)} if row.columns else {}
    sets = {"caption_sets": sample.caption_sets} if sample.caption_sets else {}
    return {**fields, **sets, "width": row.width, "height": row.height, **known, **columns}
