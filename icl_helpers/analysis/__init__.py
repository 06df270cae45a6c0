"""What heads do: their weights as circuits, and their causal effects beside the paper's own."""
