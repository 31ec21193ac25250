"""What an encoder does not see of the captions: what max_tokens cuts off, and text that its vocabulary lacks."""

from collections.abc import Mapping

UNKNOWN_WARNING = 0.01
"""Share of `<unk>` tokens above which a run warns."""


def caption_losses(counters: Mapping[str, float]) -> dict[str, float]:
    """Captions, truncated captions, tokens, `<unk>` tokens and their share, from the counters of one or more shards;
    empty for a group that is not encoded here, or that an earlier version encoded."""
    if "unk_tokens" not in counters:
        return {}
    return {
        "captions": counters["captions_encoded"],
        "truncated": counters["captions_truncated"],
        "tokens": counters["tokens"],
        "unk_tokens": counters["unk_tokens"],
        "unk_share": counters["unk_tokens"] / max(1, counters["tokens"]),
    }


def caption_losses_line(losses: Mapping[str, float]) -> str:
    """The losses as text, with a warning if the share of `<unk>` is high; "" if nothing is lost."""
    parts = []
    if losses["truncated"]:
        parts.append(f"{losses['truncated']:,.0f} of {losses['captions']:,.0f} captions truncated")
    if losses["unk_tokens"]:
        tokens = f"{losses['unk_tokens']:,.0f} of {losses['tokens']:,.0f} tokens"
        parts.append(f"{tokens} are unknown to the tokenizer ({losses['unk_share']:.2%})")
    if losses["unk_share"] > UNKNOWN_WARNING:
        parts.append("warning: captions that differ in such text look the same to the model")
    return "; ".join(parts)
