"""The projection of hidden states, and how well they fit an image encoder's features.

Shapes: b batch; h, w rows and columns of the network's patches or pixels; c its channels; d width of the features.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.models.hybrid.blocks import TransformerBlock
from imagen_core.models.transformer.blocks import PatchBlock
from imagen_core.models.transformer.model import PatchTransformer
from imagen_core.models.unet.block import Block
from imagen_core.store import Store
from imagen_core.store.read.features import FeatureReader
from imagen_core.train.alignment.config import AlignmentConfig
from imagen_core.train.config import TrainConfig
from imagen_core.train.data.randomness import RandomStream, mix
from imagen_core.train.errors import TrainError
from imagen_core.train.memory import any_conditioning
from imagen_core.train.parallel.precision import weights_dtype

_BLOCKS = (Block, PatchBlock, TransformerBlock)
_EPS = 1e-6


class Alignment(nn.Module):
    """The projector, which is trained with the network, and the hidden states of the network's newest pass."""

    def __init__(self, config: AlignmentConfig, net: nn.Module, width: int, dim: int):
        """
        Args:
            width: channels of the block's output.
            dim: width of the features.
        Raises:
            TrainError: the network has no such block.
        """
        super().__init__()
        self.config = config
        if config.projection == "conv":
            self.projector: nn.Module = nn.Conv2d(width, dim, 3, padding=1)
        else:
            hidden = config.hidden_dim
            self.projector = nn.Sequential(
                nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
            )
        self._patch_px = net.config.patch_px if isinstance(net, PatchTransformer) else None
        self._kept: dict[str, Tensor] = {}
        name, block = aligned_block(net, config.block)
        self._block_name = name
        keep = self._kept

        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            keep["hidden"] = output

        block.register_forward_hook(hook)

    def forward(self, shape: tuple[int, int], features: Tensor | None) -> Tensor:
        """The mean cosine of each image's patches to its features, at least float32 (b,), after a pass of the network.

        Args:
            shape: height and width of the network's images.
            features: (b, rows, columns, d); None: zeros are returned, of which all gradients are zero.
        """
        hidden = self._hidden(shape)
        if features is None:  # processes share gradients of all parameters at every step
            return (self._project(hidden[:, :, :1, :1].detach()).sum(dim=(1, 2, 3)) * 0).float()
        projected = self._project(hidden)
        exact = torch.promote_types(projected.dtype, torch.float32)
        target = resized_features(features.to(exact), (hidden.shape[2], hidden.shape[3]), self.config.spatial_norm)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.cosine_similarity(projected.to(exact), target, dim=1).mean(dim=(1, 2))

    def _hidden(self, shape: tuple[int, int]) -> Tensor:
        """The block's output as (b, c, h, w); tokens without a place are left out."""
        hidden = self._kept.pop("hidden")
        if hidden.ndim == 4 or self._patch_px is None:
            return hidden
        rows, columns = (side // self._patch_px for side in shape)
        return hidden[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))

    def _project(self, hidden: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, d, h, w)."""
        if self.config.projection == "conv":
            return self.projector(hidden)
        return self.projector(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resized_features(features: Tensor, grid: tuple[int, int], spatial_norm: float | None) -> Tensor:
    """(b, rows, columns, d) -> (b, d, *grid): normalised if asked for, then interpolated, antialiased."""
    target = features.permute(0, 3, 1, 2)
    if spatial_norm is not None:
        mean, deviation = target.mean(dim=(2, 3), keepdim=True), target.std(dim=(2, 3), keepdim=True, correction=0)
        target = (target - spatial_norm * mean) / (deviation + _EPS)
    if target.shape[2:] == grid:
        return target
    return F.interpolate(target, size=grid, mode="bilinear", antialias=True)


def aligned_block(net: nn.Module, block: int | str) -> tuple[str, nn.Module]:
    """Name in the network, and module, of the block that a configuration names.

    Raises:
        TrainError: there is none.
    """
    known = {name: module for name, module in net.named_modules() if isinstance(module, _BLOCKS)}
    if isinstance(block, int) and isinstance(net, PatchTransformer):
        if block > len(net.blocks):
            raise TrainError(f"alignment.block: {block} is none of the {len(net.blocks)} blocks of the transformer")
        block = f"blocks.{block - 1}"
    if not isinstance(block, str) or block not in known:
        number = " or a number from 1" if isinstance(net, PatchTransformer) else ""
        raise TrainError(
            f"alignment.block: {block!r} is no block of the network; name one of {', '.join(known)}{number}"
        )
    return block, known[block]


def hidden_width(settings: DenoiserConfig, block: int | str) -> int:
    """Channels of a block's output, from a run on tensors without data.

    Raises:
        TrainError: there is no such block.
    """
    widths: list[int] = []
    with FakeTensorMode(), torch.device("meta"), torch.no_grad():
        net = Denoiser(settings).net
        _, module = aligned_block(net, block)
        module.register_forward_hook(
            lambda _module, _inputs, output: widths.append(output.shape[1 if output.ndim == 4 else 2])
        )
        net(torch.randn(1, *settings.shape), torch.zeros(1), any_conditioning(settings, settings.shape, 2))
    return widths[-1]


def num_projector_parameters(settings: DenoiserConfig, config: AlignmentConfig, dim: int) -> int:
    """Parameters that an alignment adds to a training.

    Args:
        dim: width of the features.
    Raises:
        TrainError: the network has no such block.
    """
    width = hidden_width(settings, config.block)
    with torch.device("meta"):
        projector = Alignment(config, Denoiser(settings).net, width, dim)
    return sum(parameter.numel() for parameter in projector.parameters())


def make_alignment(
    denoiser: Denoiser, config: TrainConfig, stores: Mapping[str, Store], device: torch.device
) -> Alignment | None:
    """The alignment of a training, with the same new projector on every process; None without.

    Raises:
        TrainError: the network has no such block.
    """
    settings = config.denoiser
    if config.alignment is None or not isinstance(settings, DenoiserConfig):
        return None
    dim = FeatureReader(next(iter(stores.values())), config.alignment.encoder).dim
    width = hidden_width(settings, config.alignment.block)
    torch.manual_seed(mix(config.seed, RandomStream.PROJECTOR))
    return Alignment(config.alignment, denoiser.net, width, dim).to(device, weights_dtype(config.precision))
