"""Image encoders whose output is a grid of features, one for each patch: teachers of representation alignment."""
