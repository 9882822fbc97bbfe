"""Graph transformations for ONNX Runtime, one per file, each a named onnx-ir pass."""
