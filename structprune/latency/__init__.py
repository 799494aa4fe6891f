"""Measured time: a table of a model's own operations over widths, and the time of a whole network from it."""
