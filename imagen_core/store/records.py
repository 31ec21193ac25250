"""The typed parts of a manifest, and the checks that turn JSON into them."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from imagen_core.store.array_spec import ArraySpec
from imagen_core.store.buckets import Shape, choose_shape
from imagen_core.store.codec import Codec, check_codec
from imagen_core.store.encoder_identity import PROBE
from imagen_core.store.layout import (
    HASHES_GROUP,
    LAYERS_SCHEMA_VERSION,
    ORIGINAL_CAPTIONS,
    REMOVED,
    SAMPLES_GROUP,
    SCHEMA_VERSION,
    ColumnType,
    StoreDtype,
    StoreFormat,
    array_group,
    captions_group,
    check_column_type,
    check_dtype,
    check_format,
    image_embed_group,
    image_group,
    is_legal_name,
    null_path,
    probe_path,
    revision_of,
    shard_path,
    text_group,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SamplesGroup:
    """`samples`: always parquet; `columns` are the types of the columns that were kept of the source."""

    name: str
    format: StoreFormat = "parquet"
    columns: dict[str, ColumnType] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImagesGroup:
    """Images of one size; `config` says how they were made.

    `shapes` are the height and width of each aspect-ratio bucket, as in `config`: an image has the shape of the bucket
    that `choose_buckets` names for its original's width and height, in every size of the store. It is empty where all
    images are squares of `size_px`.
    """

    name: str
    size_px: int
    format: StoreFormat
    codec: Codec
    config: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ()

    def shape_of(self, width: int, height: int) -> Shape:
        """Height and width that the image of an original of this width and height has; the square if they are 0."""
        return choose_shape(width, height, self.shapes) if self.shapes else (self.size_px, self.size_px)


@dataclass(frozen=True, slots=True)
class HashesGroup:
    """Hashes of images, by which duplicates are found; always parquet. See `ImageHashes` for the sizes."""

    name: str
    num_perceptual: int
    thumbnail_px: int
    format: StoreFormat = "parquet"

    @property
    def num_bytes(self) -> int:
        """Bytes of each row, with its digest."""
        return 32 + self.num_perceptual * 8 + self.thumbnail_px**2 * 3 + 8


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the store; `sha256` is lowercase hex of its bytes."""

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class EmbeddingGroup:
    """Embeddings by one encoder; `fingerprint` identifies its weights, tokenizer and settings.

    `layers` are the numbers of the encoder's layers that each token has `dim` values of, stored apart: a row is
    (n_tokens, layers, dim). It is empty where a row is (n_tokens, dim). `num_scales` is the number of equal parts of a
    token's `dim` values that have an int8 scale each.
    """

    name: str
    encoder: str
    dim: int
    dtype: StoreDtype
    format: StoreFormat
    fingerprint: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    num_scales: int = 1

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of what a row has of one token: (dim,) or (layers, dim)."""
        return (len(self.layers), self.dim) if self.layers else (self.dim,)

    def layer_places(self, layers: Sequence[int] | None) -> list[int]:
        """Where layers are in a row's axis of layers; None means all.

        Raises:
            ValueError: one is not stored, or there are no layers.
        """
        wanted = self.layers if layers is None else layers
        unknown = [layer for layer in wanted if layer not in self.layers]
        if unknown or not wanted:
            has = f"it has the layers {list(self.layers)}" if self.layers else "its layers are not stored apart"
            raise ValueError(f"{self.name}: layers {list(wanted)} cannot be read; {has}")
        return [self.layers.index(layer) for layer in wanted]


@dataclass(frozen=True, slots=True)
class TextGroup(EmbeddingGroup):
    """Embeddings of captions, one row per distinct caption.

    `null` is the file with the encoding of "", with rows = 1; None if the encoder has none. `probe` is the file with
    what the encoder made of a few fixed captions; None if the version that wrote the store recorded none.
    """

    null: FileEntry | None = None
    probe: FileEntry | None = None


@dataclass(frozen=True, slots=True)
class CaptionsGroup:
    """The captions of a further set, one row per sample, which may have none; always parquet. `made_by` says where
    they come from."""

    name: str
    caption_set: str
    made_by: dict[str, Any] = field(default_factory=dict)
    format: StoreFormat = "parquet"


@dataclass(frozen=True, slots=True)
class SetTextGroup(EmbeddingGroup):
    """Embeddings of the captions of a further set, one row per distinct caption; without tokens where a caption could
    not be encoded."""

    caption_set: str = ""


@dataclass(frozen=True, slots=True)
class ImageEmbedGroup(EmbeddingGroup):
    """Embeddings of images, one (1, dim) row per sample."""


@dataclass(frozen=True, slots=True)
class ArrayGroup:
    """One array per sample, such as a score, a mask or latents; `fingerprint` identifies what made them."""

    name: str
    array: str
    spec: ArraySpec
    format: StoreFormat
    fingerprint: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OtherGroup:
    """A group of a kind that a later version added, one row per sample: readers leave it alone."""

    name: str
    kind: str
    format: StoreFormat


Group = (
    SamplesGroup
    | CaptionsGroup
    | ImagesGroup
    | TextGroup
    | SetTextGroup
    | ImageEmbedGroup
    | ArrayGroup
    | HashesGroup
    | OtherGroup
)


_GroupT = TypeVar("_GroupT", ImagesGroup, TextGroup, ImageEmbedGroup, ArrayGroup, CaptionsGroup)


def groups_by(groups: Mapping[str, Group], kind: type[_GroupT], field: str) -> dict[Any, _GroupT]:
    """The groups of one kind by the value of a field, sorted."""
    found = {getattr(group, field): group for group in groups.values() if isinstance(group, kind)}
    return dict(sorted(found.items()))


def caption_weights(listed: Any, further: Collection[str]) -> dict[str, float]:
    """The weight of each set of captions that a store has, by name, that of `samples` first.

    Args:
        listed: the header's "captions": name and weight of each set of the source, that of `samples` first.
        further: the further sets that the store has. Those that are not listed, as the source has them no longer, have
            the weight 0.
    Raises:
        ValueError: `listed` is not valid.
    """
    try:
        named = {str(entry["name"]): float(entry["weight"]) for entry in listed}
        if not all(0 <= weight < math.inf for weight in named.values()):
            raise ValueError("weights must be finite and 0 or more")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"captions must be a list of name and weight of each set ({error}; got {listed!r})"
        ) from error
    first = next(iter(named), ORIGINAL_CAPTIONS)
    found = {first: named.get(first, 1.0)}
    found |= {name: weight for name, weight in named.items() if name in further}
    found |= {name: 0.0 for name in further if name not in found}
    return found if any(found.values()) else {**found, first: 1.0}


def null_files(groups: Mapping[str, Group]) -> list[FileEntry]:
    """The null embeddings of the text groups that have one."""
    return [group.null for group in groups.values() if isinstance(group, TextGroup) and group.null]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: `rows` includes the excluded ones, `files` has one entry per group.

    A shard without rows may have no files. `excluded` has the reason of each excluded row, by increasing row.
    `retry_of` is set if the shard's input rows were tried before: the (shard index, input row) of each.
    """

    index: int
    rows: int
    files: dict[str, FileEntry]
    excluded: dict[int, str] = field(default_factory=dict)
    retry_of: tuple[tuple[int, int], ...] = ()


