"""Batches of the store for this process, read ahead by a thread, and what a step makes of them."""

import copy
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_core.diffusion import Denoiser
from imagen_core.models import Conditioning
from imagen_core.store import Crop, Framing, Store, Whole
from imagen_core.train.augment import Mirrored, RandomCut, blur
from imagen_core.train.config import TrainConfig
from imagen_core.train.distributed import World
from imagen_core.train.errors import TrainError
from imagen_core.train.randomness import BLUR, CUT, draw, draw_uniform, mix
from imagen_core.train.times import TimeSampler

_AHEAD = 3  # batches read while a step runs


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's part of a global batch.

    Attributes:
        counters: how many samples were consumed before each of these; names their random numbers.
        global_size: samples of the batch over all processes.
        largest_part: no process has more samples of it.
        loader_state: where the loader is once this batch is consumed.
    """

    keys: list[str]
    images: dict[int, Tensor]
    text: Tensor | None
    text_mask: Tensor | None
    counters: range
    global_size: int
    largest_part: int
    loader_state: dict[str, Any]

    def part(self, start: int, stop: int) -> "Batch":
        """Some rows of it."""
        rows = slice(start, stop)
        return Batch(
            self.keys[rows],
            {size: pixels[rows] for size, pixels in self.images.items()},
            None if self.text is None else self.text[rows],
            None if self.text_mask is None else self.text_mask[rows],
            self.counters[rows],
            self.global_size,
            self.largest_part,
            self.loader_state,
        )


@dataclass(frozen=True, slots=True)
class Example:
    """What the loss needs, on the device: x0 and noise (b, c, h, w), sigma (b,), and what each loss counts (b,)."""

    x0: Tensor
    sigma: Tensor
    weight: Tensor
    noise: Tensor
    conditioning: Conditioning


def open_store(config: TrainConfig) -> Store:
    """The store, with everything the configuration reads.

    Raises:
        TrainError: a size or an encoder is missing, or has another width.
        StoreError: there is no readable store.
    """
    store = Store.open(config.store, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
    for size in stored_sizes(config):
        if size not in store.image_sizes:
            raise TrainError(
                f"store {config.store}: has no images-{size} (sizes: {store.image_sizes}); add the size with "
                "`pipeline run precompute` and images.sizes_px, or change denoiser.size_px, low_res_px or "
                "augment.from_px"
            )
    if config.text is not None:
        if config.text not in store.encoders:
            raise TrainError(f"text: the store has no encoder {config.text!r} (encoders: {store.encoders})")
        dim = store.manifest.texts[config.text].dim
        if dim != config.denoiser.unet.text_dim:
            raise TrainError(
                f"denoiser.unet.text_dim is {config.denoiser.unet.text_dim}, but the embeddings of {config.text!r} in "
                f"the store are {dim} wide; set text_dim={dim}"
            )
    if len(store) <= config.num_validation_samples:
        raise TrainError(
            f"num_validation_samples is {config.num_validation_samples}, but the store has {len(store)} samples"
        )
    return store


def needed_sizes(config: TrainConfig) -> list[int]:
    """Sizes of the pictures of a batch."""
    sizes = (config.denoiser.size_px, config.denoiser.low_res_px)
    return [size for size in sizes if size is not None]


def stored_sizes(config: TrainConfig) -> list[int]:
    """Sizes of the pictures a run reads."""
    return needed_sizes(config) if config.augment is None else [config.augment.from_px]


def whole_pictures(config: TrainConfig) -> Framing:
    """Pictures as they are, of the sizes of a batch."""
    if config.augment is None:
        return Whole()
    settings = config.augment.model_copy(update={"probability": 0.0, "without_text": None})
    return RandomCut(settings, lambda counters: np.zeros((len(counters), 4)))


def random_views(config: TrainConfig) -> Framing:
    """What training sees of a picture: a function of the sample's named random numbers."""

    def uniform(counters: Sequence[int]) -> np.ndarray:
        return draw_uniform(config.seed, counters).numpy()

    def cut(counters: Sequence[int]) -> np.ndarray:
        whether_and_area = draw_uniform(config.seed, counters, stream=CUT, count=2).numpy()
        return np.concatenate([whether_and_area, uniform(counters)[:, 2:4]], axis=1)

    views: Framing = Whole()
    if config.augment is not None:
        views = RandomCut(config.augment, cut)
    elif config.crop_px is not None:
        views = Crop(config.crop_px, lambda counters: uniform(counters)[:, 2:4])
    if config.horizontal_flip:
        views = Mirrored(views, config.horizontal_flip, lambda counters: uniform(counters)[:, 4:5])
    return views


