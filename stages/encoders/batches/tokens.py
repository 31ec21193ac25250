"""Captions as token ids."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.errors import MachineError
from stages.encoders.model_files import ModelFiles


def load_tokenizer(files: ModelFiles) -> Any:
    """The model's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.model, revision=files.revision or "main", trust_remote_code=False)


def tokenize(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids with start and end tokens, at most max_tokens each; and how many captions were truncated.

    "" has at least one token, the `empty_token` if need be; another caption of which the tokenizer leaves nothing has
    none.
    """
    if not captions:
        return [], 0
    all_ids: list[list[int]] = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
    long = [i for i, ids in enumerate(all_ids) if len(ids) > max_tokens]
    if long:  # the tokenizer knows which tokens must stay at the end
        cut = tokenizer([captions[i] for i in long], truncation=True, max_length=max_tokens)["input_ids"]
        for i, ids in zip(long, cut, strict=True):
            all_ids[i] = ids
    for i, caption in enumerate(captions):
        if not caption and not all_ids[i]:
            all_ids[i] = [tokenizer.convert_tokens_to_ids(empty_token(tokenizer))]
    return all_ids, len(long)


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
