"""LPIPS: how different two images look (Zhang et al. 2018, arXiv 1801.03924), version 0.1 of its weights.

Weights are named as they are published: `features.*` of torchvision's AlexNet or VGG-16, `lin*` of the distance.
"""

from collections.abc import Mapping

from torch import Tensor, nn

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
_ALEX = ((64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Lpips(nn.Module):
    """The distance of pairs of images; 0 for equal ones."""

    def __init__(self, network: str):
        """`network`: alex or vgg."""
        super().__init__()
        self.features, self._ends, widths = _alex() if network == "alex" else _vgg()
        for number, width in enumerate(widths):
            self.add_module(f"lin{number}", nn.Conv2d(width, 1, 1, bias=False))

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "Lpips":
        """The network that the weights belong to, with these weights; a classifier's are ignored.

        Raises:
            ValueError: some are missing, unknown, or of another shape.
        """
        first = weights.get("features.0.weight")
        own = cls("alex" if first is not None and first.shape[-1] == 11 else "vgg")
        weights = {
            name.replace(".model.1.", "."): value
            for name, value in weights.items()
            if not name.startswith("classifier.")
        }
        expected = own.state_dict()
        wrong = sorted(
            name
            for name in expected.keys() | weights.keys()
            if name not in weights or name not in expected or weights[name].shape != expected[name].shape
        )
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing, unknown or of another shape ({', '.join(wrong[:3])})")
        own.load_state_dict(weights)
        return own

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] twice -> (b,).

        Raises:
            ValueError: images smaller than the network's layers.
        """
        least = 31 if isinstance(self.features[2], nn.MaxPool2d) else 16
        if min(a.shape[-2:]) < least:
            raise ValueError(f"images of {a.shape[-1]} x {a.shape[-2]} px; this network needs {least}")
        distance = a.new_zeros(len(a))
        for number, (left, right) in enumerate(zip(self._maps(a), self._maps(b), strict=True)):
            distance = distance + self.get_submodule(f"lin{number}")((left - right) ** 2).mean(dim=(1, 2, 3))
        return distance

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Outputs of five layers, with the channels of each position normalised to length 1."""
        x = (x - x.new_tensor(_SHIFT).view(3, 1, 1)) / x.new_tensor(_SCALE).view(3, 1, 1)
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._ends:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found


def _alex() -> tuple[nn.Sequential, list[int], list[int]]:
    layers: list[nn.Module] = []
    ends, widths, width = [], [], 3
    for step in _ALEX:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(3, 2))
            continue
        out, kernel, stride, padding = step
        layers += [nn.Conv2d(width, out, kernel, stride, padding), nn.ReLU()]
        ends.append(len(layers) - 1)
        widths.append(out)
        width = out
    return nn.Sequential(*layers), ends, widths


def _vgg() -> tuple[nn.Sequential, list[int], list[int]]:
    layers: list[nn.Module] = []
    ends, width = [], 3
    for block in _VGG_WIDTHS:
        layers += [nn.MaxPool2d(2, 2)] if layers else []
        for out in block:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        ends.append(len(layers) - 1)
    return nn.Sequential(*layers), ends, [block[-1] for block in _VGG_WIDTHS]
