"""How a caption's embedding as one vector reaches a UNet."""

import torch
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning, keep_mask


class TextEmbedConditioning(nn.Module):
    """A caption as one vector, such as CLIP's pooled state, that is added to the time vector.

    As in Stable Diffusion 3 and FLUX (Esser et al. 2024, arXiv 2403.03206): two linear layers. A learned vector
    replaces the embedding of a caption that is dropped.
    """

    def __init__(self, text_embed_dim: int, time_dim: int):
        super().__init__()
        self.text_embed_dim = text_embed_dim
        self.to_vector = nn.Sequential(nn.Linear(text_embed_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.null_vector = nn.Parameter(torch.zeros(time_dim))

    def forward(self, conditioning: Conditioning) -> Tensor:
        """Returns the vector (b, time_dim).

        Raises:
            ValueError: the embedding is missing or of another width.
        """
        embed = conditioning.text_embed
        if embed is None:
            raise ValueError("conditioning.text_embed: this model reads captions as one vector; give text_embed")
        if embed.shape[-1] != self.text_embed_dim:
            raise ValueError(
                f"conditioning.text_embed: this model reads {self.text_embed_dim}-wide embeddings "
                f"(got {embed.shape[-1]})"
            )
        vector = self.to_vector(embed.to(self.null_vector.dtype))
        keep = keep_mask(conditioning.text_keep, embed)
        return torch.where(keep[:, None], vector, self.null_vector.to(vector.dtype))
