"""Damaged weight files and indexes: refused in one line, or read as what their headers say."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.model.config import parse_config
from tests.helpers import reference
from tests.helpers.fuzz import CASES, ends_well, rng

TINY = {"vocab_size": 5, "intermediate_size": 3, "num_hidden_layers": 1, "eos_token_id": None, "bos_token_id": None}
MODELS = {
    "llama": reference.llama_entries(heads=1, n_kv=1, d_h=2, **TINY),
    "gta": reference.gta_entries(heads=1, n_q=1, d_k=2, d_l=2, **{**TINY, "tie_word_embeddings": False}),
}
INDEX, HEAD, EMBEDDING = "model.safetensors.index.json", "lm_head.weight", "model.embed_tokens.weight"
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "", "Q7", 5)
SIZES = (0, 1, 2, 5, -1, 2**31, 2**62, 2**63, 2**64, 10**39, 1.0, 1e308, None, True, "2", [2])
NAMES = (
    *("model.rotary_emb.inv_freq", HEAD, EMBEDDING, "model.norm.weight", "", "\x1b[2J", "x" * 10_000, "\u202e", "\n"),
    *("embed_tokens.weight", "norm.weight", "__metadata__", "model.layers.0.mlp.up_proj.bias", "\U000e0001" * 100),
)
SHARDS = (
    *("model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors", "../x.safetensors", "/etc/passwd", ""),
    *("config.json", "a/b.safetensors", "\x1b.safetensors", "x" * 300 + ".safetensors", None, 5, [], {}, "\ud800"),
)


def tensors(kind: str) -> dict[str, np.ndarray]:
    found = reference.random_weights(MODELS[kind])
    return {name: values.astype(ml_dtypes.bfloat16) for name, values in found.items()}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Undamaged checkpoints of both architectures, in one file and in two."""
    found = {}
    for kind, entries in MODELS.items():
        weights = tensors(kind)
        for in_shards in (False, True):
            directory = found[kind, in_shards] = tmp_path_factory.mktemp("whole")
            (directory / "config.json").write_text(json.dumps(entries))
            if not in_shards:
                save_file(weights, directory / "model.safetensors")
                continue
            placed = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
            for shard in set(placed.values()):
                save_file({name: weights[name] for name in weights if placed[name] == shard}, directory / shard)
            (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return found


# --- damages -------------------------------------------------------------------------------------------------------


def change_bytes(content: bytes, random_: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 8])):
        at = random_.choice([random_.randrange(len(found) + 1), random_.randrange(min(len(found), 600) + 1)])
        kind = random_.randrange(5)
        if kind == 0:
            found[at : at + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            found[at:at] = random_.choice([b"\0", b"\xff", b"[" * 5000, b"9" * 4400, b'"', b"{}", b"\x1b[2J"])
        elif kind == 2:
            del found[at : at + random_.randrange(1, 20)]
        elif kind == 3:
            found[at : at + 2] = random_.choice(
                [b"\x80\x7f", b"\xc0\x7f", b"\x80\xff"]
            )  # what bfloat16 has no value for
        else:
            del found[at:]
    return bytes(found)


def change_entry(entry: dict[str, Any], random_: random.Random) -> None:
    kind = random_.randrange(6)
    if kind == 0:
        entry["dtype"] = random_.choice(DTYPES)
    elif kind == 1 and entry["shape"]:
        entry["shape"][random_.randrange(len(entry["shape"]))] = random_.choice(SIZES)
    elif kind == 2:
        entry["shape"] = random_.choice(
            [[], [0], None, "shape", entry["shape"][::-1], [*entry["shape"], 1], [1] * 5000]
        )
    elif kind == 3:
        entry["data_offsets"][random_.randrange(2)] = random_.choice(SIZES)
    elif kind == 4:
        entry.pop(random_.choice(list(entry)))
    else:
        entry[random_.choice(["extra", "dtype", "shape", "data_offsets"])] = random_.choice([None, {}, [1], "x", 7])


def change_header(content: bytes, random_: random.Random) -> bytes:
    header, data = split(content)
    for _ in range(random_.choice([1, 1, 2])):
        name = random_.choice(sorted(header))
        kind = random_.randrange(8)
        if kind < 3:
            change_entry(header[name], random_)
        elif kind == 3:
            header[random_.choice(NAMES)] = header.pop(name)
        elif kind == 4:
            header[random_.choice(NAMES)] = json.loads(json.dumps(header[name]))
        elif kind == 5:
            header.pop(name)
        elif kind == 6:
            header["__metadata__"] = random_.choice([{}, {"format": "pt"}, {"a": 1}, None, [], "x" * 10_000])
        else:
            size = random_.choice([0, 2, 4, 10])  # one more tensor, as a file could well have it
            shape = [size // 2] if random_.random() < 0.7 else [0, size]
            header[random_.choice(NAMES)] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [len(data), len(data) + size],
            }
            data += bytes(size)
        header = {key: value for key, value in header.items() if isinstance(value, dict) and "dtype" in value} or header
    length = random_.choice([None] * 9 + [0, 1, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1])
    return joined(header, data, length)


def change_index(content: bytes, random_: random.Random) -> bytes:
    index = json.loads(content)
    placed = index["weight_map"]
    for _ in range(random_.choice([1, 1, 3])):
        name = random_.choice(sorted(placed) or ["x"])
        kind = random_.randrange(6)
        if kind == 0:
            placed[name] = random_.choice(SHARDS)
        elif kind == 1:
            placed.pop(name, None)
        elif kind == 2:
            placed[random_.choice(NAMES)] = random_.choice([*SHARDS[:2], *SHARDS])
        elif kind == 3:
            placed |= {f"t{i}": SHARDS[0] for i in range(random_.choice([1, 3000]))}
        elif kind == 4:
            index["metadata"] = random_.choice([None, [], {"total_size": -1}, "x", 10**400])
        else:
            index = random_.choice([{"weight_map": placed}, {**index, "x": [1]}, {"weight_map": []}, [], None, 5, {}])
            break
    return json.dumps(index).encode()


def change_file(path: Path, random_: random.Random) -> None:
    """Put something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    kind = random_.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        with path.open("wb") as file:
            file.write(content)
            file.truncate(random_.choice([2**20, 2**33]))
    elif kind == 5:
        path.write_bytes(random_.choice([b"", b"PK\x03\x04" + content, b"\x80\x04" + content, content + content]))


Change = Callable[[bytes, random.Random], bytes]


def damage(path: Path, random_: random.Random) -> None:
    """Damage one file that is whole."""
    if random_.random() < 0.1:
        change_file(path, random_)
        return
    structural: Change = change_index if path.name == INDEX else change_header
    content = path.read_bytes()
    if random_.random() < 0.7:
        content = structural(content, random_)
    if random_.random() < 0.4:
        content = change_bytes(content, random_)
    path.write_bytes(content)


def check(checkpoint: Checkpoint) -> None:
    """Read everything: the values are those of the config's shapes and finite, or the error is one of ours."""
    shapes = checkpoint.config.parameter_shapes()
    for name in checkpoint.names:
        values = checkpoint.read(name)
        assert values.shape == shapes[name]
        assert values.dtype.name == checkpoint.dtype_of(name)
        assert np.isfinite(values.astype(np.float32)).all()


@pytest.mark.parametrize("case", range(CASES))
def test_a_damaged_checkpoint(case: int, whole: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    random_ = rng("checkpoint", case)
    directory = tmp_path / "c"
    shutil.copytree(whole[random_.choice(sorted(whole))], directory)
    files = sorted(path for path in directory.iterdir() if "model" in path.name)
    for path in random_.sample(files, min(len(files), random_.choice([1, 1, 1, 2]))):
        damage(path, random_)
    ends_well(lambda: check(Checkpoint.open(directory)))


@pytest.mark.parametrize("case", range(CASES))
def test_a_header_that_says_nothing_else(case: int, whole: dict[tuple[str, bool], Path], tmp_path: Path) -> None:
    """One byte of a header, which is refused, or changes no value of any parameter."""
    random_ = rng("header", case)
    kind = random_.choice(sorted(MODELS))
    shutil.copytree(whole[kind, False], tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    content = bytearray(path.read_bytes())
    at = random_.randrange(8 + struct.unpack("<Q", content[:8])[0])
    content[at] = random_.choice([random_.randrange(256), content[at] ^ 1 << random_.randrange(8)])
    path.write_bytes(content)
    opened: list[Checkpoint] = []
    if ends_well(lambda: opened.append(Checkpoint.open(tmp_path / "c"))):
        return
    for name, expected in tensors(kind).items():
        if name in opened[0].names or not opened[0].config.is_optional(name):
            assert opened[0].read(name).tobytes() == expected.tobytes()


def test_what_is_not_damaged_is_read(whole: dict[tuple[str, bool], Path]) -> None:
    for (kind, _), directory in whole.items():
        checkpoint = Checkpoint.open(directory)
        assert checkpoint.config == parse_config(MODELS[kind])
        check(checkpoint)
