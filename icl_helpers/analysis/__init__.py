"""What heads do and what their removal costs: measures beside the paper's own, on few prompts."""
