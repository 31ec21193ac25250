"""Encodes the stored images of a shard with one frozen image encoder."""

import numpy as np

from imagen_core.store import (
    ImagesGroup,
    StoreDtype,
    StoreFormat,
    embedding_shard_bytes,
    image_embed_group,
    image_group,
    is_finite_as,
    open_images,
    read_samples,
    write_embedding_shard,
)
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.encoders.base import ImageEncoderConfig
from stages.encoders.encoder import ImageEncoder, load_encoder
from stages.precompute.fetch import SAMPLES
from stages.precompute.resize import ImagesConfig


class EncodeImagesStage(Stage):
    """`images-SIZE` -> `image-embed-NAME`: one embedding a row. Workers keep the model."""

    identity = "EncodePicturesStage"

    def __init__(
        self, encoder: ImageEncoderConfig, images: ImagesConfig, store_format: StoreFormat, dtype: StoreDtype
    ):
        identity = encoder.identify()
        self.encoder = encoder.pinned(identity)
        self.store_format: StoreFormat = store_format
        self.dtype: StoreDtype = "float16" if dtype == "int8" else dtype  # one vector an image: nothing to save
        self.dim = identity.dim
        self.images = ImagesGroup(
            image_group(encoder.from_px), encoder.from_px, store_format, images.codec_of(encoder.from_px)
        )
        self.name = f"encode-images-{encoder.name}"
        self.group = image_embed_group(encoder.name)
        self.inputs = (SAMPLES, self.images.name)
        self.max_workers = encoder.workers or 0
        self.resources = Resources(encoder.num_cpus, encoder.num_gpus, encoder.resources)
        self.fingerprint = identity.fingerprint
        self.groups = (
            Group(
                self.group,
                {
                    "kind": "image_embeds",
                    "encoder": encoder.name,
                    "dim": self.dim,
                    "dtype": self.dtype,
                    "format": store_format,
                    "fingerprint": self.fingerprint,
                },
            ),
        )
        self._model: ImageEncoder | None = None

    def setup(self, run: RunFolder) -> None:
        self.encoder.check_unchanged(self.fingerprint)
        self._model = load_encoder(self.encoder, self.encoder.threads())

    def process(self, task: Task) -> None:
        assert self._model is not None
        samples = read_samples(task.input(SAMPLES))
        path = task.input(self.images.name)
        images = open_images(str(path), str(path), self.images)
        encoded = self._model.encode(images.pixels(row) for row in range(images.num_rows))
        embeddings = encoded.embeddings
        bad = [row for row, embedding in enumerate(embeddings) if not is_finite_as(embedding, self.dtype)]
        for row in bad:
            embeddings[row] = np.zeros((1, self.dim), np.float32)
        drops = [Drop(row, samples[row].key, "non_finite_embedding", f"as {self.dtype}") for row in bad]
        write_embedding_shard(
            task.output(self.group, ".h5" if self.store_format == "hdf5" else ".parquet"),
            embeddings,
            self.dim,
            self.dtype,
            self.store_format,
            captions=[sample.key for sample in samples],
            fingerprint=self.fingerprint,
        )
        counters = {"images_encoded": len(embeddings), **encoded.oom_counter()}
        task.done(self.group, GroupResult(len(samples), drops, counters, {"excluded_rows": rows_by_reason(drops)}))

    def estimate_bytes(self, group: str, num_rows: int) -> int | None:
        return embedding_shard_bytes([1] * num_rows, self.dim, self.dtype)
