"""Which heads, how many, how removed: measures beyond the paper's, on a few documents."""
