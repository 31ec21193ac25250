"""Models that write captions of images."""
