"""LoRA: an adapter of low-rank matrices that is trained instead of a network's own weights."""
