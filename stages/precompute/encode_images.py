"""Encodes the stored images of a shard with one frozen image encoder, to a vector each or to one of each patch."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np

from imagen_core.store import (
    MIRRORED,
    ArraySpec,
    ImagesGroup,
    NotFiniteError,
    Sample,
    StoreDtype,
    StoreFormat,
    array_shard_bytes,
    cast_embedding,
    embedding_shard_bytes,
    feature_specs,
    image_group,
    open_images,
    read_samples,
    stored_features,
)
from pipeline.executors.local_worker import call_warm
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.arrays.base import ArrayStageConfig, MakeArrays
from stages.encoders.base import ImageEncoderConfig
from stages.encoders.encoder import ImageEncoder, load_encoder
from stages.encoders.identity import identity_to_keep
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.patches.encoder import load_patch_encoder
from stages.filters.base import Rejection
from stages.precompute.embedding_files import EmbeddingFiles
from stages.precompute.fetch import SAMPLES
from stages.precompute.images_config import ImagesConfig
from stages.precompute.make_arrays import ArrayStage
from stages.precompute.quantisation import cast_for_store, int8_errors


class EncodeImagesStage(Stage):
    """`images-SIZE` -> `image-embed-NAME`: one embedding per row. Workers keep the model."""

    identity = "EncodePicturesStage"

    def __init__(
        self,
        encoder: ImageEncoderConfig,
        images: ImagesConfig,
        store_format: StoreFormat,
        dtype: StoreDtype,
        *,
        started: Mapping[str, object] | None = None,
    ):
        """`started`: what the run folder's group was started with, if it was."""
        identity = call_warm(encoder.identify)
        fingerprint = identity_to_keep(identity.fingerprint, started)
        self.encoder = encoder.pinned(identity)
        stored_as: StoreDtype = "float16" if dtype == "int8" else dtype  # one vector per image: nothing to save
        self.files = EmbeddingFiles("image_embeds", encoder.name, identity.dim, stored_as, store_format, fingerprint)
        size = encoder.from_px
        self.images = ImagesGroup(
            image_group(size), size, store_format, images.codec_of(size), shapes=images.shapes(size)
        )
        self.name = f"encode-images-{encoder.name}"
        self.inputs = (SAMPLES, self.images.name)
        self.max_workers = encoder.workers or 0
        self.modules = encoder.modules
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        self.groups = (Group(self.files.group, self.files.config()),)
        self._model: ImageEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        self.encoder.check_unchanged(self.files.fingerprint)
        self._model = load_encoder(self.encoder, self.encoder.threads())

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        path = task.input(self.images.name)
        images = open_images(str(path), str(path), self.images)
        encoded = self._model.encode(images.pixels(row) for row in range(images.num_rows))
        embeddings, bad, _ = cast_for_store(encoded.embeddings, self.files.dtype, 0.0, self.files.blank)
        drops = [Drop(row, samples[row].key, *bad[row]) for row in bad]
        self.files.write(task, embeddings, [sample.key for sample in samples])
        counters = {"images_encoded": len(embeddings), **encoded.oom_counter()}
        info = {"excluded_rows": rows_by_reason(drops)}
        task.done(self.files.group, GroupResult(len(samples), drops, counters, info))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return embedding_shard_bytes([1] * num_rows, self.files.dim, self.files.dtype)


