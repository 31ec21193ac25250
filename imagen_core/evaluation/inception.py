"""The network of FID: Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as TensorFlow published it in 2015.

Weights are named as in torchvision, and so as in pytorch-fid's conversion. The network is not torchvision's: average
pools leave out the padding, the pool of the last block takes the maximum, and there are 1008 classes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_PX = 299
FEATURE_DIM = 2048
NUM_CLASSES = 1008

_Kernel = int | tuple[int, int]
_Step = tuple[str, int, _Kernel]  # name, output channels, kernel
_Branch = list[_Step | list[_Step]]  # a list of steps works side by side on the same input


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: _Kernel, stride: int = 1, *, same: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, and a pool; (b, c, h, w) -> (b, sum of the branches', h, w), or half of h and w."""

    def __init__(self, in_channels: int, branches: list[_Branch], *, pool: str, pool_channels: int | None):
        """`pool` is mean, max, or halving, as is then the last step of each branch; `pool_channels` are those of the
        convolution after it, None for none."""
        super().__init__()
        self._pool, self._names = pool, []
        for branch in branches:
            channels, names = in_channels, []
            for number, step in enumerate(branch, 1):
                stride = 2 if pool == "halving" and number == len(branch) else 1
                side_by_side = step if isinstance(step, list) else [step]
                for name, out, kernel in side_by_side:
                    self.add_module(name, _Conv(channels, out, kernel, stride))
                names.append([name for name, _, _ in side_by_side])
                channels = sum(out for _, out, _ in side_by_side)
            self._names.append(names)
        self.branch_pool = None if pool_channels is None else _Conv(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self._names:
            y = x
            for names in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            results.append(y)
        pooled = _POOLS[self._pool](x)
        return torch.cat([*results, pooled if self.branch_pool is None else self.branch_pool(pooled)], dim=1)


_POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halving": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _a(in_channels: int, pool_channels: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return _Mixed(in_channels, branches, pool="mean", pool_channels=pool_channels)


def _b(in_channels: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch3x3", 384, 3)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return _Mixed(in_channels, branches, pool="halving", pool_channels=None)


def _c(in_channels: int, width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    branches: list[_Branch] = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ],
    ]
    return _Mixed(in_channels, branches, pool="mean", pool_channels=192)


def _d(in_channels: int) -> _Mixed:
    branches: list[_Branch] = [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        ],
    ]
    return _Mixed(in_channels, branches, pool="halving", pool_channels=None)


def _e(in_channels: int, pool: str) -> _Mixed:
    branches: list[_Branch] = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
    ]
    return _Mixed(in_channels, branches, pool=pool, pool_channels=192)


class FidInception(nn.Module):
    """Features and logits of images."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, w) for w in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")
        self.fc = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, 2048) and logits (b, 1008) of images (b, 3, h, w) in [-1, 1], of any size.

        Images are resized bilinearly without antialiasing, and logits have no bias: so the published scores are
        computed.
        """
        x = F.interpolate(images, size=(INPUT_PX, INPUT_PX), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "FidInception":
        """The network with these weights, by torchvision's names.

        Raises:
            ValueError: some are missing, unknown, or of another shape.
        """
        network = cls()
        own = network.state_dict()
        counters = {name for name in own if name.endswith("num_batches_tracked")}
        missing = sorted(own.keys() - counters - weights.keys())
        unknown = sorted(weights.keys() - own.keys())
        shapes = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
        for what, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes of", shapes)):
            if names:
                raise ValueError(f"{what} {len(names)} weights of FID's Inception v3 ({', '.join(names[:3])} ...)")
        network.load_state_dict(weights, strict=False)
        return network
