"""Batches of several stores with weights for one rank of a training run, resumable anywhere."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from imagen_core.store.read.batch import BatchReader, Draw
from imagen_core.store.read.loader import Loader, check_loader_state
from imagen_core.store.read.options import LoaderOptions
from imagen_core.store.read.order import derive_key
from imagen_core.store.read.quota import Quota, whole_weights
from imagen_core.store.read.reader import StoreReader


def is_mixture_state(state: Mapping[str, Any]) -> bool:
    """Whether a state is one of `MixtureLoader`, and not of `Loader`."""
    return "segments" in state


def check_mixture_state(state: Any) -> Any:
    """Returns a value of `MixtureLoader.state_dict` that may have been damaged, or written by hand.

    Raises:
        ValueError: a field is missing, or of another type or range, or does not fit the others.
    """
    position, stores, segments = (state.get(name) for name in ("position", "stores", "segments"))
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise ValueError(f"loader state has position {position!r}, which must be an integer of 0 or more")
    if not isinstance(state.get("turns", 0), int):
        raise ValueError(f"loader state has turns {state['turns']!r}, which must be an integer")
    if not isinstance(stores, Mapping) or not isinstance(segments, list) or not segments:
        raise ValueError("loader state of a mixture lacks stores or segments")
    for name, member in stores.items():
        try:
            check_loader_state(member)
        except ValueError as error:
            raise ValueError(f"store {name}: {error}") from error
        if not member.get("num_samples") or not isinstance(member.get("seed"), int):
            raise ValueError(f"store {name}: loader state lacks num_samples or seed")
    starts = [_checked_segment(segment, stores) for segment in segments]
    if starts != sorted(starts) or starts[0] != 0 or starts[-1] > position:
        raise ValueError(f"loader state has segments from {starts} with position {position}")
    if (total := sum(_consumed(member) for member in stores.values())) != position:
        raise ValueError(f"loader state has position {position}, but {total} samples of its stores are consumed")
    return state


def _checked_segment(segment: Any, stores: Mapping[str, Any]) -> int:
    """The position from which a segment has its weights."""
    start, weights = (segment.get(name) if isinstance(segment, Mapping) else None for name in ("position", "weights"))
    if not isinstance(start, int) or not isinstance(weights, Mapping) or not weights.keys() <= stores.keys():
        raise ValueError(f"loader state has a segment {segment!r}, which must have position and weights of its stores")
    _whole(weights)
    return start


def check_state(state: Any) -> Any:
    """Returns the state of either loader, see `check_loader_state` and `check_mixture_state`."""
    is_mixture = isinstance(state, Mapping) and is_mixture_state(state)
    return check_mixture_state(state) if is_mixture else check_loader_state(state)


def as_mixture_state(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a `Loader` as that of a mixture which has read nothing but this store until now."""
    first = {"position": 0, "weights": {name: 1.0}}
    return {"position": _consumed(state), "seed": state["seed"], "segments": [first], "stores": {name: dict(state)}}


def consumed(state: Mapping[str, Any]) -> int:
    """Samples that either loader has gone through since its beginning."""
    return state["position"] if is_mixture_state(state) else _consumed(state)


def epochs(state: Mapping[str, Any]) -> dict[str, float]:
    """Epochs that are gone through of each store of a mixture, by name; of one store alone by the name ""."""
    if not is_mixture_state(state):
        return {"": _consumed(state) / state["num_samples"]}
    return {name: _consumed(member) / member["num_samples"] for name, member in state["stores"].items()}


def _consumed(member: Mapping[str, Any]) -> int:
    return member["epoch"] * member["num_samples"] + member["position"]


def _whole(weights: Mapping[str, Any]) -> dict[str, int]:
    """The weights that are not 0, as whole numbers."""
    try:
        found = whole_weights([float(weight) for weight in weights.values()])
    except TypeError as error:
        raise ValueError(f"weights must be numbers (got {dict(weights)!r})") from error
    return {name: weight for name, weight in zip(weights, found, strict=True) if weight}


