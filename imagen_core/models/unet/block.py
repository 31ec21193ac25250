"""The unit that UNets are built of: a ResBlock, then optional attention."""

from collections.abc import Sequence

from torch import Tensor, nn

from imagen_core.models.conditioning.transcription_attention import TranscriptionAttention
from imagen_core.models.layers.attention import ModuleT, PixelAttention, StackedAttention
from imagen_core.models.layers.context import Context
from imagen_core.models.layers.resblock import ResBlock
from imagen_core.models.unet.base import AttentionUNetConfig


class Block(nn.Module):
    """A ResBlock (or a layer that changes the resolution), then optional attention, also to a transcription."""

    def __init__(
        self,
        layer: nn.Module,
        attention: nn.Module | None,
        transcription_attention: TranscriptionAttention | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.attention = attention
        self.transcription_attention = transcription_attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        x = self.layer(x, context) if isinstance(self.layer, ResBlock) else self.layer(x)
        x = x if self.attention is None else self.attention(x, context.tokens, context.mask)
        return x if self.transcription_attention is None else self.transcription_attention(x, context)


class Level(nn.Module):
    """The blocks of one resolution, and the layer that leads to the next one (None at the last)."""

    def __init__(self, blocks: Sequence[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


def of_type(modules: nn.ModuleList, kind: type[ModuleT]) -> list[ModuleT]:
    """The modules of a list that are instances of `kind`, typed as such for static checkers."""
    return [module for module in modules if isinstance(module, kind)]


def check_widths(widths: Sequence[int], attends: Sequence[bool], head_dim: int, num_heads: int | None) -> None:
    """Raises ValueError unless 32 divides every width, and heads divide the widths of levels that attend."""
    for width, attending in zip(widths, attends, strict=True):
        if width % 32:
            raise ValueError(f"embed_dim times channel_mult must be multiples of 32 (got {width})")
        if attending and width % (num_heads or head_dim):
            option = f"head_dim {head_dim}" if num_heads is None else f"num_heads {num_heads}"
            raise ValueError(f"{option} does not divide the {width} channels of a level with attention")


def make_attention(config: AttentionUNetConfig, width: int, cond_dim: int, num_heads: int | None = None) -> nn.Module:
    """Attention of `width` channels over pixels, or pixels and text tokens of width cond_dim; num_heads overrides the
    configuration's."""
    kind, grouped = config.attention_type, config.padded_tokens is not None
    head_dim = config.head_width(width, num_heads)
    if kind == "stacked":
        return StackedAttention(width, head_dim=head_dim, context_dim=cond_dim, group_context=grouped)
    context_dim = None if kind == "self" else cond_dim
    return PixelAttention(
        width,
        kind=kind,
        head_dim=head_dim,
        context_dim=context_dim,
        group_context=grouped,
        shared_norm=config.shared_norm,
    )


def make_transcription_attention(
    config: AttentionUNetConfig, level: int, width: int, *, up: bool
) -> TranscriptionAttention | None:
    """Attention of `width` channels to a transcription; None if this level has none on the way `up`, or down."""
    settings, side = config.transcription, config.sides_px[level]
    if settings is None or side not in settings.resolutions or (settings.up_only and not up):
        return None
    return TranscriptionAttention(settings, width, side, config.time_dim)
