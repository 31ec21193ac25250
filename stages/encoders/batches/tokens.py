"""Captions as token ids."""

from collections.abc import Sequence
from typing import Any

from stages.encoders.model_files import ModelFiles


def load_tokenizer(files: ModelFiles) -> Any:
    """The model's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.model, revision=files.revision or "main", trust_remote_code=False)


def tokenize(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids with start and end tokens, at most max_tokens each; and how many captions were truncated."""
    if not captions:
        return [], 0
    all_ids: list[list[int]] = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
    long = [i for i, ids in enumerate(all_ids) if len(ids) > max_tokens]
    if long:  # the tokenizer knows which tokens must stay at the end
        cut = tokenizer([captions[i] for i in long], truncation=True, max_length=max_tokens)["input_ids"]
        for i, ids in zip(long, cut, strict=True):
            all_ids[i] = ids
    return all_ids, len(long)
