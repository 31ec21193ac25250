"""A stage that adds a score and a mask to the store."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from imagen_core.store import ArraySpec, Sample, image_group
from stages.arrays.base import ArrayStageConfig, MakeArrays
from stages.filters.base import Rejection

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness, of ITU-R BT.601."""


class BrightPixels(ArrayStageConfig):
    """`NAME-mean`: mean brightness, 0 to 255. `NAME-mask`: the bright pixels, cut to their bounding box."""

    kind: Literal["bright_pixels"] = "bright_pixels"
    name: str = "bright"
    """Begins the names of the arrays."""
    from_px: int
    """Size of the stored images that are read."""
    threshold: int = 128
    """Least brightness of a bright pixel."""
    least_mean: float = 0
    """Samples that are darker are excluded from the store (`too_dark`)."""

    def arrays(self) -> Mapping[str, ArraySpec]:
        return {f"{self.name}-mean": ArraySpec("float32"), f"{self.name}-mask": ArraySpec("bool", (None, None))}

    def reads(self) -> tuple[str, ...]:
        return (image_group(self.from_px),)

    def build(self) -> MakeArrays:
        return self.measure

    def measure(self, samples: Iterable[Sample]) -> Iterator[Mapping[str, np.ndarray] | Rejection]:
        """A stage with a model would load it in `build`, and take `itertools.islice(samples, 32)` at a time."""
        for sample in samples:
            brightness = sample.images[self.from_px] @ LUMA  # (height, width), 0 to 255
            mean = brightness.mean()
            if mean < self.least_mean:
                yield Rejection("too_dark", f"mean brightness {mean}")
                continue
            bright = brightness >= self.threshold
            rows, columns = np.nonzero(bright.any(axis=1))[0], np.nonzero(bright.any(axis=0))[0]
            mask = bright[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else bright[:0, :0]
            yield {f"{self.name}-mean": mean, f"{self.name}-mask": mask}
