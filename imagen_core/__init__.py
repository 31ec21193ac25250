"""The model library and the store format. Usable without Ray, transformers and img2dataset."""
