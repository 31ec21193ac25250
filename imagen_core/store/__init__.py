"""The store: what precompute writes and the trainer reads."""

from imagen_core.store.cache import DEFAULT_CACHE_BYTES
from imagen_core.store.codec import Codec, check_codec, codec_settings
from imagen_core.store.errors import ManifestError, StoreError
from imagen_core.store.files.null import write_null
from imagen_core.store.files.parquet import SamplesFile, read_samples, write_samples
from imagen_core.store.files.ragged import StoredEmbedding, cast_embedding, is_finite_as, restore
from imagen_core.store.files.shard import (
    ImageWriter,
    embedding_shard_bytes,
    open_image_writer,
    open_images,
    write_embedding_shard,
)
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import (
    MANIFEST_NAME,
    REMOVED,
    RETRIED,
    SAMPLES_GROUP,
    SCHEMA_VERSION,
    ImageInfo,
    SampleRow,
    StoreDtype,
    StoreFormat,
    image_embed_group,
    image_group,
    null_path,
    revision_of,
    shard_path,
    text_group,
)
from imagen_core.store.manifest import Manifest, load_manifest, write_manifest
from imagen_core.store.read.crop import Crop, CropBox, FullImage, Layout, View
from imagen_core.store.records import (
    EmbeddingGroup,
    FileEntry,
    Group,
    ImageEmbedGroup,
    ImagesGroup,
    SamplesGroup,
    ShardEntry,
    TextGroup,
    parse_group,
)
from imagen_core.store.removal.erase import ErasedShard
from imagen_core.store.removal.remove import add_removal, find_rows, matching_rows, removal_entries, rewrite_manifest
from imagen_core.store.removal_log import (
    IDENTIFIERS,
    Blocklist,
    Removal,
    RemovedRow,
    load_removals,
    removed_rows,
    value_digest,
)
from imagen_core.store.similarity import TokenErrors, token_errors
from imagen_core.store.store import Sample, Store
from imagen_core.store.verification.verify import Problem, VerifyReport, verify_store

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "IDENTIFIERS",
    "MANIFEST_NAME",
    "REMOVED",
    "RETRIED",
    "SAMPLES_GROUP",
    "SCHEMA_VERSION",
    "Blocklist",
    "Codec",
    "Crop",
    "CropBox",
    "EmbeddingGroup",
    "ErasedShard",
    "FileEntry",
    "FullImage",
    "Group",
    "ImageEmbedGroup",
    "ImageInfo",
    "ImageWriter",
    "ImagesGroup",
    "Layout",
    "Manifest",
    "ManifestError",
    "Problem",
    "Removal",
    "RemovedRow",
    "Sample",
    "SampleRow",
    "SamplesFile",
    "SamplesGroup",
    "ShardEntry",
    "Store",
    "StoreDtype",
    "StoreError",
    "StoreFolder",
    "StoreFormat",
    "StoredEmbedding",
    "TextGroup",
    "TokenErrors",
    "VerifyReport",
    "View",
    "add_removal",
    "cast_embedding",
    "check_codec",
    "codec_settings",
    "embedding_shard_bytes",
    "find_rows",
    "image_embed_group",
    "image_group",
    "is_finite_as",
    "load_manifest",
    "load_removals",
    "matching_rows",
    "null_path",
    "open_image_writer",
    "open_images",
    "parse_group",
    "read_samples",
    "removal_entries",
    "removed_rows",
    "restore",
    "revision_of",
    "rewrite_manifest",
    "shard_path",
    "text_group",
    "token_errors",
    "value_digest",
    "verify_store",
    "write_embedding_shard",
    "write_manifest",
    "write_null",
    "write_samples",
]
