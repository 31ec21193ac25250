"""Encoder recipes: how a caption becomes the input of a model, and which of its states are kept."""
