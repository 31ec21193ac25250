"""Names, paths and row types of a store.

    STORE/manifest.json
      samples/00000.parquet            one row per sample: key, captions, url ...
      images-64/00000.(parquet|h5)     uint8 RGB (64, 64, 3) per row, raw or encoded
      text-t5/00000.(parquet|h5)       token embeddings of the shard's distinct captions
      text-t5/null.safetensors         the encoding of ""
      captions-short/00000.parquet     the captions of a further set, one row per sample
      text-t5-short/00000.(...)        token embeddings of the shard's distinct captions of that set
      image-embed-clip/00000.(...)     one embedding per image, (1, dim) per row
      array-mask/00000.(...)           one array per sample, of a dtype and shape that the manifest says
      hashes/00000.parquet             what equal and nearly equal images are recognised by
      removed/00001.json               samples removed from the store (removal_log.py)

Row i of shard s is the same sample in `samples` and in every group of further captions, images, image embeddings,
arrays or hashes. Row j of a text group is the caption with id j; `samples`, or the file of the further set, says which
ids a sample has. Each row of any other file has a digest that binds it to its sample or caption (files/digest.py);
`samples` accounts for every input row.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

StoreFormat = Literal["parquet", "hdf5"]
StoreDtype = Literal["float16", "bfloat16", "float32", "int8"]
ColumnType = Literal["bool", "int", "float", "text"]
"""Of a column of the source that the store keeps: int is 64 bits wide, float is a double."""
ColumnValue = bool | int | float | str | None
"""None: NULL."""

SCHEMA_VERSION = 2
LAYERS_SCHEMA_VERSION = 3  # of a store with layers, or with several scales per token: earlier versions misread it
OLDEST_READABLE = 1  # without input rows and digests: it is read, but cannot be proven
MANIFEST_NAME = "manifest.json"
HUB_FILES = ("README.md", ".gitattributes")  # of a store on the Hugging Face hub, or pulled from there
LOCK_FILES = (".lock", ".lease.json")  # of whoever changes a store without a run around it
SAMPLES_GROUP = "samples"
ORIGINAL_CAPTIONS = "original"  # the set of captions in `samples`, where the source gave it no name
HASHES_GROUP = "hashes"
NULL_TENSOR = "embedding"
RETRIED = "retried"  # drop reason of an input row that a later shard tries again
REMOVED = "removed"  # exclusion reason of a sample that was removed: readers skip it, runs do not store it again
ROW_GROUP_BYTES = 512 * 1024  # size of a parquet row group, the unit of a remote read

_SUFFIXES: dict[str, str] = {"parquet": ".parquet", "hdf5": ".h5"}
_ENCODER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"/\d+\.r([1-9]\d*)\.\w+$")


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample without its pixels and embeddings.

    `captions[k]` is row `caption_ids[k]` of the shard's text groups. `sha256` is the hex digest of
    the original image file; `width` and `height` are pixels of the original after EXIF orientation.
    `input_row` is the row of the shard's input that the sample was made from; -1 in a store of schema 1.
    `transcription` is the text written in the image, "" if there is none, None if unknown.
    `safebox` is the rectangle around that text, which crops keep complete: left, top, right, bottom in pixels of the
    original; None if unknown. `label` is the image's class, from 0; None if unknown. `columns` has the values of the
    columns that were kept of the source, by name.
    """

    key: str
    captions: tuple[str, ...]
    caption_ids: tuple[int, ...]
    url: str | None
    sha256: str
    width: int
    height: int
    input_row: int
    transcription: str | None = None
    safebox: tuple[int, int, int, int] | None = None
    label: int | None = None
    columns: Mapping[str, ColumnValue] = field(default_factory=dict, hash=False)


OWN_COLUMNS = frozenset({*SampleRow.__dataclass_fields__, "digest"})
"""Names that no kept column may have, in lower case."""


def image_group(size_px: int) -> str:
    """Name of the group of images of size_px x size_px pixels."""
    return f"images-{size_px}"


