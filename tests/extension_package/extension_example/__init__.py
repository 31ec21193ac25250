"""One of each extension, as another package adds it."""
