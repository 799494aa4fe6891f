"""The channel algebra: which channels of which tensors must be kept or removed together."""
