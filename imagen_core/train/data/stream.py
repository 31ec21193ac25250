"""Batches of the store for this process, read ahead by a thread."""

import copy
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from imagen_core.store import Crop, FullImage, Store, View
from imagen_core.store.read.loader import Loader
from imagen_core.store.read.mixture_loader import consumed, epochs
from imagen_core.store.read.options import LoaderOptions
from imagen_core.train.augment import Flipped, RandomResizedCrop
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.online import Encode, with_text
from imagen_core.train.data.randomness import RandomStream, SampleColumn, sample_uniform
from imagen_core.train.data.store import make_loader, needed_sizes, opened_again, training_samples
from imagen_core.train.errors import TrainError
from imagen_core.train.parallel.world import World

_AHEAD = 3  # batches read while a step runs
_SHARDS_TO_CHECK = 16  # for annotations


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's part of a global batch.

    Attributes:
        raw: a batch of the loader.
        counters: how many samples were consumed before each of these; decide their random numbers.
        global_size: samples of the batch over all processes.
        largest_part: most samples of the batch that any process has.
        loader_state: where the loader is once this batch is consumed.
        error: why the batch could not be read; then it is empty, and the last one.
    """

    raw: Mapping[str, Any]
    counters: range
    global_size: int
    largest_part: int
    loader_state: dict[str, Any]
    error: Exception | None = None

    @property
    def keys(self) -> list[str]:
        return self.raw["keys"]

    @property
    def images(self) -> dict[int, Tensor]:
        """uint8 (b, 3, h, w) by size; empty where no images are read."""
        return self.raw.get("images", {})

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs that are gone through once this batch is consumed: `epoch`, or of a mixture `epoch/NAME` by store."""
        return {f"epoch{name and f'/{name}'}": count for name, count in epochs(self.loader_state).items()}

    def part(self, start: int, stop: int) -> "Batch":
        """The rows from `start` to `stop`."""
        rows = slice(start, stop)
        raw = {
            name: {key: t[rows] for key, t in value.items()} if isinstance(value, dict) else value[rows]
            for name, value in self.raw.items()
        }
        return replace(self, raw=raw, counters=self.counters[rows])


def full_images(config: TrainConfig) -> View:
    """Images as they are, of the sizes of a batch."""
    if config.views.resized_crop is None:
        return FullImage()
    settings = config.views.resized_crop.model_copy(update={"probability": 0.0, "without_text": None})
    return RandomResizedCrop(settings, lambda counters: np.zeros((len(counters), 4)))


def random_views(config: TrainConfig) -> View:
    """What training sees of an image: a function of the sample's random numbers."""
    settings = config.views

    def columns(counters: Sequence[int], *wanted: SampleColumn) -> np.ndarray:
        numbers = sample_uniform(config.seed, counters, RandomStream.SAMPLE, len(SampleColumn))
        return numbers.numpy()[:, list(wanted)]

    def place(counters: Sequence[int]) -> np.ndarray:
        return columns(counters, SampleColumn.CROP_TOP, SampleColumn.CROP_LEFT)

    def whether_area_and_place(counters: Sequence[int]) -> np.ndarray:
        whether_and_area = sample_uniform(config.seed, counters, RandomStream.RESIZED_CROP, count=2).numpy()
        return np.concatenate([whether_and_area, place(counters)], axis=1)

    view: View = FullImage()
    if settings.resized_crop is not None:
        view = RandomResizedCrop(settings.resized_crop, whether_area_and_place)
    elif settings.crop_px is not None:
        view = Crop(settings.crop_px, place)
    if settings.horizontal_flip:
        view = Flipped(view, settings.horizontal_flip, lambda counters: columns(counters, SampleColumn.FLIP))
    return view


def loader_options(config: TrainConfig, batch_size: int, *, online: bool) -> LoaderOptions:
    """What a run reads of each sample; the caller sets the order. `online`: captions, not their embeddings."""
    return LoaderOptions(
        batch_size,
        images=needed_sizes(config) or None,
        text=None if online else config.text,
        text_layers=None if online else config.text_layers,
        captions=online,
        text_embed=config.text_embed,
        image_embed=config.image_embed,
        max_tokens=config.max_tokens,
        transcriptions=config.transcription is not None,
        labels=config.num_classes is not None,
        caption_sets=config.captions,
        arrays=tuple(config.condition_images) or None,
    )


