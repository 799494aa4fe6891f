"""Doing what a plan says: slices, attributes and literals, all or nothing; and checking the result."""
