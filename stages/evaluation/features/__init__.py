"""Features of pictures by frozen models, for metrics: one file a kind of model, and where pictures come from."""
