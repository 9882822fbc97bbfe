"""What a decoder layer does between its matmuls, in fewer launches: launch plans, kernels, and functions of tensors.

No op of a graph: engines fuse this themselves. The backend ``torch`` uses it on a GPU.
"""
