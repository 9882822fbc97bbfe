"""The backends ``onnxruntime`` and ``onnxruntime-cuda``."""
