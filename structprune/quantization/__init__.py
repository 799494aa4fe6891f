"""Quantisation after pruning: files of integers, calibrated on batches, and how far each is from the model."""
