"""Batches of captions by length, so that little of a batch is padding."""

from collections.abc import Sequence

PAD_MULTIPLE = 8
"""Batch lengths are rounded up to this: few distinct shapes, and full tensor-core tiles."""


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cuts captions, sorted by length, into batches of at most `tokens_per_batch` padded tokens.

    Args:
        lengths: tokens of each caption.
        tokens_per_batch: rows x padded length of a batch; a longer caption gets a batch of its own.

    Returns:
        Indices into `lengths`, batch by batch, longest captions first (memory peaks at once). Depends on
        nothing but the arguments.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * width > tokens_per_batch:
            batches.append(batch)
            batch = []
        if not batch:
            width = padded_length(lengths[index])
        batch.append(index)
    if batch:
        batches.append(batch)
    return batches


def padded_length(num_tokens: int) -> int:
    """`num_tokens` rounded up to `PAD_MULTIPLE`."""
    return -(-num_tokens // PAD_MULTIPLE) * PAD_MULTIPLE
