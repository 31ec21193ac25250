"""What is exported, and how."""

from typing import Literal

from pipeline.options import WorkflowConfig

Target = Literal["mds", "webdataset", "parquet"]
FloatDtype = Literal["float16", "float32"]
ExportCodec = Literal["png", "jpeg"]


class ExportConfig(WorkflowConfig):
    """An export of a store."""

    store: str
    """Store folder or URL, or the run folder around it."""
    to: Target
    """mds: for mosaicml-streaming, with the names of columns that PRX reads; webdataset: tars; parquet: for `datasets`
    and the viewer of the Hugging Face hub."""
    sizes_px: tuple[int, ...] | None = None
    """Sizes of the images; null: all."""
    encoders: tuple[str, ...] | None = None
    """Names of the text encoders; null: all."""
    caption_sets: tuple[str, ...] | None = None
    """Names of the sets of captions; null: all. The first one of the store always goes out."""
    image_encoders: tuple[str, ...] | None = None
    """Names of the image encoders; null: all."""
    arrays: tuple[str, ...] | None = None
    """Names of the arrays; null: all."""
    codec: ExportCodec | None = None
    """Codec of the images. null: PNG and JPEG files of the store unchanged, in parquet WebP files too; others as PNG,
    which is lossless."""
    dtype: FloatDtype | None = None
    """Type of the embeddings. null: float16 for float16; float32, which is exact, for the others."""
