"""Graph transformations for TensorRT, one per file, each a named onnx-ir pass."""