def text_group(encoder: str, caption_set: str | None = None) -> str:
    """Name of the group of one text encoder's embeddings of the captions in `samples`, or of those of a further set.

    Raises:
        ValueError: a name has a character that is not a letter, digit, `.`, `_` or `-`.
    """
    of_set = "" if caption_set is None else f"-{_legal_name(caption_set, 'caption set')}"
    return f"text-{_encoder_name(encoder)}{of_set}"


def captions_group(caption_set: str) -> str:
    """Name of the group of the captions of a further set; raises like `text_group`."""
    return f"captions-{_legal_name(caption_set, 'caption set')}"


def image_embed_group(encoder: str) -> str:
    """Name of the group of one image encoder's embeddings; raises like `text_group`."""
    return f"image-embed-{_encoder_name(encoder)}"


def array_group(name: str) -> str:
    """Name of the group of one array per sample; raises like `text_group`."""
    return f"array-{_legal_name(name, 'array')}"


def _encoder_name(encoder: str) -> str:
    return _legal_name(encoder, "encoder")


def _legal_name(name: str, what: str) -> str:
    if not is_legal_name(name):
        raise ValueError(f"{what} name {name!r}: use letters, digits, '.', '_' and '-' only, a letter or digit first")
    return name


def is_legal_name(name: str) -> bool:
    """Whether a name may be a part of a file name."""
    return _ENCODER_NAME.fullmatch(name) is not None


def shard_name(index: int) -> str:
    """The name of a shard in file names and messages: its index, with at least five digits."""
    return f"{index:05d}"


def file_suffix(store_format: StoreFormat) -> str:
    """Suffix of the files of images and embeddings, `.parquet` or `.h5`."""
    return _SUFFIXES[check_format(store_format)]


def shard_path(group: str, index: int, store_format: StoreFormat = "parquet", revision: int = 0) -> str:
    """Path of one shard's file of a group, relative to the store: `images-64/00007.h5`.

    A file that was rewritten without removed samples has a new name, `images-64/00007.r2.h5`, so that the manifest
    switches from all previous files to all new ones at once: `revision` is the number of removals it accounts for.

    Raises:
        ValueError: an unknown format.
    """
    mark = f".r{revision}" if revision else ""
    return f"{group}/{shard_name(index)}{mark}{file_suffix(store_format)}"


def revision_of(path: str) -> int:
    """The revision in a path made by `shard_path`; 0 for a file that was never rewritten."""
    found = _REVISION.search(path)
    return int(found[1]) if found else 0


def layer_suffixes(layers: Sequence[int]) -> list[str]:
    """Ends of the names of the columns or datasets that hold the layers of embeddings; one "" without layers."""
    return [f"_{layer}" for layer in layers] or [""]


def null_path(encoder: str) -> str:
    """Path of an encoder's null embedding, relative to the store."""
    return f"{text_group(encoder)}/null.safetensors"


def probe_path(encoder: str) -> str:
    """Path of a text encoder's probe, relative to the store."""
    return f"{text_group(encoder)}/probe.json"


def check_format(store_format: str) -> StoreFormat:
    """Returns the format; raises ValueError with the available ones if it is none of them."""
    if store_format not in get_args(StoreFormat):
        raise ValueError(f"store format {store_format!r}: use one of {', '.join(get_args(StoreFormat))}")
    return store_format  # type: ignore[return-value]


def check_dtype(dtype: str) -> StoreDtype:
    """Returns the dtype; raises ValueError with the available ones if it is none of them."""
    if dtype not in get_args(StoreDtype):
        raise ValueError(f"store dtype {dtype!r}: use one of {', '.join(get_args(StoreDtype))}")
    return dtype  # type: ignore[return-value]


def check_column_type(kind: str) -> ColumnType:
    """Returns the type of a kept column; raises ValueError with the available ones if it is none of them."""
    if kind not in get_args(ColumnType):
        raise ValueError(f"column type {kind!r}: use one of {', '.join(get_args(ColumnType))}")
    return kind  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What a crop needs to know about an original image; the fields are those of `SampleRow`."""

    width: int
    height: int
    transcription: str | None = None
    safebox: tuple[int, int, int, int] | None = None

    @property
    def shows_text(self) -> bool:
        """Whether the image is known to show text: by its transcription, or by a safebox if that is unknown."""
        return bool(self.transcription) or (self.transcription is None and self.safebox is not None)
