"""Equal images and near duplicates over a whole store, and images that must not be in training."""