class BatchStream:
    """An endless stream of training batches; a thread reads the next ones while a step runs."""

    def __init__(self, store: Store, config: TrainConfig, world: World, state: dict[str, Any] | None):
        self._world = world
        if config.batch_size % world.size:
            raise TrainError(f"batch_size {config.batch_size} must be a multiple of the {world.size} processes")
        self._loader = copy.copy(store).loader(  # open files of its own, for a thread of its own
            batch_size=config.batch_size // world.size,
            images=needed_sizes(config),
            text=config.text,
            max_tokens=config.max_tokens,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            samples=range(len(store) - config.num_validation_samples),
            crop=random_views(config),
            shuffle_window_shards=config.shuffle_window_shards,
            pin_memory=world.device.type == "cuda",
        )
        if state is not None:
            try:
                self._loader.load_state_dict(state)
            except ValueError as error:
                raise TrainError(
                    f"the checkpoint's place in the data does not fit: {error}; store, seed and "
                    "num_validation_samples must stay what they were, or begin in another --out"
                ) from error
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batches", daemon=True)
        self._thread.start()
        self.waited_s = 0.0
        """Time the training has spent waiting for batches."""

    def next(self) -> Batch:
        """The next batch; raises what reading it raised."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

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
                for batch in self._epoch():
                    self._queue.put(batch)
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the training loop, which raises it
            self._queue.put(error)

    def _epoch(self) -> Iterator[Batch]:
        before = self._loader.state_dict()
        for raw in self._loader:
            after = self._loader.state_dict()
            samples = after["num_samples"]
            begin = before["epoch"] * samples + before["position"]
            size = after["epoch"] * samples + after["position"] - begin
            first = self._world.rank * size // self._world.size
            before = after
            if not self._loader.global_size:  # all of it was removed from the store
                continue
            yield Batch(
                raw["keys"],
                raw["images"],
                raw.get("text"),
                raw.get("text_mask"),
                range(begin + first, begin + first + len(raw["keys"])),
                self._loader.global_size,
                -(-size // self._world.size),
                after,
            )


def make_example(
    batch: Batch,
    config: TrainConfig,
    denoiser: Denoiser,
    device: torch.device,
    step: int,
    times: TimeSampler | None = None,
) -> Example:
    """Pixels and embeddings of a batch with its noise, noise levels, blur and dropped captions.

    Noise levels are uniform in the schedule's time without `times`.

    An empty batch becomes one row of zeros, so that this process takes part in collectives; its loss counts 0.
    """
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    settings = config.denoiser
    draws = draw(
        config.seed,
        batch.counters or range(1),
        (settings.unet.in_channels, config.side_px, config.side_px),
        low_res=settings.low_res_px is not None,
        device=device,
    )
    uniform = draws.uniform
    x0 = _pixels(batch.images[settings.size_px], device, dtype)
    low_res = None if settings.low_res_px is None else _pixels(batch.images[settings.low_res_px], device, dtype)
    if low_res is not None and config.low_res_blur is not None:
        low_res = blur(
            low_res,
            config.low_res_blur,
            draw_uniform(config.seed, batch.counters or range(1), stream=BLUR, count=2),
        )
    conditioning = Conditioning()
    if batch.text is not None and batch.text_mask is not None:
        text, mask = _one_row(batch.text), _one_row(batch.text_mask)
        if config.compile:
            text, mask = _few_lengths(text, mask, config.max_tokens)
        conditioning = Conditioning(
            text=text.to(device, non_blocking=True).to(dtype),
            text_mask=mask.to(device, non_blocking=True),
            text_keep=(uniform[:, 0] >= config.caption_dropout).to(device),
        )
    if low_res is not None:
        assert draws.low_res_noise is not None
        sigma = torch.zeros(len(x0), dtype=torch.float64)
        if settings.low_res_noise is not None:
            level = uniform[:, 1]
            if settings.low_res_noise.per == "batch":
                level = torch.full_like(level, mix(config.seed, step, 3) / 2**63)
            sigma = settings.low_res_noise.sigma(level)
        conditioning = denoiser.with_low_res(conditioning, low_res, sigma.to(device), draws.low_res_noise.to(dtype))
    time, weight = (draws.time, torch.ones_like(draws.time)) if times is None else times.choose(draws.time)
    sigma = settings.diffusion.schedule.sigma(time).to(device)
    memory = torch.channels_last if config.channels_last else torch.contiguous_format
    x0 = x0.contiguous(memory_format=memory)
    return Example(x0, sigma, weight.to(device, dtype), draws.noise.to(dtype), conditioning)


def _few_lengths(text: Tensor, mask: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Padded to a multiple of a quarter of `max_tokens`: a network is compiled for four lengths only."""
    quarter = -(-max_tokens // 4)
    more = min(-(-text.shape[1] // quarter) * quarter, max_tokens) - text.shape[1]
    return F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))


def _pixels(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 (b, c, h, w) -> [-1, 1]."""
    return _one_row(pixels).to(device, non_blocking=True).to(dtype).div(127.5).sub(1)


def _one_row(tensor: Tensor) -> Tensor:
    """One row of zeros instead of none."""
    return tensor if len(tensor) else tensor.new_zeros(1, *(max(1, side) for side in tensor.shape[1:]))
