"""A checkpoint is read as it is or refused with a CheckpointError, whatever is in its files."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gta_edge.errors import CheckpointError, ConfigError
from gta_edge.formats.checkpoint import COMPANIONS, Checkpoint
from tests.helpers.checkpoint_files import (
    BIAS,
    EMBEDDING,
    GTA,
    HEAD,
    NORM,
    SMALLEST,
    TIED,
    header_entry,
    random_tensors,
    read_index,
    refused,
    safetensors_bytes,
    split_header,
    write_index,
    write_shards,
    write_single,
)
from tests.helpers.limits import unprivileged

# --- what can be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST])
def test_everything_is_read_as_it_was_written(tmp_path, write, config):
    checkpoint = Checkpoint.open(str(write(tmp_path / "c", config)))
    tensors = random_tensors(config)
    assert checkpoint.config == config
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.biases == {name for name in tensors if name.endswith(".bias")}
    assert checkpoint.weight_bytes == config.weight_bytes
    for name, expected in tensors.items():
        value = checkpoint.read(name)
        assert value.dtype == expected.dtype
        assert value.shape == expected.shape
        assert value.tobytes() == expected.tobytes()
        assert value.flags.owndata or value.base.flags.owndata
        assert value.flags.writeable
        assert checkpoint.dtype_of(name) == "bfloat16"


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    tensors = random_tensors(GTA, np.float16)
    tensors[NORM] = tensors[NORM].astype(np.float32)
    tensors[HEAD] = tensors[HEAD].astype(ml_dtypes.bfloat16)
    checkpoint = Checkpoint.open(write_single(tmp_path / "c", GTA, tensors))
    types = [checkpoint.dtype_of(name) for name in (NORM, HEAD, EMBEDDING)]
    assert types == ["float32", "bfloat16", "float16"]
    assert checkpoint.weight_bytes == sum(value.nbytes for value in tensors.values())
    for name, expected in tensors.items():
        assert checkpoint.read(name).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        *((np.float64, "F64"), (np.int8, "I8"), (np.uint8, "U8"), (np.int64, "I64"), (bool, "BOOL")),
        *((ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2")),
    ],
)
def test_other_types_are_named(tmp_path, dtype, said):
    tensors = {"model.norm.weight": np.ones(8, np.float32)} | random_tensors(GTA)
    directory = write_single(tmp_path / "c", GTA, tensors)
    header, data = split_header(directory / "model.safetensors")
    begin, end = header[NORM]["data_offsets"]
    header[NORM] = header_entry(begin, begin + 8 * np.dtype(dtype).itemsize, said, (8,))
    difference = header[NORM]["data_offsets"][1] - end
    for name, entry in header.items():
        if name != NORM and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + difference for offset in entry["data_offsets"]]
    data = data[:begin] + bytes(8 * np.dtype(dtype).itemsize) + data[end:]
    (directory / "model.safetensors").write_bytes(safetensors_bytes(header, data))
    refused(directory, rf"model\.norm\.weight is stored as {said}; expected one of F32, F16, BF16")


def test_a_bias_may_be_absent_and_nothing_else(tmp_path):
    tensors = random_tensors(GTA)
    del tensors[BIAS]
    checkpoint = Checkpoint.open(write_single(tmp_path / "c", GTA, tensors))
    assert BIAS not in checkpoint.names
    assert checkpoint.biases == {name for name in GTA.parameter_shapes() if name.endswith(".bias")} - {BIAS}
    with pytest.raises(CheckpointError, match="no parameter"):
        checkpoint.read(BIAS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(write_single(tmp_path / "d", GTA, tensors), r"lacks 1 .*: model\.layers\.1\.mlp\.up_proj\.weight;")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.original_inv_freq",
        "model.decoder.version",
    ],
)
@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST], ids=["untied", "tied", "llama"])
def test_tables_of_old_checkpoints_are_ignored(tmp_path, config, name):
    for table in (np.ones(2), np.ones((1, 1, 4, 4), np.int8), np.full(3, np.nan, np.float16)):
        checkpoint = Checkpoint.open(write_single(tmp_path / "c", config, random_tensors(config) | {name: table}))
        assert checkpoint.names == tuple(config.parameter_shapes())
        assert checkpoint.weight_bytes == config.weight_bytes


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.inv_freq", "rotary_emb", "model.inv_freq", "version"])
def test_what_is_only_named_alike_is_not_ignored(tmp_path, name):
    refused(
        write_single(tmp_path / "c", GTA, random_tensors(GTA) | {name: np.ones(2)}),
        "holds 1 that no GTAForCausalLM has",
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GTA, "model.layers.1.self_attn.o_proj.bias"),
        (GTA, "lm_head.bias"),
        (GTA, "model.norm.bias"),
        (SMALLEST, "model.layers.0.post_attention_layernorm.bias"),
        (SMALLEST, "model.layers.0.self_attn.q_proj.bias"),
        (SMALLEST, "model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_bias_that_no_model_has_is_ignored_where_it_is_zero(tmp_path, config, name):
    zeros = np.zeros(4, ml_dtypes.bfloat16)
    checkpoint = Checkpoint.open(write_single(tmp_path / "c", config, random_tensors(config) | {name: zeros}))
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.biases == {n for n in config.parameter_shapes() if config.is_optional(n)}
    for value in (1e-9, np.nan):
        zeros[3] = value
        refused(
            write_single(tmp_path / "c", config, random_tensors(config) | {name: zeros}),
            f"holds 1 that no .* has: {name};",
        )


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("model.layers.0.self_attn.o_proj.bias", "attention_bias"),
        ("model.layers.0.mlp.down_proj.bias", "mlp_bias"),
    ],
)
@pytest.mark.parametrize("config", [GTA, SMALLEST], ids=["gta", "llama"])
def test_a_switch_says_which_biases_there_may_be_and_the_tensors_which_there_are(tmp_path, config, name, switch):
    values = np.zeros(config.hidden_size, np.float32)
    for promised in (True, False, None):
        directory = write_single(tmp_path / "c", config, random_tensors(config) | {name: values})
        entries = config.to_dict() | {switch: promised}
        (directory / "config.json").write_text(json.dumps(entries))
        assert {*Checkpoint.open(directory).names} - {name} == set(config.parameter_shapes())
        write_single(tmp_path / "d", config, random_tensors(config) | {name: values + 1e-3})
        (tmp_path / "d" / "config.json").write_text(json.dumps(entries))
        if promised and config is not GTA:
            assert Checkpoint.open(tmp_path / "d").biases == {name}
        else:
            refused(
                tmp_path / "d", f"has: {name}; biases of {switch} that are not all zero, which its config.json does"
            )
    (write_single(tmp_path / "e", config) / "config.json").write_text(json.dumps(config.to_dict() | {switch: True}))
    assert Checkpoint.open(tmp_path / "e").names == tuple(config.parameter_shapes())


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("config", [TIED, SMALLEST], ids=["gta", "llama"])
def test_a_tied_checkpoint_may_hold_only_the_head(tmp_path, config, write):
    """safetensors' ``save_model`` keeps one of two names that share memory, whichever comes last."""
    directory = write(tmp_path / "c", config)
    for path in directory.glob("*.safetensors"):
        save_file({HEAD if n == EMBEDDING else n: value for n, value in load_file(path).items()}, path)
    if write is write_shards:
        write_index(directory, {HEAD if n == EMBEDDING else n: f for n, f in read_index(directory).items()})
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.weight_bytes == config.weight_bytes
    assert checkpoint.read(EMBEDDING).tobytes() == random_tensors(config)[EMBEDDING].tobytes()
    (directory / "config.json").write_text(json.dumps(config.replace(tie_word_embeddings=False).to_dict()))
    refused(directory, f"lacks 1 of the tensors that its config.json asks for: {EMBEDDING}")


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("config", [TIED, SMALLEST], ids=["gta", "llama"])
def test_a_model_saved_without_its_head_has_names_without_a_prefix(tmp_path, config, write):
    directory = write(tmp_path / "c", config)
    for path in directory.glob("*.safetensors"):
        save_file({n.removeprefix("model."): value for n, value in load_file(path).items()}, path)
    if write is write_shards:
        write_index(directory, {n.removeprefix("model."): f for n, f in read_index(directory).items()})
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names == tuple(config.parameter_shapes())
    for name, values in random_tensors(config).items():
        assert checkpoint.read(name).tobytes() == values.tobytes()
    (directory / "config.json").write_text(json.dumps(config.replace(tie_word_embeddings=False).to_dict()))
    refused(directory, f"lacks 1 of the tensors that its config.json asks for: {HEAD}")


