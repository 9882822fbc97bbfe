"""What export and runtime share of ONNX graphs: how one is read, checked, and rewritten by passes."""
