"""The op ``gta::GroupedLatentAttention``: definition, tiling, kernels, torch op and TensorRT plugin."""
