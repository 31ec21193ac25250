"""The unit UNets are built of: a ResBlock, then perhaps attention."""

from collections.abc import Sequence

from torch import Tensor, nn

from imagen_core.models.attention import PixelAttention, StackedAttention
from imagen_core.models.base import AttentionType
from imagen_core.models.inputs import Context
from imagen_core.models.resblock import ResBlock


class Block(nn.Module):
    """A ResBlock (or a plain layer that changes the resolution), then attention or none."""

    def __init__(self, layer: nn.Module, attention: nn.Module | None):
        super().__init__()
        self.layer = layer
        self.attention = attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        x = self.layer(x, context) if isinstance(self.layer, ResBlock) else self.layer(x)
        return x if self.attention is None else self.attention(x, context.tokens, context.mask)


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next one."""

    def __init__(self, blocks: Sequence[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    @staticmethod
    def of(levels: nn.ModuleList) -> list["Level"]:
        """The levels of a list, with their type."""
        return [level for level in levels if isinstance(level, Level)]


def check_widths(widths: Sequence[int], attends: Sequence[bool], head_dim: int, num_heads: int | None) -> None:
    """Raises ValueError unless 32 divides every width, and heads divide those of levels that attend."""
    for width, attending in zip(widths, attends, strict=True):
        if width % 32:
            raise ValueError(f"embed_dim times channel_mult must be multiples of 32 (got {width})")
        if attending and width % (num_heads or head_dim):
            option = f"head_dim {head_dim}" if num_heads is None else f"num_heads {num_heads}"
            raise ValueError(f"{option} does not divide the {width} channels of a level with attention")


def make_attention(kind: AttentionType, width: int, head_dim: int, cond_dim: int) -> nn.Module:
    """Attention of `width` channels over pixels, or pixels and text tokens of width cond_dim."""
    if kind == "stacked":
        return StackedAttention(width, head_dim=head_dim, context_dim=cond_dim)
    return PixelAttention(width, kind=kind, head_dim=head_dim, context_dim=None if kind == "self" else cond_dim)
