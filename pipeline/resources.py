"""What a task occupies, and how much work it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RowsOfCaptions = Sequence[tuple[str, ...]]
"""The captions of each row."""
CaptionsBySet = Mapping[str, RowsOfCaptions]
"""Those of further sets, by the set's name."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one task or worker occupies while it runs."""

    num_cpus: float = 1.0
    num_gpus: float | None = 0.0
    """None means one GPU on a machine with GPUs, and none elsewhere."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of a Ray cluster's nodes."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The work that a stage would have, counted without doing it."""

    counter: str
    """The counter of `GroupResult` that counts the same work once it is done."""
    units: float
    """Amount of work, in units of the counter."""
    flops: float
    """Floating-point operations; a multiply-add counts as two."""
    dtype: str
    """Type of these operations, `bfloat16` or `float32`."""
    bytes: Mapping[str, int]
    """Bytes on disk, by group."""
    bytes_otherwise: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Bytes that the same would take in other layouts, to compare with: by group and by the layout's name."""
