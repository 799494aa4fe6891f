"""Layers as matrix products, and their least squares: moments, ridges, the order in which features are missed."""
