"""Captions as token ids."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import MachineError
from stages.encoders.model_files import ModelFiles

_CHARACTERS_PER_TOKEN = 16
_MORE = 4
_WORD_END = re.compile(r"\w ")
_SPACE_BEHIND_TEXT = re.compile("[^\\s\u2581\u0120][\\s\u2581\u0120]")
"""In a token: U+2581 is the space of SentencePiece, U+0120 that of byte-level BPE."""


def load_tokenizer(files: ModelFiles) -> Any:
    """The model's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.model, revision=files.revision or "main", trust_remote_code=False)


def tokenize(
    tokenizer: Any, captions: Sequence[str], max_tokens: int, *, special_tokens: bool = True
) -> tuple[list[list[int]], int]:
    """Token ids with start and end tokens, at most max_tokens each; and how many captions were truncated.

    "" has at least one token, the `empty_token` if need be; another caption of which the tokenizer leaves nothing has
    none. Of a caption much longer than max_tokens only the beginning is read where that gives the same tokens.
    """
    if not captions:
        return [], 0
    options = {} if special_tokens else {"add_special_tokens": False}
    captions, all_ids = _beginnings(tokenizer, captions, max_tokens, options)
    long = [i for i, ids in enumerate(all_ids) if len(ids) > max_tokens]
    if long:  # the tokenizer knows which tokens must stay at the end
        cut = tokenizer([captions[i] for i in long], truncation=True, max_length=max_tokens, **options)["input_ids"]
        for i, ids in zip(long, cut, strict=True):
            all_ids[i] = ids
    for i, caption in enumerate(captions):
        if not caption and not all_ids[i]:
            all_ids[i] = [tokenizer.convert_tokens_to_ids(empty_token(tokenizer))]
    return all_ids, len(long)


def _beginnings(
    tokenizer: Any, captions: Sequence[str], max_tokens: int, options: Mapping[str, bool]
) -> tuple[list[str], list[list[int]]]:
    """Of each caption as much as has more than max_tokens tokens, or all of it; and the token ids of that."""
    texts, characters = list(captions), _CHARACTERS_PER_TOKEN * max_tokens
    shortened = {i for i, caption in enumerate(captions) if len(caption) > _MORE * characters}
    if shortened and not reads_words_alone(tokenizer):
        shortened.clear()
    for i in shortened:
        texts[i] = _beginning(captions[i], characters)
    all_ids: list[list[int]] = tokenizer(texts, truncation=False, verbose=False, **options)["input_ids"]
    while short := [i for i in shortened if len(all_ids[i]) <= max_tokens and len(texts[i]) < len(captions[i])]:
        characters *= _MORE
        for i in short:
            texts[i] = _beginning(captions[i], characters)
        again = tokenizer([texts[i] for i in short], truncation=False, verbose=False, **options)["input_ids"]
        for i, ids in zip(short, again, strict=True):
            all_ids[i] = ids
    return texts, all_ids


def _beginning(caption: str, characters: int) -> str:
    """The caption up to the first space behind these many characters that ends a word; all of it if none does."""
    for found in _WORD_END.finditer(caption, characters):
        if unicodedata.is_normalized("NFKC", found[0][0]):
            return caption[: found.start() + 1]
    return caption


def reads_words_alone(tokenizer: Any) -> bool:
    """Whether the tokens of a text up to the end of a word cannot depend on what follows behind a space.

    So it is where no token of the vocabulary goes on behind a space, and unknown text does not make a token of more
    than its word.
    """
    if tokenizer.truncation_side != "right" or any(map(_SPACE_BEHIND_TEXT.search, tokenizer.get_vocab())):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from transformers import ByT5Tokenizer

        return isinstance(tokenizer, ByT5Tokenizer)
    if json.loads(backend.to_str())["model"]["type"] in ("BPE", "Unigram"):
        return True
    return backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str("a b")) > 1


def empty_token(tokenizer: Any) -> str | None:
    """The token that stands for "" where the tokenizer gives it none, as those of many language models: the one that
    begins a text, else the one that ends it, else padding. None if "" has tokens of its own.

    Raises:
        MachineError: the tokenizer has none of these.
    """
    if tokenizer("", verbose=False)["input_ids"]:
        return None
    for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        if token is not None:
            return str(token)
    raise MachineError(
        f"encoders.model: {tokenizer.name_or_path}: its tokenizer gives no token for the empty caption, and has no "
        "bos_token, eos_token or pad_token to stand for it; name one in its tokenizer_config.json"
    )


def unknown_id(tokenizer: Any) -> int | None:
    """The token for text that the vocabulary lacks; None without one, or if it also begins, ends or pads a text."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        unknown = _unknown_of_backend(getattr(tokenizer, "backend_tokenizer", None))
    other = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if unknown in other or unknown in tokenizer("", verbose=False)["input_ids"] else unknown


def _unknown_of_backend(backend: Any) -> int | None:
    """The same as the model of a fast tokenizer knows it, which a tokenizer_config.json may not name."""
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else backend.token_to_id(token)
