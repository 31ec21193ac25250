"""Position information for transformers over tokens."""

import math

import torch
from torch import Tensor, nn


class RelativePositionBias(nn.Module):
    """One learned number for each head and bucket of distances, added to attention's logits.

    T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1): small distances have a bucket each, larger ones share
    buckets whose width grows with the logarithm, up to max_distance.
    """

    def __init__(self, num_heads: int, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.bidirectional, self.num_buckets, self.max_distance = bidirectional, num_buckets, max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, length: int, *, null: bool = False) -> Tensor:
        """float (num_heads, length, length): rows are the queries' positions, columns the keys'.

        Args:
            null: one more column, of a null key at position 0, so that the keys' positions are one higher than the
                queries': (num_heads, length, length + 1).
        """
        positions = torch.arange(length + null, device=self.embedding.weight.device)
        return self.embedding(self.bucket(positions[None, :] - positions[:length, None])).permute(2, 0, 1)

    def bucket(self, distance: Tensor) -> Tensor:
        """Distances, key minus query, int64 -> bucket in [0, num_buckets)."""
        count = self.num_buckets
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            offset = (distance > 0) * count
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        ratio = (distance.clamp(min=1).double() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return offset + torch.where(distance < exact, distance, far)


class Rotary(nn.Module):
    """Rotates pairs of features by angles proportional to the position (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, width: int):
        """`width`: number of leading features that are rotated; even."""
        super().__init__()
        frequencies = 10_000 ** (-torch.arange(0, width, 2).double() / width)
        # A parameter that is not trained, as in the published models, which count it.
        self.frequencies = nn.Parameter(frequencies.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., length, d) -> the same shape."""
        positions = torch.arange(x.shape[-2], device=x.device, dtype=self.frequencies.dtype)
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (length, width / 2)
        width = 2 * self.frequencies.numel()
        return torch.cat([rotate_pairs(x[..., :width], cos, sin), x[..., width:]], dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., length, 2 d), each pair of neighbouring features rotated by the angle whose cosine and sine, (length, d),
    are given -> the same shape."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def grid_angles(rows: Tensor, columns: Tensor, width: int, theta: float) -> Tensor:
    """Angles of rotary positions in two dimensions: the first half of the pairs turns with the row, the other half
    with the column (Heo et al. 2024, arXiv 2403.13298, axial frequencies).

    Args:
        rows, columns: float (n,), the coordinates of each token.
        width: number of features of a head, a multiple of 4.
        theta: the ratio of the fastest frequency, 1, to where the series of each half ends.
    Returns:
        (n, width / 2), in the dtype of the coordinates.
    """
    quarter = width // 4
    exponents = torch.arange(quarter, device=rows.device, dtype=rows.dtype) / quarter
    frequencies = theta**-exponents
    return torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)


def grid_sinusoids(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Fixed positions in two dimensions to add to tokens: sines, then cosines of the column, then those of the row,
    with the frequencies of Vaswani et al. 2017, section 3.5 (Chen et al. 2021, arXiv 2104.02057, for images).

    Args:
        rows, columns: float (n,), the coordinates of each token.
        width: a multiple of 4.
    Returns:
        (n, width), in the dtype of the coordinates.
    """
    angles = grid_angles(columns, rows, width, 10_000.0).chunk(2, dim=-1)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)
