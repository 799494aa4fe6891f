"""How batches of data pass through a model: side by side, from the middle, in half precision, over ranks."""
