"""Models over concatenated captions, so that no matrix product contains padding."""
