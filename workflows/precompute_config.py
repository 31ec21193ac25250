"""The configuration of precompute."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagen_core.store import ORIGINAL_CAPTIONS, text_group
from pipeline.config import Config
from pipeline.options import WorkflowConfig
from stages.arrays.registry import AnyArrayStage
from stages.captioners.registry import AnyCaptioner
from stages.duplicates.config import DuplicatesConfig
from stages.encoders.given import PrecomputedEmbeddingsConfig
from stages.encoders.registry import AnyImageEmbedding, AnyTextEmbedding
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL
from stages.filters.registry import ALWAYS, AnyFilters
from stages.precompute.images_config import ImagesConfig
from stages.sources.annotations import AnnotationsConfig
from stages.sources.mds.source import MdsConfig
from stages.sources.parquet import ParquetConfig
from stages.sources.registry import AnySource
from stages.sources.synthetic.source import SyntheticConfig


class StoreConfig(Config):
    """The files of the store."""

    format: Literal["parquet", "hdf5"] = "parquet"
    """hdf5 is the fastest to read at random on a local disk; parquet is read everywhere."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Type of the stored embeddings; int8 keeps one scale per token."""
    min_cosine: float = Field(default=0.99, ge=0, lt=1)
    """int8 only: a caption is dropped (`quantisation_error`) if a token's cosine similarity to its float32 embedding
    is less."""


class PrecomputeConfig(WorkflowConfig):
    """The configuration of a precompute run."""

    source: AnySource = SyntheticConfig()
    """The source of the samples."""
    shard_size: int = Field(default=1000, ge=1)
    """Input rows per shard, the unit of work, retry and resume."""
    images: ImagesConfig = ImagesConfig()
    """The images to store."""
    filters: AnyFilters = ALWAYS
    """Rules that drop rows, in this order; max_pixels and too_small are applied first, with their defaults unless they
    are named."""
    captioners: tuple[AnyCaptioner, ...] = ()
    """Models that write captions; each makes a set of captions of its name, which all encoders encode, and can be
    added later."""
    encoders: tuple[AnyTextEmbedding, ...] = (T5EncoderConfig(name="t5", model=TINY_MODEL),)
    """Text encoders; each makes its own group, and can be added later."""
    image_encoders: tuple[AnyImageEmbedding, ...] = ()
    """Image encoders; each encodes the images of a stored size, and makes its own group, or with kind=auto arrays of
    patch features."""
    stages: tuple[AnyArrayStage, ...] = ()
    """Stages that add arrays to the store (scores, masks, latents), in this order; each can be added later. All but
    `clip_score` are of other packages."""
    store: StoreConfig = StoreConfig()
    """The files of the store."""
    duplicates: DuplicatesConfig | None = None
    """Equal images and near duplicates of the whole store: report or drop; or with settings. null: not looked for."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The run ends with exit code 3 if a larger fraction of the input is dropped."""
    keep_originals: bool = False
    """Keep the fetched originals as webdataset tars in RUN/staging/originals (needed to add sizes later
    without fetching again)."""

    @field_validator("encoders", "image_encoders")
    @classmethod
    def _check_names(
        cls, encoders: tuple[AnyTextEmbedding | AnyImageEmbedding, ...]
    ) -> tuple[AnyTextEmbedding | AnyImageEmbedding, ...]:
        names = [encoder.name for encoder in encoders]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two encoders are named {twice[0]!r}; give each its own name")
        return encoders

    @model_validator(mode="after")
    def _check_caption_sets(self) -> Self:
        source, encoders = self.source, [encoder.name for encoder in self.encoders]
        columns = source.captions if isinstance(source, AnnotationsConfig) else ()
        taken = [each.called for each in columns] or [ORIGINAL_CAPTIONS]
        for captioner in self.captioners:
            if captioner.name in (*taken, ORIGINAL_CAPTIONS):
                raise ValueError(f"captioners: there is another set of captions {captioner.name!r}; name it otherwise")
            taken.append(captioner.name)
        further = (*columns[1:], *self.captioners)
        made = [(name, None) for name in encoders] + [(name, c.called) for name in encoders for c in further]
        groups = [text_group(*each) for each in made]
        for place, (encoder, caption_set) in enumerate(made):
            if groups[place] in groups[:place]:
                raise ValueError(
                    f"captions: the set {caption_set!r} by the encoder {encoder!r} makes {groups[place]}, as "
                    "another encoder or set does; name one of them otherwise"
                )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        source = self.source
        if self.images.sizes_px and isinstance(source, ParquetConfig | MdsConfig) and source.image_column is None:
            raise ValueError(
                f"source.image_column is null, so there are no images, but images.sizes_px is "
                f"{list(self.images.sizes_px)}; set images.sizes_px=[]"
            )
        if self.duplicates is not None and not self.images.sizes_px:
            raise ValueError("duplicates: there are no images to compare, as images.sizes_px is []; leave it out")
        for encoder in self.image_encoders:
            if isinstance(encoder, PrecomputedEmbeddingsConfig):
                if encoder.null is not None:
                    raise ValueError(
                        f"image_encoders.{encoder.name}.null: only captions have an empty one; leave it out"
                    )
            elif encoder.from_px not in self.images.sizes_px:
                raise ValueError(
                    f"image_encoders.{encoder.name}.from_px is {encoder.from_px}, but images.sizes_px is "
                    f"{list(self.images.sizes_px)}; add the size, or choose one of these"
                )
        return self
