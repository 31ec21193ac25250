"""Encodes the stored images of a shard with one frozen image encoder."""

from collections.abc import Mapping

from imagen_core.store import (
    ImagesGroup,
    StoreDtype,
    StoreFormat,
    embedding_shard_bytes,
    image_group,
    open_images,
    read_samples,
)
from pipeline.stage import Drop, Group, GroupResult, Resources, Stage, Task, rows_by_reason
from pipeline.storage.run_folder import RunFolder
from stages.encoders.base import ImageEncoderConfig
from stages.encoders.encoder import ImageEncoder, load_encoder
from stages.encoders.identity import identity_to_keep
from stages.precompute.embedding_files import EmbeddingFiles
from stages.precompute.fetch import SAMPLES
from stages.precompute.images_config import ImagesConfig
from stages.precompute.quantisation import cast_for_store


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
        identity = encoder.identify()
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
