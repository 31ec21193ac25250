"""How a loaded model of transformers runs a batch: concatenated captions where it can, else padded ones."""
