"""The pages of a run: how far it is, and what it dropped."""
