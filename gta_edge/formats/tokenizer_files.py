"""What the files of a tokenizer say: the library's own, and the names of its special tokens.

``tokenizer.json`` is read by the ``tokenizers`` library, which panics over some of what it can hold, or asks for all
memory there is. So the file is bounded, a precompiled map is checked before the library sees it, and how much longer a
text can become is bounded afterwards. What remains is time: a regular expression of the file may take up to a third of
a second for each character, which is where the library's engine gives up.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import BundleError
from gta_edge.formats.charsmap import check_charsmap
from gta_edge.model.config_entries import is_int
from gta_edge.support.json_files import read_json
from gta_edge.support.native_errors import quiet_when_failing, translated
from gta_edge.support.text import brief, printable

if TYPE_CHECKING:
    import tokenizers

__all__ = ["REMEDY", "SpecialTokens", "read_library", "read_object", "special_tokens"]

REMEDY = "copy the file anew, or correct it in the checkpoint and export again"

_MAX_BYTES = 64 * 2**20  # of tokenizer.json; the largest in use have 35 MB
_MAX_GROWTH = 4096  # bytes that one byte of a text may become
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMED = ("extra_special_tokens", "model_specific_special_tokens", "additional_special_tokens")  # objects
_LISTS = ("extra_special_tokens", "additional_special_tokens")  # or lists
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an added token
_TRIAL = "A text of 1 line:\n\té 中 😀"

# A map, also where its name is spelled with escapes, which no one does to letters
_MAYBE_CHARSMAP = re.compile(rb"precompiled_charsmap|\\u00(?:4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9a])", re.IGNORECASE)

_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_QWEN2 = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

_CLASS_DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "WhisperTokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": _QWEN2,
    "Qwen3_5Tokenizer": _QWEN2,
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>", "pad_token": "<PAD>"
    },
    "BloomTokenizer": _LLAMA | {"pad_token": "<pad>"},
    "XGLMTokenizer": _LLAMA | {"pad_token": "<pad>", "sep_token": "</s>", "cls_token": "<s>"},
    "T5Tokenizer": _T5,
    "ByT5Tokenizer": _T5,
}  # fmt: skip
"""Special tokens that transformers' tokenizer classes have where no file names any; without ``Fast`` at the end."""

_CLASS_OF_MODEL = {"llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer",
                   "qwen3": "Qwen2Tokenizer", "gemma": "GemmaTokenizer", "gpt_neox": "GPTNeoXTokenizer"}  # fmt: skip
"""Classes that transformers takes for a ``model_type`` where no file names one."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, which is an object; empty where the file is absent.

    Raises:
        BundleError: the file is damaged or cannot be read.
    """
    try:
        content = read_json(path, BundleError, REMEDY)
    except BundleError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    if not isinstance(content, dict):
        raise BundleError(f"{printable(str(path))}: holds {type(content).__name__}; expected a JSON object", REMEDY)
    return content


# --- tokenizer.json ------------------------------------------------------------------------------------------------


def read_library(path: Path) -> tokenizers.Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        BundleError: it cannot be read, is none, or is one that makes too much of a text.
    """
    import tokenizers

    def refused(reason: str) -> BundleError:
        return BundleError(f"{printable(str(path))}: is not a tokenizer ({reason})", REMEDY)

    content = _read_bytes(path)
    with quiet_when_failing(), translated(refused):
        if _MAYBE_CHARSMAP.search(content):
            _check_charsmaps(content)
        library = tokenizers.Tokenizer.from_buffer(content)
        library.no_truncation()  # a saved limit would cut prompts in silence
        library.no_padding()
        _check_growth(library)
        library.decode(library.encode(_TRIAL).ids, skip_special_tokens=False)
    return library


def _read_bytes(path: Path) -> bytes:
    name = printable(str(path))
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            raise BundleError(f"{name}: is not a regular file", REMEDY)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{name}: cannot be read ({error.strerror})", REMEDY) from error
    if len(content) > _MAX_BYTES:
        raise BundleError(f"{name}: has more than {_MAX_BYTES} bytes", REMEDY)
    return content.removeprefix(b"\xef\xbb\xbf")


def _check_charsmaps(content: bytes) -> None:
    """Check every precompiled map, wherever it stands and however often its key comes."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if key == "precompiled_charsmap" and isinstance(value, str):
                try:
                    check_charsmap(value)
                except ValueError as error:
                    raise ValueError(f"its precompiled_charsmap: {error}") from error
        return dict(pairs)

    json.loads(content, object_pairs_hook=check)


