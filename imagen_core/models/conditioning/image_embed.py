"""How an image's embedding and a class label reach a UNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagen_core.models.conditioning.base import Conditioning, keep_mask


class ImageEmbedConditioning(nn.Module):
    """An image embedding as tokens for attention and as a vector added to the time vector.

    Ramesh et al. 2022 (arXiv 2204.06125), section 2.1: four extra tokens of context, and a projection added to the
    timestep embedding. Learned tokens and a learned vector replace an embedding that is dropped.
    """

    def __init__(self, image_embed_dim: int, cond_dim: int, time_dim: int, num_tokens: int):
        """`num_tokens` is 0 for a model without attention to conditions."""
        super().__init__()
        self.image_embed_dim = image_embed_dim
        self.to_tokens = nn.Linear(image_embed_dim, num_tokens * cond_dim) if num_tokens else None
        self.null_tokens = nn.Parameter(torch.randn(num_tokens, cond_dim)) if num_tokens else None
        self.to_vector = nn.Linear(image_embed_dim, time_dim)
        self.null_vector = nn.Parameter(torch.randn(time_dim))

    def forward(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor]:
        """Returns the tokens (b, num_tokens, cond_dim), or None, and the vector (b, time_dim).

        Raises:
            ValueError: the embedding is missing or of another width.
        """
        embed = conditioning.image_embed
        if embed is None:
            raise ValueError("conditioning.image_embed: this model reads image embeddings; give image_embed")
        if embed.shape[-1] != self.image_embed_dim:
            raise ValueError(
                f"conditioning.image_embed: this model reads {self.image_embed_dim}-wide embeddings "
                f"(got {embed.shape[-1]})"
            )
        embed = embed.to(self.to_vector.weight.dtype)
        keep = keep_mask(conditioning.image_embed_keep, embed)
        vector = F.gelu(self.to_vector(embed))
        vector = torch.where(keep[:, None], vector, self.null_vector.to(vector.dtype))
        if self.to_tokens is None or self.null_tokens is None:
            return None, vector
        tokens = self.to_tokens(embed).unflatten(-1, self.null_tokens.shape)
        return torch.where(keep[:, None, None], tokens, self.null_tokens.to(tokens.dtype)), vector


class LabelEmbedding(nn.Module):
    """A class label as a vector; zero for a label that is unknown (-1) or dropped, or with `learned_null` one more
    learned vector, the last one."""

    def __init__(self, num_classes: int, time_dim: int, *, learned_null: bool = False):
        super().__init__()
        self.null = num_classes if learned_null else None
        self.embedding = nn.Embedding(num_classes + learned_null, time_dim)

    def forward(self, conditioning: Conditioning) -> Tensor:
        """Returns the vector (b, time_dim).

        Raises:
            ValueError: the labels are missing.
        """
        labels = conditioning.labels
        if labels is None:
            raise ValueError("conditioning.labels: this model reads class labels")
        known = (labels >= 0) & keep_mask(conditioning.labels_keep, labels)
        if self.null is not None:
            return self.embedding(torch.where(known, labels, self.null))
        return self.embedding(labels.clamp(min=0)) * known[:, None]
