"""Frozen encoders: they take a list of captions or images and return unpadded (num_tokens, dim) arrays."""
