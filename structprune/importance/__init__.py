"""Criteria: what a channel is worth, from tensors and index arrays alone."""
