"""Induction, function vectors, or both (stage 10): what is measured of a run, and what is said."""