def parse_group(name: str, raw: Any) -> Group:
    """A group from its entry in the header's "groups".

    Raises:
        ValueError: the entry is not valid; the message names the group.
    """
    try:
        kind = raw["kind"]
        if kind == "samples":
            columns: dict[str, ColumnType] = {
                str(column): check_column_type(found) for column, found in raw.get("columns", {}).items()
            }
            group: Group = SamplesGroup(name, columns=columns)
            expected_name = SAMPLES_GROUP
        elif kind == "images":
            size_px = _count(raw["size_px"], "size_px")
            config = dict(raw.get("config", {}))
            if size_px < 1:
                raise ValueError(f"size_px must be 1 or more (got {size_px})")
            shapes = _shapes(config.get("shapes"), size_px)
            group = ImagesGroup(name, size_px, check_format(raw["format"]), check_codec(raw["codec"]), config, shapes)
            expected_name = image_group(size_px)
        elif kind == "text":
            encoder = str(raw["encoder"])
            null = _shared_file(raw.get("null"), null_path(encoder))
            probe = _shared_file(raw.get(PROBE), probe_path(encoder))
            group = TextGroup(name, encoder, **_embeddings(raw), null=null, probe=probe)
            expected_name = text_group(encoder)
        elif kind == "captions":
            group = CaptionsGroup(name, str(raw["set"]), dict(raw.get("made_by", {})))
            expected_name = captions_group(group.caption_set)
        elif kind == "set_text":
            group = SetTextGroup(name, str(raw["encoder"]), **_embeddings(raw), caption_set=str(raw["set"]))
            expected_name = text_group(group.encoder, group.caption_set)
        elif kind == "image_embeds":
            group = ImageEmbedGroup(name, str(raw["encoder"]), **_embeddings(raw))
            expected_name = image_embed_group(group.encoder)
        elif kind == "array":
            spec, maker = ArraySpec.of(raw["dtype"], raw["shape"]), dict(raw.get("fingerprint", {}))
            group = ArrayGroup(name, str(raw["array"]), spec, check_format(raw["format"]), maker)
            expected_name = array_group(group.array)
        elif kind == "hashes":
            num_perceptual, thumbnail_px = (_count(raw[field], field) for field in ("num_perceptual", "thumbnail_px"))
            group = HashesGroup(name, num_perceptual, thumbnail_px)
            expected_name = HASHES_GROUP
        else:
            group, expected_name = OtherGroup(name, str(kind), check_format(raw["format"])), name
            if not is_legal_name(name) or name == REMOVED:
                raise ValueError("use letters, digits, '.', '_' and '-' only")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"group {name!r}: missing or wrong field {error}") from error
    except ValueError as error:
        raise ValueError(f"group {name!r}: {error}") from error
    if name != expected_name:
        raise ValueError(f"group {name!r} must be named {expected_name!r}")
    return group


