"""Depth: whole branches and blocks found on a trace, and taken out of a model."""
