"""NVIDIA GPUs without a framework: architectures, the kernel compiler, launches, streams, memory."""
