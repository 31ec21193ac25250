"""One file or folder is one step: sources, fetch, resize, encode, verify, report."""
