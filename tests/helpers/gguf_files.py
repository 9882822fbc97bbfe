"""GGUF's layout, written down a second time: what it calls a Llama's tensors, and the order of their rows."""

import gguf
import numpy as np
import pytest


def tensor_name(name: str) -> str:
    """What the gguf package itself makes of one of Hugging Face's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    return names.get_name(name, try_suffixes=[".weight"]) or pytest.fail(name)


def llama_cpp_order(name: str, weight: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Put every row of a query or key projection where llama.cpp wants it: i and i + d/2 become 2i and 2i + 1."""
    count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
    if count is None:
        return weight
    width = len(weight) // count
    result = np.empty_like(weight)
    for head in range(count):
        for i in range(width // 2):
            result[head * width + 2 * i] = weight[head * width + i]
            result[head * width + 2 * i + 1] = weight[head * width + i + width // 2]
    return result
