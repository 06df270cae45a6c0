"""The tasks: rows, demonstrations, prompts, and their form for lm-eval."""
