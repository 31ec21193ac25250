"""The part of a store that is exported, as its manifest describes it. Picklable: it travels to the workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imagen_core.store import (
    SAMPLES_GROUP,
    ArrayGroup,
    ColumnType,
    EmbeddingGroup,
    ImageEmbedGroup,
    ImagesGroup,
    Manifest,
    TextGroup,
)
from pipeline.errors import ConfigError
from stages.exports.config import ExportCodec, ExportConfig, FloatDtype, Target

_KEPT_CODECS: dict[Target, tuple[str, ...]] = {
    "mds": ("png", "jpeg"),
    "webdataset": ("png", "jpeg"),
    "parquet": ("png", "jpeg", "webp"),
}
"""Codecs of a store whose files every reader of the target decodes."""
_GroupT = TypeVar("_GroupT", ImagesGroup, TextGroup, ImageEmbedGroup, ArrayGroup)
_Name = TypeVar("_Name", int, str)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is exported.

    Attributes:
        images: groups by size, the largest first.
        texts, image_embeds: groups by the name of the encoder.
        columns: types of the columns that were kept of the source.
    """

    to: Target
    images: dict[int, ImagesGroup]
    texts: dict[str, TextGroup]
    image_embeds: dict[str, ImageEmbedGroup]
    arrays: dict[str, ArrayGroup]
    columns: dict[str, ColumnType]
    codec: ExportCodec | None
    dtype: FloatDtype | None

    @classmethod
    def of(cls, config: ExportConfig, manifest: Manifest) -> "Selection":
        """Raises ConfigError for a size or name that the store lacks."""
        sizes = sorted(_chosen("sizes_px", config.sizes_px, manifest.images), reverse=True)
        return cls(
            config.to,
            {size: manifest.images[size] for size in sizes},
            _named("encoders", config.encoders, manifest.texts),
            _named("image_encoders", config.image_encoders, manifest.image_embeds),
            _named("arrays", config.arrays, manifest.arrays),
            manifest.columns,
            config.codec,
            config.dtype,
        )

    @property
    def groups(self) -> list[str]:
        """Names of the store's groups that are read."""
        chosen = (self.images, self.texts, self.image_embeds, self.arrays)
        return [SAMPLES_GROUP, *(group.name for groups in chosen for group in groups.values())]

    def image_codec(self, group: ImagesGroup) -> str:
        """Codec of the exported images of a group."""
        if self.codec is not None:
            return self.codec
        return group.codec if group.codec in _KEPT_CODECS[self.to] else "png"

    def float_dtype(self, group: EmbeddingGroup) -> FloatDtype:
        """Type of the exported embeddings of a group."""
        return self.dtype or ("float16" if group.dtype == "float16" else "float32")

    def image_name(self, size_px: int, name: str) -> str:
        """`name` for the largest images, `name_64` for others."""
        return name if size_px == next(iter(self.images)) else f"{name}_{size_px}"

    def describe(self) -> dict[str, object]:
        """What the bytes of an export depend on, beside the files of the store."""
        return {
            "to": self.to,
            "images": {str(size): self.image_codec(group) for size, group in self.images.items()},
            "encoders": {name: self._encoder(group) for name, group in self.texts.items()},
            "image_encoders": {name: self._encoder(group) for name, group in self.image_embeds.items()},
            "arrays": {name: dict(group.fingerprint) for name, group in self.arrays.items()},
            "columns": dict(self.columns),
        }

    def _encoder(self, group: EmbeddingGroup) -> dict[str, object]:
        return {"dtype": self.float_dtype(group), "fingerprint": dict(group.fingerprint)}


def _named(field: str, wanted: Sequence[str] | None, groups: Mapping[str, _GroupT]) -> dict[str, _GroupT]:
    return {name: groups[name] for name in _chosen(field, wanted, groups)}


def _chosen(field: str, wanted: Sequence[_Name] | None, present: Mapping[_Name, object]) -> list[_Name]:
    if wanted is None:
        return list(present)
    for name in wanted:
        if name not in present:
            raise ConfigError(f"{field}: {name} is not in the store; it has {list(present)}")
    return [name for name in present if name in wanted]
