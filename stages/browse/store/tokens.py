"""The tokens of a caption, with a recipe's template and padding: which of them are stored, and which were cut."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, Literal

import yaml

from imagen_core.store import EmbeddingGroup
from pipeline.errors import ConfigError, PipelineError
from pipeline.storage.run_folder import CONFIG, RunFolder
from stages.browse.store.tokenizer_file import FileTokenizer, NoTokenizerError, find_tokenizer
from stages.browse.web import error_line
from stages.encoders.base import POOLED, EncoderConfig
from stages.encoders.batches.model_input import ModelInput
from stages.encoders.given import KIND as GIVEN
from stages.encoders.prompts import encoder_of
from stages.encoders.recipes.settings import RecipeSettings
from stages.encoders.recipes.template import RecipeReader

_MOST_CUT = 200
_LEAST_REPEATED = 5
_WITHOUT_LIMIT = 2**24

State = Literal["stored", "dropped", "cut"]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a caption, of its template or of padding.

    Attributes:
        text: as the tokenizer writes it.
        state: dropped: the model reads it, but its row is not stored; cut: it is behind the last that is read.
        times: how often it follows itself here.
    """

    id: int
    text: str
    state: State
    times: int = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a caption.

    Attributes:
        stored: number of rows in the store.
        shown: what the model reads, and then what was cut, or the first of much.
        cut: number of tokens of the caption that were cut.
        zeros: rows of zeros among those stored.
        pooled: whether one row stands for all tokens.
        note: why there are none to show; None if there are.
    """

    stored: int
    shown: list[Token]
    cut: int
    zeros: int = 0
    pooled: bool = False
    note: str | None = None


def tokens_of(caption: str, stored: int, group: EmbeddingGroup, run: RunFolder | None) -> Tokens:
    """The tokens of a caption of which `stored` rows are in the store, as the group says that it is read.

    They are shown only if the tokenizer is on this machine, is the one that the fingerprint names, and gives as many
    rows as are stored.
    """
    try:
        tokenizer = find_tokenizer(group.fingerprint, _configured(run, group.encoder))
        config = _encoder(group)
        read = _read(config, tokenizer, group.fingerprint, caption)
    except (NoTokenizerError, PipelineError) as error:
        return Tokens(stored, [], 0, note=error_line(error))
    pooled = config.output in POOLED
    rows = min(1, read.num_rows) if pooled else read.num_rows
    if rows != stored:
        return Tokens(stored, [], 0, note=f"the tokenizer gives {rows:,} rows of the caption, not {stored:,}")
    cut = _cut(config, tokenizer, group.fingerprint, caption)
    last = len(read.ids) - read.tail
    states: list[State] = [
        "stored" if i < read.head or read.start <= i < last else "dropped" for i in range(len(read.ids))
    ]
    shown = _repeated(tokenizer, [*zip(read.ids, states, strict=True), *((each, "cut") for each in cut[:_MOST_CUT])])
    return Tokens(stored, list(shown), len(cut), read.zeros_before + read.zeros_after, pooled)


def _encoder(group: EmbeddingGroup) -> EncoderConfig:
    """The configuration that a group was made with.

    Raises:
        NoTokenizerError: its fingerprint does not say.
        ConfigError: no installed package defines its kind.
    """
    fingerprint = {"revision": None, **group.fingerprint}
    if "kind" not in fingerprint:
        raise NoTokenizerError("the fingerprint of the embeddings does not name a kind of encoder")
    if fingerprint["kind"] == GIVEN:
        raise NoTokenizerError("the embeddings came with the data")
    try:
        return encoder_of({"name": group.encoder, "fingerprint": fingerprint}, None, use_gpu=False)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"encoder {group.encoder}: its fingerprint cannot be read: {error_line(error)}") from error


def _read(config: EncoderConfig, tokenizer: FileTokenizer, fingerprint: Mapping[str, Any], caption: str) -> ModelInput:
    if not isinstance(config, RecipeSettings):
        return config.reader(tokenizer)([caption])[0][0]
    if config.drop_prefix == "system":
        raise NoTokenizerError("how many rows of the system message are dropped, only the model's chat template says")
    around = fingerprint.get("chat_text")
    return RecipeReader(config, tokenizer, None if around is None else (around[0], around[1]))([caption])[0][0]


def _cut(
    config: EncoderConfig, tokenizer: FileTokenizer, fingerprint: Mapping[str, Any], caption: str
) -> Sequence[int]:
    """The ids that are not read for want of room: what is between the common start and the common end of both."""
    padless = {"pads": None} if isinstance(config, RecipeSettings) else {}
    short, whole = (
        _read(config.model_copy(update=padless | more), tokenizer, fingerprint, caption).ids
        for more in ({}, {"max_tokens": _WITHOUT_LIMIT})
    )
    first = _common(short, whole)
    last = min(_common(short[::-1], whole[::-1]), len(short) - first)
    return whole[first : len(whole) - last]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _repeated(tokenizer: FileTokenizer, found: Sequence[tuple[int, State]]) -> Iterator[Token]:
    """Tokens, those that follow themselves often as one."""
    for (token_id, state), group in groupby(found):
        count, text = len(list(group)), tokenizer.text(token_id)
        often = count >= _LEAST_REPEATED
        yield from [Token(token_id, text, state, count if often else 1)] * (1 if often else count)


def _configured(run: RunFolder | None, encoder: str) -> str | None:
    """Where the run's configuration says that the encoder's model is."""
    if run is None or run.storage.size(CONFIG) is None:
        return None
    config: Any = yaml.safe_load(run.storage.read(CONFIG))
    encoders = config.get("encoders") if isinstance(config, Mapping) else None
    named = [each for each in encoders or () if isinstance(each, Mapping) and each.get("name") == encoder]
    return str(named[0]["model"]) if named and named[0].get("model") else None
