"""Stores, exports and trained models on the Hugging Face hub."""
