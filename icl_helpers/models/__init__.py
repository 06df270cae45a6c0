"""Loading models and tokenizers, telling them apart, and the text for their means."""
