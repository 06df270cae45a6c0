"""Measures beyond the paper's: which heads, how many, how removed, and what they do there."""
