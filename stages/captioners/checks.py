"""What is wrong with a caption that came back."""

import json
import re
from collections.abc import Sequence
from operator import eq
from typing import Literal

from pydantic import Field, field_validator

from pipeline.config import Config
from stages.captions import clean_captions

_LONGEST_PHRASE = 40
_REFUSAL_WITHIN = 200
_SPACE_SHARE = 0.02
"""Texts with fewer spaces by character have no words, as Chinese and Japanese; there characters are compared."""


class ChecksConfig(Config):
    """What makes a caption bad."""

    refusals: tuple[str, ...] = (
        r"\bI(?:'m| am) (?:sorry|unable|not able)\b",
        r"\bI (?:can(?:no|')t|cannot|won't) (?:help|assist|describe|provide|comply|identify|process|view|see)\b",
        r"\bas an AI\b",
    )
    """Regular expressions; a caption of which one matches within its first 200 characters, whatever the case, is
    `refused`."""
    max_repeats: int | None = Field(default=8, ge=1)
    """A phrase of up to 40 words that follows itself more often than this is a `loop`. null: not looked for."""
    allow_cut: bool = False
    """Take captions that were cut at max_tokens; otherwise they are `cut`."""
    expect: Literal["text", "json"] = "text"
    """json: a caption that does not parse as JSON is `not_json`. It is stored as it came."""

    @field_validator("refusals")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return patterns


def problem_of(text: str, finish_reason: str | None, checks: ChecksConfig) -> tuple[str, str] | None:
    """Reason and detail of what is wrong with a caption; None if nothing is.

    Args:
        finish_reason: as chat-completions servers say it: `length` if it was cut, `content_filter` if it was withheld.
    """
    if finish_reason == "content_filter":
        return "refused", "content_filter"
    captions, unusable = clean_captions([text])
    if unusable is not None:
        return ("empty_answer", "") if unusable == "empty_caption" else (unusable, "")
    (caption,) = captions
    if any(re.search(pattern, caption[:_REFUSAL_WITHIN], re.IGNORECASE) for pattern in checks.refusals):
        return "refused", _shown(caption)
    if checks.max_repeats is not None and (phrase := repeated_phrase(caption, checks.max_repeats)):
        return "loop", _shown(phrase)
    if finish_reason == "length" and not checks.allow_cut:
        return "cut", _shown(caption)
    if checks.expect == "json":
        try:
            json.loads(caption)
        except ValueError:
            return "not_json", _shown(caption)
    return None


def repeated_phrase(text: str, max_repeats: int) -> str:
    """A phrase that occurs more than `max_repeats` + 1 times in a row; "" if there is none."""
    words: Sequence[str] = text.split()
    separator = " "
    if len(words) < _SPACE_SHARE * len(text):
        words, separator = text, ""
    for length in range(1, min(_LONGEST_PHRASE, len(words) // (max_repeats + 1)) + 1):
        same = bytes(map(eq, words[length:], words))
        begin = same.find(b"\1" * (length * max_repeats + 1))
        if begin >= 0:
            end = begin + length * (max_repeats + 1) + 1
            return separator.join(words[end - length : end])
    return ""


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else f"{line[:120]}..."
