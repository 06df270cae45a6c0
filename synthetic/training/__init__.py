"""Training of the embedded model, and what its training and effect measure."""
