"""Number formats and quantization."""
