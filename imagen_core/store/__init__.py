"""The store: what precompute writes and the trainer reads."""

from imagen_core.store.cache import DEFAULT_CACHE_BYTES
from imagen_core.store.codec import Codec, check_codec, codec_settings
from imagen_core.store.crop import Crop
from imagen_core.store.errors import ManifestError, StoreError
from imagen_core.store.layout import (
    MANIFEST_NAME,
    RETRIED,
    SAMPLES_GROUP,
    SCHEMA_VERSION,
    SampleRow,
    StoreDtype,
    StoreFormat,
    image_embed_group,
    image_group,
    null_path,
    shard_path,
    text_group,
)
from imagen_core.store.manifest import Manifest, load_manifest, write_manifest
from imagen_core.store.null import write_null
from imagen_core.store.parquet import read_samples, write_samples
from imagen_core.store.ragged import Stored, cast_embedding, is_finite_as, restore
from imagen_core.store.reader import Sample, Store
from imagen_core.store.records import (
    EmbeddingGroup,
    FileEntry,
    ImageEmbedGroup,
    ImagesGroup,
    SamplesGroup,
    ShardEntry,
    TextGroup,
)
from imagen_core.store.shard import ImageWriter, open_image_writer, open_images, text_shard_bytes, write_text_shard
from imagen_core.store.similarity import TokenErrors, token_errors
from imagen_core.store.verify import Problem, VerifyReport, verify_store

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "MANIFEST_NAME",
    "RETRIED",
    "SAMPLES_GROUP",
    "SCHEMA_VERSION",
    "Codec",
    "Crop",
    "EmbeddingGroup",
    "FileEntry",
    "ImageEmbedGroup",
    "ImageWriter",
    "ImagesGroup",
    "Manifest",
    "ManifestError",
    "Problem",
    "Sample",
    "SampleRow",
    "SamplesGroup",
    "ShardEntry",
    "Store",
    "StoreDtype",
    "StoreError",
    "StoreFormat",
    "Stored",
    "TextGroup",
    "TokenErrors",
    "VerifyReport",
    "cast_embedding",
    "check_codec",
    "codec_settings",
    "image_embed_group",
    "image_group",
    "is_finite_as",
    "load_manifest",
    "null_path",
    "open_image_writer",
    "open_images",
    "read_samples",
    "restore",
    "shard_path",
    "text_group",
    "text_shard_bytes",
    "token_errors",
    "verify_store",
    "write_manifest",
    "write_null",
    "write_samples",
    "write_text_shard",
]
