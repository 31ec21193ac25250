"""Batches of captions by length: the captions of a batch have equal or similar lengths."""

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int, *, padded: bool = False) -> list[list[int]]:
    """Splits captions, sorted by length, into batches of at most `tokens_per_batch` tokens.

    Args:
        lengths: number of tokens of each caption.
        tokens_per_batch: limit for the sum of the lengths of a batch; a longer caption is a batch by itself.
        padded: every caption counts as if it were as long as the longest of its batch.

    Returns:
        Indices into `lengths`, batch by batch, longest captions first (memory peaks in the first batch). Depends
        only on the arguments.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[batches[-1][0]] if padded and batches else lengths[index]
        if not batches or cost > room:
            batches.append([])
            room, cost = tokens_per_batch, lengths[index]
        batches[-1].append(index)
        room -= cost
    return batches
