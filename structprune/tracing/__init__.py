"""From a model and its example inputs to a graph of tensor operations in which every int knows where it came from."""