def read_batches(
    loader: Loader, config: TrainConfig, encode: Encode | None, errors: list[Exception]
) -> Iterator[Mapping[str, Any]]:
    """One epoch of a loader of `loader_options`, with the embeddings of the captions where `encode` makes them.

    An error of the store is added to `errors`; the batches that are left are then empty, so that this process takes
    part in what the processes do together.
    """
    epoch = loader.state_dict()["epoch"]
    try:
        for raw in loader:
            yield with_text(raw, encode, config)
    except Exception as error:  # noqa: BLE001 - the caller raises it
        errors.append(error)
        while loader.state_dict()["epoch"] == epoch:
            yield with_text(loader.skip(), encode, config)


class BatchStream:
    """An endless stream of training batches; a thread reads the next ones while a step runs.

    Captions are encoded, where `encode` is given, by the thread that takes the batch.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        config: TrainConfig,
        world: World,
        state: dict[str, Any] | None,
        encode: Encode | None = None,
    ):
        self._config, self._world, self._encode = config, world, encode
        if config.batch_size % world.size:
            raise TrainError(f"batch_size {config.batch_size} must be a multiple of the {world.size} processes")
        self._options = replace(
            loader_options(config, config.batch_size // world.size, online=encode is not None),
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            crop=random_views(config),
            shuffle_window_shards=config.data.shuffle_window_shards,
            replacement=config.data.replacement,
            pin_memory=world.device.type == "cuda",
            features=None if config.alignment is None else config.alignment.encoder,
        )
        try:
            self._read_from(stores, state)
        except ValueError as error:
            raise TrainError(
                f"the checkpoint's place in the data does not fit: {error}; store, seed, where, "
                "data.replacement and samples must stay the same, or start again in another --out"
            ) from error
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._last: Batch | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batches", daemon=True)
        self._thread.start()
        self.waited_s = 0.0
        """Time the training has spent waiting for batches."""

    def _read_from(self, stores: Mapping[str, Store], state: dict[str, Any] | None) -> None:
        """Raises ValueError if a loader's state does not fit the stores."""
        # Copies open their own files, for the reading thread.
        self._stores = {name: copy.copy(store) for name, store in stores.items()}
        each = self._config.by_store()
        samples = {name: training_samples(store, each[name]) for name, store in stores.items()}
        loader = make_loader(self._stores, self._config, self._options, samples)
        if state is not None:
            loader.load_state_dict(state)
        self._loader = loader

    def next(self) -> Batch:
        """The next batch; one with an `error` is the last. Raises what reading raised that is no fault of a store."""
        started = time.perf_counter()
        item = self._last or self._queue.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        self._last = None if item.error is None else item
        return replace(item, raw=with_text(item.raw, self._encode, self._config))

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _read_ahead(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    for batch in self._epoch():
                        self._queue.put(batch)
                        if self._stopped.is_set():
                            return
                except Exception as error:  # noqa: BLE001 - handed to the training loop
                    unreadable = self._read_again(error)
                    if unreadable is not None:
                        self._queue.put(self._empty_batch(unreadable))
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the training loop, which raises it
            self._queue.put(error)

    def _read_again(self, error: Exception) -> Exception | None:
        """Goes on with the store as it is now, if it was compacted or made again with the same samples; otherwise the
        reason why not."""
        try:
            stores = opened_again(self._stores, self._config, error, online=self._encode is not None)
            self._read_from(stores, self._loader.state_dict())
        except Exception as reason:  # noqa: BLE001 - handed to the training loop
            return reason
        return None

    def _empty_batch(self, error: Exception) -> Batch:
        """What stands for the batch that could not be read: as many micro-batches, without samples."""
        while True:
            before = self._loader.state_dict()
            raw = self._loader.skip()
            if self._loader.global_size:
                size = consumed(self._loader.state_dict()) - consumed(before)
                return Batch(raw, range(0), self._loader.global_size, -(-size // self._world.size), before, error)

    def _epoch(self) -> Iterator[Batch]:
        before = self._loader.state_dict()
        for raw in self._loader:
            after = self._loader.state_dict()
            start = consumed(before)
            size = consumed(after) - start
            first = self._world.rank * size // self._world.size
            before = after
            if not self._loader.global_size:  # all of its samples were removed from the store
                continue
            yield Batch(
                raw,
                range(start + first, start + first + len(raw["keys"])),
                self._loader.global_size,
                -(-size // self._world.size),
                after,
            )
