"""Performance tests: what interventions and the evaluation cost (``make bench``)."""
