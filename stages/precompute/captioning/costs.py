"""Requests, tokens and money of captioners: what a run will need, and what it took."""

from collections.abc import Mapping
from itertools import islice

from imagen_core.store import captions_group
from pipeline.storage.run_folder import RunFolder
from stages.captioners.base import ModelCaptionerConfig
from stages.captioners.budget import Price
from stages.captioners.openai import OpenaiCaptionerConfig
from stages.precompute.captioning.make import USED

_CHARACTERS_PER_TOKEN = 4
_TOKEN_PX = 28
_MEASURED_SHARDS = 20


def expected_cost(run: RunFolder, captioner: ModelCaptionerConfig, rows: int) -> dict[str, object]:
    """What the captions of so many rows will need, as an entry of the preview.

    By the requests of the first finished shards; where there are none, by the longest answer, an image of image_px as
    many patches of 28 x 28 px, and four characters of the prompt a token.
    """
    totals = dict.fromkeys(USED, 0.0)
    done = 0
    for record in islice(run.records(captions_group(captioner.name)), _MEASURED_SHARDS):
        done += record.rows
        for name in USED:
            totals[name] += record.counters.get(name, 0)
    if done and totals["requests"]:
        per_row, basis = {name: totals[name] / done for name in USED}, f"measured on {done:,} samples"
    else:
        tokens_in = len(captioner.prompt) / _CHARACTERS_PER_TOKEN + (captioner.image_px / _TOKEN_PX) ** 2
        per_row = {"requests": 1.0, "tokens_in": tokens_in, "tokens_out": float(captioner.max_tokens)}
        basis = "estimated: square images, the longest answers, one attempt"
    counts = {name: round(rows * value) for name, value in per_row.items()}
    cost = price_of(captioner, counts)
    text = f"{counts['requests']:,} requests, {counts['tokens_in']:,} tokens in, {counts['tokens_out']:,} out"
    money = {} if cost is None else {"cost": cost}
    return {**counts, **money, "basis": basis, "text": f"{text}{_told(cost)} ({basis})"}


def captions_line(captioner: ModelCaptionerConfig | None, counters: Mapping[str, float]) -> str:
    """What a set of captions took, as text; "" for another group."""
    if "requests" not in counters or "tokens_in" not in counters:
        return ""
    used = f"{counters['captions']:,.0f} captions from {counters['requests']:,.0f} requests, "
    used += f"{counters['tokens_in']:,.0f} tokens in, {counters['tokens_out']:,.0f} out"
    return used + ("" if captioner is None else _told(price_of(captioner, counters)))


def price_of(captioner: ModelCaptionerConfig, counters: Mapping[str, float]) -> float | None:
    """The price of tokens; None if none is given."""
    price: Price | None = captioner.price_per_million if isinstance(captioner, OpenaiCaptionerConfig) else None
    return None if price is None else price.of(counters["tokens_in"], counters["tokens_out"])


def _told(cost: float | None) -> str:
    return "" if cost is None else f", {cost:,.4g} by price_per_million"
