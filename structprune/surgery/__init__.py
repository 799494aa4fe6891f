"""Doing what a plan says: slices, repairs and rewrites, all or nothing; and checking the result."""