class PatchArrays(ArrayStageConfig):
    """The arrays of an encoder of patches, as `ArrayStage` makes them."""

    kind: Literal["patches"] = "patches"
    encoder: PatchEncoderConfig
    identity: dict[str, Any]
    """The encoder's fingerprint."""
    dim: int
    patch_px: int
    shapes: tuple[tuple[int, int], ...]
    """Height and width of the images of each aspect-ratio bucket; one of squares."""
    min_cosine: float

    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the patches, of each shape."""
        return [self.encoder.grid(shape, self.patch_px) for shape in self.shapes]

    def specs(self, grid: tuple[int | None, int | None]) -> dict[str, ArraySpec]:
        """The arrays if the patches of all images have this grid."""
        encoder = self.encoder
        return feature_specs(encoder.name, encoder.dtype, grid, self.dim, mirrored=encoder.mirrored)

    def arrays(self) -> Mapping[str, ArraySpec]:
        return self.specs(self.grids()[0] if len(self.shapes) == 1 else (None, None))

    def reads(self) -> tuple[str, ...]:
        return (image_group(self.encoder.from_px),)

    def fingerprint(self) -> dict[str, object]:
        return self.identity

    def resources(self) -> Resources:
        return Resources(self.encoder.num_cpus, self.encoder.num_gpus, self.encoder.resources)

    def workers(self) -> int | None:
        return self.encoder.workers or 0

    def build(self) -> MakeArrays:
        self.encoder.check_unchanged(self.identity)
        model, size = load_patch_encoder(self.encoder, self.encoder.threads()), self.encoder.from_px

        def encode(samples: Iterable[Sample]) -> Iterator[dict[str, np.ndarray] | Rejection]:
            rest = iter(samples)
            while part := list(islice(rest, self.encoder.batch_size)):
                images = [sample.images[size] for sample in part]
                rows = [model.encode(images)]
                if self.encoder.mirrored:
                    rows.append(model.encode([image[:, ::-1] for image in images]))
                for each in zip(*rows, strict=True):
                    yield self._stored(each)

        return encode

    def _stored(self, features: tuple[np.ndarray, ...]) -> "dict[str, np.ndarray] | Rejection":
        """The arrays of one image from its features, and those of the mirrored one."""
        arrays: dict[str, np.ndarray] = {}
        for name, values in zip((self.encoder.name, f"{self.encoder.name}{MIRRORED}"), features, strict=False):
            rows, columns, dim = values.shape
            try:
                stored = cast_embedding(values.reshape(-1, dim), self.encoder.dtype)
            except NotFiniteError:
                return Rejection("non_finite_embedding", f"{name} as {self.encoder.dtype}")
            if self.encoder.dtype == "int8":
                least = float(int8_errors(stored, values.reshape(-1, dim)).cosine.min())
                if least < self.min_cosine:
                    return Rejection("quantisation_error", f"{name}: cosine {least:.4f} as int8")
            arrays |= stored_features(name, stored, (rows, columns))
        return arrays


class EncodePatchesStage(ArrayStage):
    """`images-SIZE` -> `array-NAME`, `array-NAME-mirrored` and their scales. Workers keep the model."""

    config: PatchArrays

    def __init__(
        self,
        encoder: PatchEncoderConfig,
        images: ImagesConfig,
        store_format: StoreFormat,
        min_cosine: float,
        *,
        started: Mapping[str, object] | None = None,
    ):
        """
        Args:
            min_cosine: least cosine of a patch as int8 to itself; a sample with less is excluded.
            started: what the run folder's group was started with, if it was.
        """
        identity, size = call_warm(encoder.identify), encoder.from_px
        with encoder.located() as files:
            patch_px = encoder.patch_px(files)
        group = ImagesGroup(image_group(size), size, store_format, images.codec_of(size), shapes=images.shapes(size))
        config = PatchArrays(
            encoder=encoder.pinned(identity),
            identity=identity_to_keep(identity.fingerprint, started),
            dim=identity.dim,
            patch_px=patch_px,
            shapes=tuple(group.shapes) or ((size, size),),
            min_cosine=min_cosine,
        )
        super().__init__(config, store_format, {group.name: group}, f"image_encoders.{encoder.name}")
        self.name, self.modules = f"encode-images-{encoder.name}", encoder.modules

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        """Of aspect-ratio buckets, as if all images had most patches."""
        array, _ = self.specs[group]
        most = max(self.config.grids(), key=lambda grid: grid[0] * grid[1])
        return array_shard_bytes(self.config.specs(most)[array], num_rows)