class MixtureLoader:
    """Batches that never end, each sample of the store whose turn it is by its weight.

    Order. Position p of the sequence belongs to one store, by quota (`Quota`): any stretch has the shares that the
    weights say, but for a few samples. Each store is read in its own order, epoch after epoch, as by its own `Loader`:
    none of its samples comes again before all of them came. A global batch is the next `world_size * batch_size`
    positions, always full, split over the ranks in order. There is no epoch of the mixture, so `for batch in loader`
    must be left by the caller, and the loader has no length.

    Buckets. Where images are of aspect-ratio buckets, the quota counts global batches: each is one of one store's own
    loader, and so of one bucket. A smaller batch at the end of a store's epoch takes a turn as a full one does.

    Resume. As with `Loader`: by a state of any rank, with any world size and batch size, also after removals, which
    make batches smaller. With other weights the sequence goes on from there by the new ones: what was read of each
    store is not read again in its epoch. Stores may join, and leave; one that comes back goes on where it was.

    Attributes:
        global_size: samples of the last batch over all ranks.

    Each batch is a dict as of `Loader`.
    """

    def __init__(
        self,
        stores: Mapping[str, StoreReader],
        weights: Mapping[str, float],
        options: LoaderOptions,
        samples: Mapping[str, range],
        caption_sets: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Made by `Mixture.loader`.

        Args:
            samples: indices to load of each store, as `LoaderOptions.samples`; all of those that are not named.
            caption_sets: weights of each store, instead of `LoaderOptions.caption_sets` for those that are named.
        Raises:
            ValueError: a size or encoder that a store lacks, no samples in a store, or a number out of range.
        """
        self._stores, self._options = dict(sorted(stores.items())), replace(options, drop_last=False)
        self._samples, self._weights = samples, {name: weights[name] for name in self._stores}
        sets = caption_sets or {}
        self._caption_sets = {name: sets.get(name, options.caption_sets) for name in self._stores}
        self._loaders = {name: self._loader(name, self._seed(name)) for name in self._stores}
        self._reader = BatchReader(list(self._stores.values()), options, list(self._caption_sets.values()))
        self._quota = Quota(list(self._weights.values()))
        self._position = self._turns = 0
        """Samples of all stores that were gone through; batches since the weights are these."""
        self._first = np.zeros(len(self._stores), np.int64)
        """Samples of each store that were gone through before the weights were these."""
        self._segments = [{"position": 0, "weights": self._weights}]
        self._left: dict[str, Any] = {}
        """States of stores that are not in the mixture any more."""
        self.global_size = 0
        for name, loader in self._loaders.items():
            if not loader.num_samples:
                raise ValueError(f"store {name}: has no samples to read")

    def _loader(self, name: str, seed: int) -> Loader:
        sets = self._caption_sets[name]
        options = replace(self._options, seed=seed, samples=self._samples.get(name), caption_sets=sets)
        try:
            return Loader(self._stores[name], options)
        except ValueError as error:
            raise ValueError(f"store {name}: {error}") from error

    def _seed(self, name: str) -> int:
        """Another one for each store, so that stores of the same length are not read in the same order."""
        digest = hashlib.sha256(name.encode()).digest()
        return derive_key(self._options.seed, int.from_bytes(digest[:8], "big"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._reader.ratios:
            loader = self._next_loader()
            batch = loader.next_batch(self._position)
            self._take_turn(loader)
            yield batch
        while True:
            size, rank, world_size = self._global_batch_size, self._options.rank, self._options.world_size
            first = self._position + rank * size // world_size
            batch = self._read(range(first, self._position + (rank + 1) * size // world_size))
            self._advance()
            yield batch

    def skip(self) -> dict[str, Any]:
        """An empty batch instead of the next one, as `Loader.skip`."""
        if self._reader.ratios:
            loader = self._next_loader()
            batch = loader.skip()
            self._take_turn(loader)
            return batch
        batch = self._reader.read([])
        self._advance()
        return batch

    @property
    def _global_batch_size(self) -> int:
        return self._options.batch_size * self._options.world_size

    def _next_loader(self) -> Loader:
        """The loader whose turn it is to give a batch."""
        turns, _ = self._quota.turns(self._turns, self._turns + 1)
        return list(self._loaders.values())[int(turns[0])]

    def _take_turn(self, loader: Loader) -> None:
        self._turns, self.global_size = self._turns + 1, loader.global_size
        self._position = sum(loader.consumed for loader in self._loaders.values()) + self._consumed_by_left

    @property
    def _consumed_by_left(self) -> int:
        return sum(map(_consumed, self._left.values()))

    def _advance(self) -> None:
        size = self._global_batch_size
        self.global_size = size
        if any(loader.lacks_samples for loader in self._loaders.values()):
            self.global_size = len(self._draws(range(self._position, self._position + size)))
        self._position += size

    def _read(self, positions: range) -> dict[str, Any]:
        """Reads a batch; again if a store was changed meanwhile, so that no erased sample is in it."""
        while True:
            generations = [store.generation for store in self._stores.values()]
            batch = self._reader.read(self._draws(positions))
            if generations == [store.generation for store in self._stores.values()]:
                return batch

    def _draws(self, positions: range) -> list[Draw]:
        """The samples at some positions, without those that are removed."""
        since = self._segments[-1]["position"]
        turns, numbers = self._quota.turns(positions.start - since, positions.stop - since)
        found: dict[int, Draw] = {}
        for index, loader in enumerate(self._loaders.values()):
            (places,) = np.nonzero(turns == index)
            if len(places):
                first = int(self._first[index] + numbers[places[0]])
                for offset, draw in _stream(loader, first, first + len(places)):
                    place = int(places[offset])
                    found[place] = replace(draw, counter=positions.start + place, store=index)
        return [found[place] for place in sorted(found)]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON values: `position` samples are consumed by all ranks.

        Returns:
            `position`, `seed`; with buckets `turns`, the batches since the weights are these; `stores`, the state of
            each store's own loader by name; `segments`, the positions from which the weights were others, each with
            these weights by name.
        """
        if not self._reader.ratios:
            counts = self._first + self._quota.counts(self._position - self._segments[-1]["position"])
            for loader, count in zip(self._loaders.values(), counts.tolist(), strict=True):
                loader.seek(count)
        return {
            "position": self._position,
            "seed": self._options.seed,
            "segments": [dict(segment) for segment in self._segments],
            **({"turns": self._turns} if self._reader.ratios else {}),
            "stores": self._left | {name: loader.state_dict() for name, loader in self._loaders.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state, with these weights from there on; see `Loader.load_state_dict`.

        Raises:
            ValueError: the state is of another seed, shuffle or length of a store, so of another order; or damaged.
        """
        check_mixture_state(state)
        if state.get("seed") != self._options.seed:
            raise ValueError(
                f"loader state has seed {state.get('seed')}, this loader has {self._options.seed}: the order of "
                "samples differs; resume with the same seed"
            )
        for name in self._stores:
            member = state["stores"].get(name)
            seed = self._seed(name) if member is None else member["seed"]  # a training of this store alone had another
            if self._loaders[name].state_dict()["seed"] != seed:
                self._loaders[name] = self._loader(name, seed)
            if member is not None:
                self._load_member(name, member)
        self._left = {name: member for name, member in state["stores"].items() if name not in self._stores}
        self._position, self._segments = state["position"], [dict(segment) for segment in state["segments"]]
        gone_through = np.array([loader.consumed for loader in self._loaders.values()], np.int64)
        last = self._segments[-1]
        if _whole(last["weights"]) != _whole(self._weights):
            self._first, self._turns = gone_through, 0
            started = [segment for segment in self._segments if segment["position"] < self._position]
            self._segments = [*started, {"position": self._position, "weights": self._weights}]
        elif self._reader.ratios:
            self._turns = state.get("turns", 0)
        else:
            self._first = gone_through - self._quota.counts(self._position - last["position"])
            if (self._first < 0).any():
                raise ValueError("loader state has fewer samples of a store consumed than its last weights say")

    def _load_member(self, name: str, member: dict[str, Any]) -> None:
        try:
            self._loaders[name].load_state_dict(member)
        except ValueError as error:
            raise ValueError(f"store {name}: {error}") from error


def _stream(loader: Loader, start: int, stop: int) -> Iterator[tuple[int, Draw]]:
    """What a loader gives from one number of consumed samples to another, over its epochs, each with its distance from
    `start`; removed samples are left out."""
    at = start
    while at < stop:
        epoch, first = divmod(at, loader.num_samples)
        size = min(stop - at, loader.num_samples - first)
        for position, draw in loader.draws(epoch, range(first, first + size)):
            yield at - start + position - first, draw
        at += size
