"""Features of images by frozen models, for metrics: one file a kind of model, and where images come from."""
