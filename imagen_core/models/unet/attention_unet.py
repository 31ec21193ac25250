"""What the Regular and the Efficient UNet share: the stem in front of their levels, and how a block is run."""

from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning
from imagen_core.models.layers.context import Context
from imagen_core.models.unet.base import AttentionUNetConfig
from imagen_core.models.unet.inputs import Inputs, check_sides, concatenate_images, run_block


class AttentionUNet(nn.Module):
    """Predicts from a noisy image, its noise level and the conditioning. The objective decides what it predicts."""

    def __init__(self, config: AttentionUNetConfig, cond_dim: int, *, attends: bool):
        """
        Args:
            cond_dim: width of the tokens that blocks attend to.
            attends: whether any block attends to conditions.
        """
        super().__init__()
        self.config = config
        self.inputs = Inputs(config, cond_dim, attends=attends)
        kernel = config.init_kernel_size
        self.conv_in = nn.Conv2d(config.input_channels, config.widths[0], kernel, padding=kernel // 2)

    def stem(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> tuple[Tensor, Context]:
        """x (b, in_channels, h, w), c_noise (b,) -> features (b, widths[0], h, w), and what every block reads.

        Raises:
            ValueError: the levels do not divide the sides, or a condition is missing.
        """
        check_sides(x, self.config.sides_divisor)
        context = self.inputs(c_noise, conditioning)
        return self.conv_in(concatenate_images(x, conditioning, self.config)), context

    def run(self, block: nn.Module, x: Tensor, context: Context, *, recompute: bool = True) -> Tensor:
        """Runs a block, with activation checkpointing if the configuration and `recompute` ask for it."""
        return run_block(block, x, context, recompute=recompute and self.config.activation_checkpointing)
