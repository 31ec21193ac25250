"""The part of a store that is exported, as its manifest describes it. Picklable: it travels to the workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imagen_core.store import (
    SAMPLES_GROUP,
    ArrayGroup,
    CaptionsGroup,
    ColumnType,
    EmbeddingGroup,
    ImageEmbedGroup,
    ImagesGroup,
    Manifest,
    SetTextGroup,
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
_GroupT = TypeVar("_GroupT", ImagesGroup, TextGroup, CaptionsGroup, ImageEmbedGroup, ArrayGroup)
_Name = TypeVar("_Name", int, str)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is exported.

    Attributes:
        images: groups by size, the largest first.
        texts, image_embeds: groups by the name of the encoder.
        caption_sets: captions of further sets, by the set's name.
        set_texts: their embeddings by the encoders of `texts`, by encoder and set.
        columns: types of the columns that were kept of the source.
    """

    to: Target
    images: dict[int, ImagesGroup]
    texts: dict[str, TextGroup]
    caption_sets: dict[str, CaptionsGroup]
    set_texts: dict[tuple[str, str], SetTextGroup]
    image_embeds: dict[str, ImageEmbedGroup]
    arrays: dict[str, ArrayGroup]
    columns: dict[str, ColumnType]
    codec: ExportCodec | None
    dtype: FloatDtype | None

    @classmethod
    def of(cls, config: ExportConfig, manifest: Manifest) -> "Selection":
        """Raises ConfigError for a size or name that the store lacks."""
        sizes = sorted(_chosen("sizes_px", config.sizes_px, manifest.images), reverse=True)
        texts = _named("encoders", config.encoders, manifest.texts)
        first = next((str(each["name"]) for each in manifest.header.get("captions", ())), None)
        wanted = config.caption_sets and [name for name in config.caption_sets if name != first]
        sets = _named("caption_sets", wanted, manifest.captions)
        set_texts = {of: group for of, group in manifest.set_texts.items() if of[0] in texts and of[1] in sets}
        _check_set_names(config.to, list(texts), list(sets), list(set_texts))
        return cls(
            config.to,
            {size: manifest.images[size] for size in sizes},
            texts,
            sets,
            set_texts,
            _named("image_encoders", config.image_encoders, manifest.image_embeds),
            _named("arrays", config.arrays, manifest.arrays),
            manifest.columns,
            config.codec,
            config.dtype,
        )

    @property
    def groups(self) -> list[str]:
        """Names of the store's groups that are read."""
        chosen = (self.images, self.texts, self.caption_sets, self.set_texts, self.image_embeds, self.arrays)
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

    def encoders_of(self, caption_set: str) -> list[str]:
        """Names of the encoders whose embeddings of a further set are exported."""
        return [encoder for encoder, name in self.set_texts if name == caption_set]

    def describe(self) -> dict[str, object]:
        """What the bytes of an export depend on, beside the files of the store."""
        return {
            "to": self.to,
            "images": {str(size): self.image_codec(group) for size, group in self.images.items()},
            "encoders": {name: self._encoder(group) for name, group in self.texts.items()},
            "image_encoders": {name: self._encoder(group) for name, group in self.image_embeds.items()},
            "arrays": {name: dict(group.fingerprint) for name, group in self.arrays.items()},
            "columns": dict(self.columns),
            **(
                {"caption_sets": {name: self._caption_set(name) for name in self.caption_sets}}
                if self.caption_sets
                else {}
            ),
        }

    def _caption_set(self, name: str) -> dict[str, object]:
        return {encoder: self._encoder(self.set_texts[encoder, name]) for encoder in self.encoders_of(name)}

    def _encoder(self, group: EmbeddingGroup) -> dict[str, object]:
        return {"dtype": self.float_dtype(group), "fingerprint": dict(group.fingerprint)}


def _check_set_names(to: Target, encoders: list[str], sets: list[str], texts: list[tuple[str, str]]) -> None:
    """Raises ConfigError if a column of a further set would have the name of another one."""
    for name in sets:
        stem, _, number = name.rpartition("_")
        of_set = [encoder + "_" + name for encoder, of in texts if of == name]
        others = [*encoders, *(f"{encoder}_{of}" for encoder, of in texts if of != name)]
        if (to == "mds" and number.isdecimal() and stem in ("", *sets)) or (
            to == "parquet" and not set(others).isdisjoint(of_set)
        ):
            rest = ", ".join(other for other in sets if other != name)
            raise ConfigError(
                f"caption_sets: a column of {name} would have the name of another one; leave the set out with "
                f"`pipeline run export` and caption_sets=[{rest}], or take another --to"
            )


def _named(field: str, wanted: Sequence[str] | None, groups: Mapping[str, _GroupT]) -> dict[str, _GroupT]:
    return {name: groups[name] for name in _chosen(field, wanted, groups)}


def _chosen(field: str, wanted: Sequence[_Name] | None, present: Mapping[_Name, object]) -> list[_Name]:
    if wanted is None:
        return list(present)
    for name in wanted:
        if name not in present:
            raise ConfigError(f"{field}: {name} is not in the store; it has {list(present)}")
    return [name for name in present if name in wanted]
