"""Checkpoints whose matrices are in integers, packed value by value as the formats' own descriptions have it.

Nothing here uses the package. Codes and zero points are unsigned: a code means ``(code - zero) * scale``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
                "input_activations": None,
                "output_activations": None,
            }
        },
    },
}
CONFIGS["int-quantized"] = {**CONFIGS["compressed-tensors"], "format": "int-quantized"}


def config_of(layout: str, bits: int) -> dict[str, Any]:
    """``quantization_config`` for matrices of this width."""
    config = json.loads(json.dumps(CONFIGS[layout]))
    if "bits" in config:
        config["bits"] = bits
    else:
        config["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    return config


@dataclass(frozen=True)
class Codes:
    """One matrix [out, in] in integers: codes [out, in], zeros [out, groups], scales [out, groups], order [in]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    bits: int
    order: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """What is meant, float64 [out, in]."""
        rows, columns = self.codes.shape
        values = np.empty((rows, columns))
        for o in range(rows):
            for i in range(columns):
                group = self.order[i]
                values[o, i] = (int(self.codes[o, i]) - int(self.zeros[o, group])) * float(self.scales[o, group])
        return values


def random_codes(rows: int, columns: int, bits: int, groups: int, seed: int = 0, scale_type: Any = np.float16) -> Codes:
    """A symmetric matrix, its lowest and highest code among the others."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (rows, columns))
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    scales = random.uniform(0.01, 0.03, (rows, groups)).astype(scale_type)
    zeros = np.full((rows, groups), 2 ** (bits - 1))
    return Codes(codes, zeros, scales, bits, np.arange(columns) // (columns // groups))


def _words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Pack each row of unsigned numbers into words of 32 bits, the first in the lowest; the last word filled with 0."""
    per_word = 32 // bits
    words = np.zeros((len(numbers), -(-numbers.shape[1] // per_word)), np.uint32)
    for row in range(len(numbers)):
        for word in range(words.shape[1]):
            for i in range(per_word):
                place = word * per_word + (order[i] if order else i)
                if place < numbers.shape[1]:
                    words[row, word] |= np.uint32(int(numbers[row, place]) << bits * i)
    return words.view(np.int32)


def gptq(codes: Codes, zero_offset: int = 1) -> dict[str, np.ndarray]:
    zeros = (codes.zeros.T - zero_offset) % 2**codes.bits
    return {
        "qweight": np.ascontiguousarray(_words(codes.codes, codes.bits).T),
        "qzeros": _words(zeros, codes.bits),
        "scales": np.ascontiguousarray(codes.scales.T),
        "g_idx": codes.order.astype(np.int32),
    }


def gptq_v2(codes: Codes) -> dict[str, np.ndarray]:
    return gptq(codes, 0)


def awq(codes: Codes) -> dict[str, np.ndarray]:
    return {
        "qweight": _words(codes.codes.T, 4, AWQ_ORDER),
        "qzeros": _words(codes.zeros.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(codes.scales.T),
    }


def compressed(codes: Codes) -> dict[str, np.ndarray]:
    parts = {
        "weight_packed": _words(codes.codes, codes.bits),
        "weight_scale": codes.scales,
        "weight_shape": np.array(codes.codes.shape, np.int64),
    }
    if (codes.zeros != 2 ** (codes.bits - 1)).any():
        parts["weight_zero_point"] = np.ascontiguousarray(_words(codes.zeros.T, codes.bits).T)
    if (np.diff(codes.order) < 0).any():
        parts["weight_g_idx"] = codes.order.astype(np.int32)
    return parts


def int_quantized(codes: Codes) -> dict[str, np.ndarray]:
    return {"weight": (codes.codes - 128).astype(np.int8), "weight_scale": codes.scales}


PACKERS: dict[str, Callable[[Codes], dict[str, np.ndarray]]] = {
    "gptq": gptq,
    "gptq_v2": gptq_v2,
    "awq": awq,
    "compressed-tensors": compressed,
    "int-quantized": int_quantized,
}


def asymmetric(codes: Codes) -> Codes:
    zeros = codes.zeros.copy()
    zeros[1, 0] += 3
    return replace(codes, zeros=zeros)


def act_order(codes: Codes, seed: int = 0) -> Codes:
    return replace(codes, order=np.random.default_rng(seed).permutation(codes.order))


def write(
    directory: Path,
    entries: dict[str, Any],
    weights: dict[str, np.ndarray],
    matrices: dict[str, Codes],
    layout: str,
    **changes: Any,
) -> None:
    """Write a checkpoint: ``matrices`` (by the parameter's name) in integers, the other weights as they are."""
    tensors = {name: weight for name, weight in weights.items() if name not in matrices}
    for name, codes in matrices.items():
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": array for part, array in PACKERS[layout](codes).items()}
    bits = next(iter(matrices.values())).bits
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    config = {**config_of(layout, bits), **changes}
    (directory / "config.json").write_text(json.dumps({**entries, "quantization_config": config}))
