"""Source files that are copied into exported folders; they import only torch, diffusers and transformers."""
