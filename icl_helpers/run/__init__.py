"""A run: what it evaluates, its artifacts in one directory, its stages and its cost."""