def _check_growth(library: tokenizers.Tokenizer) -> None:
    """Raise ValueError where a short text could become one that takes all memory."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(library, name)
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > _MAX_GROWTH:
            raise ValueError(f"its {name} makes a text {growth} times as long; expected at most {_MAX_GROWTH} times")


def _growth(part: Mapping[str, Any]) -> int:
    """Return how many bytes, or for a post-processor tokens, one may become at most; an upper bound."""
    kind = part.get("type")
    if kind == "Sequence":
        growth = 1
        for entry in _entries(part):
            growth = min(growth * _growth(entry), 10**9)
        return growth
    if kind == "Replace":
        return max(1, len(str(part["content"]).encode()))
    if kind == "Precompiled":
        return check_charsmap(part["precompiled_charsmap"])
    if kind == "ByteLevel":
        return 2
    if kind == "TemplateProcessing":
        return max(1, sum("Sequence" in piece for piece in part["single"]))
    return 1


def _entries(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        yield from part.get(name, ())


# --- special tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside ``tokenizer.json`` say about its tokens.

    Attributes:
        named: the special tokens by the names that templates use, such as ``bos_token``.
        listed: special tokens that have no name.
        declared: tokens with all their switches, in the order of the ids that their file gives them.
    """

    named: Mapping[str, tokenizers.AddedToken]
    listed: list[tokenizers.AddedToken]
    declared: list[tokenizers.AddedToken]

    @property
    def variables(self) -> dict[str, str]:
        """The texts of the named ones, for templates."""
        return {name: token.content for name, token in self.named.items()}


def special_tokens(
    directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Callable[[str], int | None]
) -> SpecialTokens:
    """Read what the files say.

    As transformers has it: what ``tokenizer_config.json`` says, where null is none; what it leaves open, from
    ``special_tokens_map.json``, which wins over a config of the time before ``added_tokens_decoder``; then what the
    tokenizer's class has, if the vocabulary has it too. ``added_tokens.json`` is of that time, and read for it alone.

    Args:
        directory: of the files.
        settings: content of ``tokenizer_config.json``.
        config: content of ``config.json``, which may name the class.
        vocabulary: gives a token's id, None for what is none.

    Raises:
        BundleError: a token is neither text, nor an object with ``content``, nor null; or a list of them is none.
    """
    path, map_path = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    mapping = read_object(map_path)
    defaults = _class_defaults(path, settings, config).items()
    tokens = {name: _token(path, name, text) for name, text in defaults if vocabulary(text) is not None}
    own, mapped = dict(_named_tokens(path, settings)), dict(_named_tokens(map_path, mapping))
    is_old = settings.get("added_tokens_decoder") is None
    if is_old:
        tokens |= own | mapped
    else:
        tokens |= {name: token for name, token in mapped.items() if tokens.get(name) is None} | own
    order = [*_STANDARD, *(name for name in tokens if name not in _STANDARD)]  # in which ids are given
    named = {name: token for name in order if (token := tokens.get(name)) is not None}
    listed = [*_listed_tokens(path, settings), *_listed_tokens(map_path, mapping)]
    special = {token.content for token in (*named.values(), *listed)}
    declared = _old_added_tokens(directory / "added_tokens.json", special) if is_old else _added_tokens(path, settings)
    return SpecialTokens(named, listed, declared)