def test_names_with_and_without_a_prefix_are_not_mixed(tmp_path):
    tensors = {n.removeprefix("model.") if "norm" in n else n: value for n, value in random_tensors(TIED).items()}
    refused(write_single(tmp_path / "c", TIED, tensors), "lacks 5 .* holds 5 that no GTAForCausalLM has")


def test_a_tied_head_alone_must_have_the_embeddings_shape(tmp_path):
    tensors = random_tensors(TIED)
    tensors[HEAD] = np.ascontiguousarray(tensors.pop(EMBEDDING)[:-1])
    refused(write_single(tmp_path / "c", TIED, tensors), r"has the shape \[15, 8\]; config.json asks for \[16, 8\]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, BIAS])
def test_every_value_must_be_finite(tmp_path, name, dtype, value):
    tensors = random_tensors(GTA, dtype)
    tensors[name].flat[-1] = value
    checkpoint = Checkpoint.open(write_single(tmp_path / "c", GTA, tensors))
    size, last = tensors[name].size, [n - 1 for n in tensors[name].shape]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(name)
    assert f"model.safetensors: {name} holds {value} at {last}, 1 of {size} values are not finite; " in str(
        caught.value
    )
    for other in tensors.keys() - {name}:
        checkpoint.read(other)


def test_links_to_regular_files_may_leave_the_directory(tmp_path):
    write_single(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    checkpoint = Checkpoint.open(tmp_path / "snapshot")
    assert checkpoint.read(NORM).shape == (8,)
    (tmp_path / "blobs" / "model.safetensors").unlink()
    refused(tmp_path / "snapshot", "model.safetensors: cannot be read")


def test_a_single_file_is_taken_before_an_index(tmp_path):
    write_shards(write_single(tmp_path / "c"))
    (tmp_path / "c" / "model.safetensors.index.json").write_text("nonsense")
    assert Checkpoint.open(tmp_path / "c").read(NORM).shape == (8,)


def test_companions(tmp_path):
    write_single(tmp_path / "c")
    assert Checkpoint.open(tmp_path / "c").companions == ()
    for name in COMPANIONS[1:]:
        (tmp_path / "c" / name).write_text("{}")
    assert Checkpoint.open(tmp_path / "c").companions == tuple(tmp_path / "c" / name for name in COMPANIONS[1:])
    (tmp_path / "c" / COMPANIONS[0]).mkdir()
    refused(tmp_path / "c", "tokenizer.json: is not a regular file")
    (tmp_path / "c" / COMPANIONS[0]).rmdir()
    with (tmp_path / "c" / COMPANIONS[0]).open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    refused(tmp_path / "c", "tokenizer.json: has 67108865 bytes; expected at most 67108864")


def test_reading_a_whole_checkpoint_takes_the_memory_of_one_tensor(tmp_path):
    config = SMALLEST.replace(vocab_size=2**20, hidden_size=2, intermediate_size=2**20)  # 4 tensors of 8 MiB
    config = config.replace(num_hidden_layers=6, dtype="float32")
    write_single(
        tmp_path / "c", config, {name: np.ones(s, np.float32) for name, s in config.parameter_shapes().items()}
    )
    script = """
import sys
from gta_edge.formats.checkpoint import Checkpoint
def peak():  # KiB; the kernel's own mark, since getrusage also counts the parent before exec
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
checkpoint = Checkpoint.open(sys.argv[1])
for name in checkpoint.names:
    checkpoint.read(name)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script, tmp_path / "c"], check=True, capture_output=True, text=True)
    assert config.weight_bytes > 140 * 2**20
    assert int(output.stdout) < 30 * 2**10  # one that is read while the last one is still held, and a little


# --- what does not fit the config ------------------------------------------------------------------------------------


def test_missing_and_surplus_tensors_are_counted_and_named(tmp_path):
    renamed = {name.replace("model.", "transformer."): value for name, value in random_tensors(GTA).items()}
    shapes = GTA.parameter_shapes()
    missing = sum(not GTA.is_optional(name) for name in shapes) - 1  # lm_head keeps its name
    message = refused(write_single(tmp_path / "c", GTA, renamed), f"lacks {missing} .* and {missing - 3} more; ")
    assert f"holds {len(shapes) - 1} that no GTAForCausalLM has" in message
    assert EMBEDDING in message
    assert "transformer.layers.0" in message


def test_a_wrong_shape_is_named(tmp_path):
    tensors = random_tensors(GTA)
    tensors[EMBEDDING] = np.ascontiguousarray(tensors[EMBEDDING].T)
    refused(write_single(tmp_path / "c", GTA, tensors), r"embed_tokens.weight has the shape \[8, 16\]; .* \[16, 8\]")


def test_a_config_with_absurdly_many_layers_is_refused_at_once(tmp_path):
    write_single(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(GTA.replace(num_hidden_layers=2**31 - 1).to_dict()))
    refused(tmp_path / "c", "too few for the 2147483647 layers")


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    tensors = random_tensors(TIED)
    same = tensors | {HEAD: tensors[EMBEDDING].copy()}
    checkpoint = Checkpoint.open(write_single(tmp_path / "same", TIED, same))
    assert checkpoint.names == tuple(TIED.parameter_shapes())
    assert checkpoint.weight_bytes == TIED.weight_bytes
    other = same[HEAD].copy()
    other[-1, -1] += 1
    for value in (other, same[HEAD].astype(np.float32), same[HEAD][:-1]):
        directory = write_single(tmp_path / "other", TIED, same | {HEAD: np.ascontiguousarray(value)})
        refused(directory, "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them")


# --- files that are missing or something else ------------------------------------------------------------------------


def test_paths_that_are_no_directory(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "missing", "No such file or directory")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "empty", "config.json: cannot be read")
    (tmp_path / "esc\x1b[2J").mkdir()
    refused(tmp_path / "esc\x1b[2J", r"esc\\x1b\[2J")
    refused("a\0b", "null")
    refused("x" * 300, "File name too long")


def test_a_config_that_is_wrong_is_a_config_error(tmp_path):
    write_single(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "c")
    (tmp_path / "c" / "config.json").unlink()
    (tmp_path / "c" / "config.json").mkdir()
    refused(tmp_path / "c", "not a regular file")


def test_no_weights(tmp_path):
    (write_single(tmp_path / "c") / "model.safetensors").unlink()
    refused(tmp_path / "c", "holds neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.safetensors", "found adapter_model.safetensors: give the whole model"),
        ("consolidated.00.safetensors", "found consolidated.00.safetensors: give the whole model"),
        ("gta_edge.json", "this is a bundle"),
    ],
)
def test_something_else_instead_of_weights(tmp_path, name, said):
    (write_single(tmp_path / "c") / "model.safetensors").rename(tmp_path / "c" / name)
    refused(tmp_path / "c", said)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_never_read(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (write_single(tmp_path / "c") / "model.safetensors").unlink()
    (tmp_path / "c" / name).write_bytes(pickle.dumps(Trap()))
    refused(tmp_path / "c", f"found {name}, but pickle files are never read.*convert")
    (tmp_path / "c" / name).rename(tmp_path / "c" / "model.safetensors")
    refused(tmp_path / "c", "is a pickle and no safetensors file")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))  # what torch.save writes
    refused(tmp_path / "c", "is a pickle and no safetensors file")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_regular_file(tmp_path):
    path = write_single(tmp_path / "c") / "model.safetensors"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        refused(tmp_path / "c", "is not a regular file")


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        directory = write_single(Path(root, "c"))
        for path in (directory / "model.safetensors", directory):
            directory.chmod(0o755)
            path.chmod(0)
            with unprivileged():
                refused(directory, "Permission denied")
        directory.chmod(0o755)


# --- files that change while they are used ---------------------------------------------------------------------------


def test_a_file_that_changes_after_opening(tmp_path):
    file = write_single(tmp_path / "c") / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path / "c")
    info = file.stat()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(NORM)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(NORM)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(NORM)


def test_a_read_that_ends_early(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_single(tmp_path / "c"))
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda file, dtype, count: fromfile(file, dtype, count)[:-1])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(EMBEDDING)
