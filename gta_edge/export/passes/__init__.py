"""Graph transformations, one per file, each a named onnx-ir pass with its pre- and postconditions."""
