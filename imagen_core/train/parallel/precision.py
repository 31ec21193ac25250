"""Training in half precision: what the network computes in, and what keeps float16's gradients in its range."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from imagen_core.train.config import Precision

_GROW_AFTER = 2000  # steps without an overflow
_LARGEST = 2.0**24


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type of autocast; None for full precision."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def weights_dtype(precision: Precision) -> torch.dtype:
    """The type of weights, and of what is not computed in the type of autocast."""
    return torch.float64 if precision == "float64" else torch.float32


@contextmanager
def kernel_settings(*, tf32: bool, cudnn_autotune: bool = False) -> Iterator[None]:
    """Settings of the process within this block, restored at the end.

    Args:
        tf32: float32 matrix products and convolutions may round their inputs to TensorFloat-32 (10 bits of mantissa).
        cudnn_autotune: cuDNN measures which of its convolutions is the fastest for each shape.
    """
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark = tf32, cudnn_autotune or cudnn.benchmark
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]


@dataclass(slots=True)
class LossScale:
    """Factor of the loss, so that small gradients do not vanish in float16.

    Dynamic (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2): halved when a gradient overflows, whose step is
    skipped, and doubled after 2000 steps without an overflow. bfloat16 has the range of float32 and needs none.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def grow(self) -> None:
        """After a step."""
        self.good_steps += 1
        if self.good_steps >= _GROW_AFTER:
            self.value, self.good_steps = min(2 * self.value, _LARGEST), 0

    def shrink(self) -> None:
        """After an overflow."""
        self.value, self.good_steps = self.value / 2, 0
