"""What a loader reads, and in which order."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from imagen_core.store.read.crop import View

_P = ParamSpec("_P")
_Options = TypeVar("_Options")
_Self = TypeVar("_Self")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """The options of a loader.

    Attributes:
        batch_size: samples per batch on this rank.
        images: sizes to load, in pixels; None loads no images.
        text: encoder to load, or a list of encoders; None loads no embeddings of captions.
        text_layers: numbers of the layers to load of an encoder whose layers are stored apart, in this order; None
            loads all. Of the others no byte is read. With a list of encoders they are by encoder.
        text_embed: text encoder of one vector per caption to load, of the same caption as `text`; None loads none.
        image_embed: image encoder to load; None loads no embeddings of images.
        captions: load the caption that `text` is, or would be, of.
        caption_sets: weights of the sets of captions that captions are taken from, by name; None takes those of the
            store.
        transcriptions: load the text written in the images.
        labels: load the images' classes.
        arrays: names of arrays to load that stages of other packages made; None loads none.
        features: patch features to load of each image, of the mirrored one where `crop` flips it; they are of whole
            images, whatever is cropped. None loads none.
        columns: columns to load that were kept of the source; None loads none.
        where: condition of SQL on the columns of samples; only samples for which it is true are loaded, see
            `Store.where`. None loads all.
        max_tokens: truncate longer embeddings to this many tokens; None truncates none.
        seed: decides the order, and which set and which of several captions is taken.
        rank, world_size: this process, and the number of processes that share each global batch.
        shuffle: False keeps the store's order in every epoch.
        drop_last: leave out the last global batch if it is not full.
        samples: indices to load, a range of step 1, of the samples that `where` leaves; None loads all of them.
        crop: a view of each image instead of all of it, such as `Crop`; only its square is read where images are raw.
        shuffle_window_shards: shards come in random order, and samples are shuffled within this many shards; for
            stores that are far away or larger than memory. None shuffles all samples with each other.
        replacement: samples are drawn with replacement: each place of an epoch independently, with the same
            probability, so that some come more than once and others not at all; of several captions another may be
            taken each time. With buckets, or shuffle_window_shards, within each bucket or window.
        pin_memory: batches in pinned memory, for asynchronous copies to a CUDA device.
    Raises:
        ValueError: a number is out of range, or options do not fit together.
    """

    batch_size: int
    images: Sequence[int] | None = None
    text: str | Sequence[str] | None = None
    text_embed: str | None = None
    image_embed: str | None = None
    captions: bool = False
    transcriptions: bool = False
    labels: bool = False
    max_tokens: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = False
    samples: range | None = None
    crop: View | None = None
    shuffle_window_shards: int | None = None
    pin_memory: bool = False
    arrays: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    where: str | None = None
    text_layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    caption_sets: Mapping[str, float] | None = None
    replacement: bool = False
    features: str | None = None

    @property
    def reads_captions(self) -> bool:
        """Whether a caption is taken of each sample, or its embedding."""
        return self.captions or self.text is not None or self.text_embed is not None

    @property
    def texts(self) -> dict[str, Sequence[int] | None]:
        """The encoders of `text` in their order, each with the layers to load; None: all, or it has none."""
        return layers_by_encoder(self.text, self.text_layers)

    @property
    def text_encoders(self) -> list[str]:
        """All text encoders that are read, each once."""
        return [*dict.fromkeys([*self.texts, *([] if self.text_embed is None else [self.text_embed])])]

    def __post_init__(self) -> None:
        layers_by_encoder(self.text, self.text_layers)
        if self.caption_sets is not None and not self.reads_captions:
            raise ValueError(
                f"caption_sets are {dict(self.caption_sets)}, but no caption is loaded; load captions, text or "
                "text_embed, or leave caption_sets out"
            )
        if self.features is not None and not self.images:
            raise ValueError(f"features are {self.features!r}, but no images are loaded; name their sizes as images")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more (got {self.batch_size})")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {self.rank} of {self.world_size}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, or None (got {self.max_tokens})")
        if self.replacement and not self.shuffle:
            raise ValueError("replacement goes with shuffle (got shuffle=False): without it samples keep their order")
        window = self.shuffle_window_shards
        if window is not None and (window < 1 or not self.shuffle):
            raise ValueError(
                f"shuffle_window_shards must be 1 or more, and goes with shuffle (got {window}, "
                f"shuffle={self.shuffle})"
            )


def layers_by_encoder(
    text: str | Sequence[str] | None, layers: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, Sequence[int] | None]:
    """Encoders of tokens in their order, each with the numbers of the layers that are read of it; None means all.

    Raises:
        ValueError: no encoder, or one twice; layers of none, of one that is not read, or not by encoder.
    """
    if text is None:
        if layers is not None:
            raise ValueError(f"text_layers are {list(layers)}, but no text is loaded; name its encoder as text")
        return {}
    names = [text] if isinstance(text, str) else list(text)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"text is {names}; name one encoder or several, each once")
    if layers is None or isinstance(layers, Mapping):
        each = layers or {}
        if unknown := [name for name in each if name not in names]:
            raise ValueError(f"text_layers name the encoder {unknown[0]!r}, but text is {names}; name those of text")
        return {name: each.get(name) for name in names}
    if not isinstance(text, str):
        raise ValueError(
            f"text_layers are {list(layers)}, but text is {names}; give them by encoder, such as "
            f"{{{names[0]}: {list(layers)}}}"
        )
    return {text: layers}


def takes_options_of(
    options: Callable[_P, _Options],
) -> Callable[[Callable[[_Self, _Options], _Result]], Callable[Concatenate[_Self, _P], _Result]]:
    """Gives a method that takes one options object the arguments of that object's class instead.

    So the options are declared in the class alone, and type checkers and `help` know them as the method's arguments.
    """

    def decorate(method: Callable[[_Self, _Options], _Result]) -> Callable[Concatenate[_Self, _P], _Result]:
        @wraps(method)
        def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
            return method(self, options(*args, **kwargs))

        own = inspect.signature(method)
        first = next(iter(own.parameters.values()))
        parameters = [first, *inspect.signature(options).parameters.values()]
        call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call

    return decorate
