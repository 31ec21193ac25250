"""The tokens of a caption, and which of them were cut, by the tokenizer's file alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from imagen_core.store import EmbeddingGroup
from pipeline.storage.run_folder import CONFIG, RunFolder
from stages.captions import on_one_line
from stages.encoders.model_files import tokenizer_digest
from stages.encoders.tiny import TINY_MODEL, tiny_tokenizer

_FILE = "tokenizer.json"
_MOST_LOST = 200


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a caption; `text` as the tokenizer writes it."""

    id: int
    text: str
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a caption.

    Attributes:
        stored: number of tokens in the store.
        shown: the stored ones, and then those that were cut, or the first of many.
        cut: number of tokens of the caption that were cut.
        note: why there are none to show; None if there are.
    """

    stored: int
    shown: list[Token]
    cut: int
    note: str | None = None


def tokens_of(caption: str, stored: int, group: EmbeddingGroup, run: RunFolder | None) -> Tokens:
    """The tokens of a caption of which `stored` tokens are in the store.

    They are shown only if the tokenizer is on this machine, is the one that the group's fingerprint names, and gives
    as many tokens as are stored, or more where captions are cut at this number.
    """
    fingerprint = group.fingerprint
    tokenizer = _tokenizer(str(fingerprint.get("model")), fingerprint.get("revision"), _configured(run, group.encoder))
    if tokenizer is None:
        return Tokens(stored, [], 0, f"the tokenizer of {fingerprint.get('model')} is not on this machine")
    found, digest = tokenizer
    if digest is not None and digest != fingerprint.get("tokenizer_sha256", digest):
        return Tokens(stored, [], 0, "the tokenizer on this machine is another one than that of the fingerprint")
    encoded = found.encode(on_one_line(caption))
    ids, texts, special = encoded.ids, encoded.tokens, encoded.special_tokens_mask
    if len(ids) != stored and not (len(ids) > stored == fingerprint.get("max_tokens")):
        return Tokens(
            stored,
            [],
            0,
            f"the tokenizer gives {len(ids)} tokens of the caption alone; this encoder reads it with a template, pads "
            "or cleaning",
        )
    ends = [i for i in range(len(ids) - 1, -1, -1) if special[i]]
    last = 1 if len(ids) > stored and ends and ends[0] == len(ids) - 1 else 0
    kept = {*range(stored - last), *range(len(ids) - last, len(ids))}
    cut = len(ids) - len(kept)
    order = [*sorted(kept), *[i for i in range(len(ids)) if i not in kept][:_MOST_LOST]] if cut else range(len(ids))
    return Tokens(stored, [Token(ids[i], texts[i], i not in kept) for i in order], cut)


def _configured(run: RunFolder | None, encoder: str) -> str | None:
    """Where the run's configuration says that the encoder's model is."""
    if run is None or run.storage.size(CONFIG) is None:
        return None
    config: Any = yaml.safe_load(run.storage.read(CONFIG))
    encoders = config.get("encoders") if isinstance(config, Mapping) else None
    named = [each for each in encoders or () if isinstance(each, Mapping) and each.get("name") == encoder]
    return str(named[0]["model"]) if named and named[0].get("model") else None


@lru_cache(maxsize=4)
def _tokenizer(model: str, revision: str | None, configured: str | None) -> tuple[Any, str | None] | None:
    """A tokenizer of the library `tokenizers`, and the digest of its folder; None if it is not on this machine."""
    from tokenizers import Tokenizer

    if TINY_MODEL in (model, configured):
        return _whole(Tokenizer.from_str(tiny_tokenizer())), None
    for folder in _folders(model, revision, configured):
        if (folder / _FILE).is_file():
            return _whole(Tokenizer.from_file(str(folder / _FILE))), tokenizer_digest(folder)
    return None


def _whole(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _folders(model: str, revision: str | None, configured: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folders = [Path(configured)] if configured and "://" not in configured else []
    for name in filter(None, (configured, model)):
        try:
            found = try_to_load_from_cache(name, _FILE, revision=revision)
        except HFValidationError:
            continue  # a local folder's name
        folders += [Path(found).parent] if isinstance(found, str) else []
    return folders