def _class_defaults(path: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, str]:
    named = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if not isinstance(named, str):
        raise BundleError(f"{printable(str(path))}: tokenizer_class is {brief(named)}; expected a name", REMEDY)
    by_model = _CLASS_OF_MODEL.get(str(config.get("model_type")), "")
    return _CLASS_DEFAULTS.get((named or by_model).removesuffix("Fast"), {})


def _named_tokens(path: Path, entries: Mapping[str, Any]) -> Iterator[tuple[str, tokenizers.AddedToken | None]]:
    """Yield the tokens that a file names, those of ``extra_special_tokens`` too; a null is none."""
    for name, value in entries.items():
        if name.endswith("_token") and not isinstance(value, bool):  # add_bos_token is a switch
            yield name, _token(path, name, value)
    for group in _NAMED:
        extra = entries.get(group)
        if isinstance(extra, dict):
            for name, value in extra.items():
                yield name, _token(path, f"{group}.{name}", value)
        elif extra is not None and not (group in _LISTS and isinstance(extra, list)):
            raise BundleError(
                f"{printable(str(path))}: {group} is {brief(extra)}; expected an object or a list", REMEDY
            )


def _listed_tokens(path: Path, entries: Mapping[str, Any]) -> Iterator[tokenizers.AddedToken]:
    for group in _LISTS:
        values = entries.get(group)
        for i, value in enumerate(values if isinstance(values, list) else ()):
            token = _token(path, f"{group}[{i}]", value)
            if token is not None:
                yield token


def _token(path: Path, name: str, value: Any) -> tokenizers.AddedToken | None:
    """Return a special token, given as text or as an object with ``content`` and switches."""
    import tokenizers

    text = value.get("content") if isinstance(value, dict) else value
    if value is None:
        return None
    flags = _flags(value) | {"special": True}
    if isinstance(text, str) and _are_switches(flags):
        return tokenizers.AddedToken(text, **flags)
    raise BundleError(
        f"{printable(str(path))}: {printable(name[:80])} is {brief(value)}; expected text, an object with content, or "
        f"null",
        f"{REMEDY}",
    )


def _flags(entry: Any) -> dict[str, Any]:
    return {name: entry[name] for name in _FLAGS if name in entry} if isinstance(entry, dict) else {}


def _are_switches(flags: Mapping[str, Any]) -> bool:
    return all(isinstance(flag, bool) for flag in flags.values())


def _added_tokens(path: Path, settings: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """Return the tokens of ``added_tokens_decoder`` in the order of their ids."""
    import tokenizers

    entries = settings["added_tokens_decoder"]
    if not isinstance(entries, dict):
        raise BundleError(
            f"{printable(str(path))}: added_tokens_decoder is {brief(entries)}; expected an object", REMEDY
        )
    found = []
    for number, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        flags = _flags(entry)
        is_token = isinstance(content, str) and content and _are_switches(flags)
        if not (is_token and re.fullmatch("[0-9]{1,10}", number)):
            raise BundleError(
                f"{printable(str(path))}: added_tokens_decoder has the entry {brief(number)}: {brief(entry)}; expected "
                f"an id, and an object with content and switches",
                f"{REMEDY}",
            )
        found.append((int(number), tokenizers.AddedToken(content, **flags)))
    return [token for _, token in sorted(found, key=lambda each: each[0])]


def _old_added_tokens(path: Path, special: set[str]) -> list[tokenizers.AddedToken]:
    """Return the tokens of ``added_tokens.json`` in the order of their ids, with those in ``special`` so marked."""
    import tokenizers

    entries = read_object(path)
    for content, number in entries.items():
        if not content or not is_int(number) or number < 0:
            raise BundleError(
                f"{printable(str(path))}: has the entry {brief(content)}: {brief(number)}; expected a token's text, "
                f"and its id",
                f"{REMEDY}",
            )
    ordered = sorted(entries, key=lambda content: entries[content])
    return [
        tokenizers.AddedToken(content, normalized=content not in special, special=content in special)
        for content in ordered
    ]
