"""Scoring prompts under conditions: cells, workers, the store, and the results."""
