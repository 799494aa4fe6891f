"""The channel algebra: which channels of which tensors must live or die together."""
