"""The op ``gta::BlockwiseMatMul``: definition, packing, tiling, kernels, torch op and TensorRT plugin."""
