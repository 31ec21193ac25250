"""Frozen encoders: a list of captions in, a list of unpadded (num_tokens, dim) arrays out."""
