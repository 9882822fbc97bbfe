"""Graph transformations that suit a bundle's graph to an engine, one per file, each a named onnx-ir pass."""
