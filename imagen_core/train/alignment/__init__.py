"""Representation alignment: hidden states of the network follow patch features of an image encoder."""
