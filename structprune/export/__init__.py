"""Pruned models as ONNX files: exported, checked, named, and asked what they are."""