def _shared_file(raw: dict[str, Any] | None, path: str) -> FileEntry | None:
    return None if raw is None else _parse_file({"rows": 1, **raw}, path)


def _shapes(raw: Any, size_px: int) -> tuple[Shape, ...]:
    """Shapes of buckets from the lists of a manifest; none where all images are squares."""
    if raw is None:
        return ()
    shapes = tuple((_count(height, "shapes"), _count(width, "shapes")) for height, width in raw)
    if (size_px, size_px) not in shapes or len(set(shapes)) < len(shapes) or min(map(min, shapes)) < 1:
        raise ValueError(f"shapes must be different heights and widths, with {size_px} x {size_px} (got {raw})")
    return shapes


def _embeddings(raw: dict[str, Any]) -> dict[str, Any]:
    dim, dtype = _count(raw["dim"], "dim"), check_dtype(raw["dtype"])
    layers = tuple(_count(layer, "layers") for layer in raw.get("layers", ()))
    num_scales = _count(raw.get("num_scales", 1), "num_scales")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must differ (got {list(layers)})")
    if num_scales != 1 and (dtype != "int8" or layers or num_scales < 1 or dim % num_scales):
        raise ValueError(f"num_scales is {num_scales}, which needs int8 without layers, and a dim that it divides")
    return {
        "dim": dim,
        "dtype": dtype,
        "format": check_format(raw["format"]),
        "fingerprint": dict(raw.get("fingerprint", {})),
        "layers": layers,
        "num_scales": num_scales,
    }


def schema_version(groups: Mapping[str, Group]) -> int:
    """The schema version that a store of these groups has: the lowest whose readers know all of it."""
    embeddings = [group for group in groups.values() if isinstance(group, EmbeddingGroup)]
    has_layers = any(group.layers or group.num_scales > 1 for group in embeddings)
    return LAYERS_SCHEMA_VERSION if has_layers else SCHEMA_VERSION


def parse_shard(raw: Any, groups: dict[str, Group]) -> ShardEntry:
    """A shard from its entry, checked against the groups.

    Raises:
        ValueError: the entry is not valid; the message names the shard's index.
    """
    index = raw.get("index") if isinstance(raw, dict) else None
    try:
        index = _count(raw["index"], "index")
        rows = _count(raw["rows"], "rows")
        excluded = _parse_excluded(raw.get("excluded", {}), rows)
        retry_of = tuple((_count(of, "retry_of"), _count(row, "retry_of")) for of, row in raw.get("retry_of", ()))
        files = {
            name: _parse_file(entry, shard_path(name, index, group.format, revision_of(entry["path"])))
            for name, group in groups.items()
            if (entry := raw["files"][name] if rows else raw["files"].get(name)) is not None
        }
        if unknown := set(raw["files"]) - set(groups):
            raise ValueError(f"files of unknown groups {sorted(unknown)}")
        for name, entry in files.items():
            if not isinstance(groups[name], TextGroup | SetTextGroup) and entry.rows != rows:
                raise ValueError(f"{entry.path} has {entry.rows} rows, the shard has {rows}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"shard {index}: missing or wrong field {error}") from error
    except ValueError as error:
        raise ValueError(f"shard {index}: {error}") from error
    return ShardEntry(index, rows, files, excluded, retry_of)


def _parse_excluded(raw: Any, rows: int) -> dict[int, str]:
    """Row -> reason, from reason -> rows; schema 1 has rows only."""
    by_reason: dict[str, list[int]] = {"unrecorded": raw} if isinstance(raw, list) else raw
    pairs = sorted((_count(row, "excluded"), reason) for reason, listed in by_reason.items() for row in listed)
    excluded = dict(pairs)
    if len(excluded) < len(pairs) or (pairs and pairs[-1][0] >= rows):
        raise ValueError(f"excluded rows {[row for row, _ in pairs][:10]} must differ and be below rows ({rows})")
    return excluded


def _parse_file(raw: dict[str, Any], expected_path: str) -> FileEntry:
    if raw["path"] != expected_path:
        raise ValueError(f"path {raw['path']!r} should be {expected_path!r}")
    if not _SHA256.fullmatch(raw["sha256"]):
        raise ValueError(f"{expected_path}: sha256 {raw['sha256']!r} is not 64 lowercase hex digits")
    size_bytes, rows = _count(raw["bytes"], "bytes"), _count(raw["rows"], "rows")
    return FileEntry(expected_path, size_bytes, raw["sha256"], rows)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be an integer of 0 or more (got {value!r})")
    return value
