"""Reads what a chat-completions server sends back."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.captioners.base import Answer
from stages.sources.download.open_url import retry_after_s

_BUSY = (408, 425, 429, 502, 503, 504, 529)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is final."""

    answer: Answer
    has_usage: bool = True
    named: str | None = None
    """What the server calls the model."""


@dataclass(frozen=True, slots=True)
class Again:
    """The request has to be made again."""

    reason: str
    detail: str
    limited: bool = False
    """Only a few times: it may be this image."""
    pause_s: float = 0.0
    """What the server asked for."""


def read_reply(
    status: int, headers: Mapping[str, str], body: bytes, model: str | None, shown: Callable[[object], str]
) -> Reply | Again:
    """What a response means.

    Args:
        model: the name that the server is known to answer with; None: not known.
        shown: makes a text of the server fit for messages.
    """
    if status in _BUSY:
        return Again("server_busy", f"HTTP {status} ({shown(body)})", pause_s=retry_after_s(headers, time.time()))
    if status >= 500:
        return Again("server_error", f"HTTP {status} ({shown(body)})", limited=True)
    if status >= 400:
        reason = "image_too_large" if status == 413 else "request_refused"
        return Reply(Answer(problem=(reason, f"HTTP {status} ({shown(body)})")))
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text, finish_reason = _text(choice["message"].get("content")), choice.get("finish_reason")
        usage = found.get("usage")
        tokens_in, tokens_out = (int(usage[n]) if usage else 0 for n in ("prompt_tokens", "completion_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Again("no_answer", shown(body), limited=True)
    named = found.get("model")
    if model is not None and named is not None and named != model:
        return Again("other_model", shown(repr(named)), limited=True)
    answer = Answer(text, finish_reason if isinstance(finish_reason, str) else None, tokens_in, tokens_out)
    return Reply(answer, bool(usage), None if named is None else str(named))


def _text(content: Any) -> str:
    """The text of a message, which may have parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(content)
    return content or ""
