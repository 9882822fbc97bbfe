"""Text to ids and back, as the files beside a model say: tokenizer, special tokens and chat template.

The work is done by the ``tokenizers`` library, imported when first needed. What is here: errors in our terms, and the
names that the files give to tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gta_edge.errors import BundleError, InputError
from gta_edge.formats.chat_template import ChatTemplate
from gta_edge.formats.tokenizer_files import REMEDY, SpecialTokens, read_library, read_object, special_tokens
from gta_edge.model.config_entries import is_int
from gta_edge.support.native_errors import quiet_when_failing, translated
from gta_edge.support.text import brief, printable
from gta_edge.support.text_files import read_text

__all__ = ["NO_TOKENIZER", "Tokenizer"]

NO_TOKENIZER = (
    "give token ids, or export a checkpoint that has a tokenizer.json (transformers makes one of tokenizer.model or "
    "vocab files: AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(CHECKPOINT))"
)
"""Remedy for text without a tokenizer."""

_SETTINGS = "tokenizer_config.json"
_MAX_TEMPLATE_BYTES = 4 * 2**20

_LONG_TEXT = 2**14
"""Characters from which on other threads run while a text is tokenized, which takes seconds for a few MB."""


class Tokenizer:
    """The tokenizer of one model; ``load`` makes it from files.

    Args:
        library: a ``tokenizers.Tokenizer``.
        chat_template: jinja source of the chat template; None where the model has none.
        variables: the special tokens by the names that templates use, such as ``bos_token``.
        left_out: see there.

    Attributes:
        left_out: tokens that the files name, the vocabulary lacks, and the model has no row for: they are none.
    """

    def __init__(
        self,
        library: Any,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        self.left_out = tuple(left_out)
        # a saved limit would cut prompts in silence
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._variables = dict(variables or {})
        self._template = None if chat_template is None else ChatTemplate(chat_template)
        added = library.get_added_tokens_decoder().items()
        self._whole = {id_: token.content for id_, token in added}
        self._special = {id_ for id_, token in added if token.special}

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """Read the tokenizer of a bundle or checkpoint; None where the directory has no ``tokenizer.json``.

        Raises:
            BundleError: a file of the tokenizer is damaged or cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            return None
        library = read_library(path)
        settings_path = directory / _SETTINGS
        settings = read_object(settings_path)
        config = read_object(directory / "config.json")
        special = special_tokens(directory, settings, config, library.token_to_id)
        with _refused(path):
            left_out = _add(library, special, config.get("vocab_size"))
        return cls(library, _read_template(directory, settings), special.variables, left_out)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that ``tokenizer.json`` puts around one.

        Raises:
            InputError: no text, not encodable as UTF-8, or text that this tokenizer has no tokens for.
        """
        if not isinstance(text, str):
            raise InputError(f"the text cannot be tokenized (it is {type(text).__name__})", "give valid Unicode text")
        with (
            quiet_when_failing(),
            translated(
                lambda reason: InputError(f"the text cannot be tokenized ({reason})", "give valid Unicode text")
            ),
        ):
            if len(text) < _LONG_TEXT:
                encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
            else:  # ``encode`` keeps Python's lock, a batch does not, but starts threads, for which a fork warns
                encoding = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
            ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and ids that the tokenizer does not know.

        Raises:
            BundleError: the tokenizer's decoder fails.
        """
        with translated(lambda reason: BundleError(f"the tokenizer cannot decode ({reason})", REMEDY)):
            text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Tell whether every token of both has the same id in the other, which makes their ids mean the same."""
        own: dict[str, int] = self._library.get_vocab()
        its: dict[str, int] = other._library.get_vocab()
        return own == its

    def is_silent(self, token: int) -> bool:
        """Tell whether an id has no text: a special token, or one the tokenizer does not know."""
        return token in self._special or self._library.id_to_token(token) is None

    @property
    def whole_tokens(self) -> Mapping[int, str]:
        """Tokens that are never cut into pieces, the special ones and those that have a text, with their contents."""
        return self._whole

    @property
    def end_token_id(self) -> int | None:
        """The id of ``eos_token``; None where there is none."""
        content = self._variables.get("eos_token")
        token: int | None = self._library.token_to_id(content) if content else None
        return token

    def beyond(self, vocab_size: int) -> dict[int, str]:
        """Return the tokens whose id a model of ``vocab_size`` ids does not have, in the order of their ids."""
        vocabulary: dict[str, int] = self._library.get_vocab()
        return dict(sorted((id_, text) for text, id_ in vocabulary.items() if id_ >= vocab_size))

    def byte_value(self, token: int) -> int | None:
        """Return the byte that a byte-fallback token such as ``<0xE4>`` stands for; None for any other token."""
        return self._byte_values.get(token)

    @property
    def has_byte_fallback(self) -> bool:
        """Whether characters outside the vocabulary are spelled in byte tokens (sentencepiece)."""
        return bool(self._byte_values)

    @cached_property
    def _byte_values(self) -> dict[int, int]:
        """Byte-fallback tokens with their bytes; none where the decoder does not turn them into bytes."""
        probe = self._library.token_to_id("<0x41>")
        if probe is None or self.decode([probe]) != "A":
            return {}
        tokens = {self._library.token_to_id(f"<0x{value:02X}>"): value for value in range(256)}
        tokens.pop(None, None)
        return tokens

    def token_bytes(self, token: int) -> bytes:
        """Return what a token adds to a text, in UTF-8; it may begin or end within a character.

        Special tokens have their names, ids that the tokenizer does not know nothing.
        """
        if token in self._whole:
            return str(self._whole[token]).encode()
        if (byte := self.byte_value(token)) is not None:
            return bytes([byte])
        if (piece := self._library.id_to_token(token)) is None:
            return b""
        if self._byte_of_character:
            return b"".join(self._byte_of_character.get(c, c.encode()) for c in piece)
        before, anchor = self._anchor  # behind which a decoder drops nothing, as it may at the beginning of a text
        return self.decode([anchor, token])[len(before) :].encode()

    @cached_property
    def _anchor(self) -> tuple[str, int]:
        anchor = self.encode("a", add_special_tokens=False)[-1]
        return self.decode([anchor]), anchor

    @cached_property
    def _byte_of_character(self) -> dict[str, bytes]:
        """The bytes that a byte-level vocabulary writes as characters; none where the vocabulary holds text."""
        space = self._library.token_to_id("\u0120")
        if space is None or self.decode([space]) != " ":
            return {}
        others = iter(range(256, 512))
        printable_bytes = (range(33, 127), range(161, 173), range(174, 256))
        return {chr(b) if any(b in r for r in printable_bytes) else chr(next(others)): bytes([b]) for b in range(256)}

    @property
    def chat_template(self) -> str | None:
        """The chat template's source, in jinja; None where the model has none."""
        return None if self._template is None else self._template.source

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's files have a chat template."""
        return self._template is not None

    def check_chat_template(self) -> str | None:
        """Render the chat template, if there is one, with one message of the user.

        Returns:
            Why the template refuses such a chat, with ``raise_exception``; None where it does not.

        Raises:
            InputError: it fails otherwise.
        """
        return None if self._template is None else self._template.check(self._variables)

    @property
    def template_names(self) -> frozenset[str]:
        """Variables that a chat template has from ``apply_chat_template``, whose ``options`` do not change them."""
        return frozenset({"messages", "tools", *self._variables})

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that asks the model for its answer to ``messages``.

        Encode it with ``add_special_tokens=False``: a template writes the special tokens itself.

        Args:
            messages: each with a ``role``, and with ``content``: text, parts ``{"type": "text", "text": …}``, or none
                beside ``tool_calls``. Other keys reach the template as they are.
            tools: functions that the model may call, in the form of OpenAI's API.
            options: more variables of the template, such as ``enable_thinking``.

        Raises:
            InputError: no template, messages of another form, or a template that is wrong, refuses them or takes too
                much.
        """
        if self._template is None:
            raise InputError(
                "the model has no chat template",
                "give the prompt as plain text, or put a chat_template.jinja into the checkpoint and export it again",
            )
        return self._template.render(messages, {**(options or {}), **self._variables, "tools": tools and list(tools)})


def _refused(path: Path) -> Any:
    return translated(lambda reason: BundleError(f"{printable(str(path))}: is not a tokenizer ({reason})", REMEDY))


def _add(library: Any, special: SpecialTokens, vocab_size: Any) -> list[str]:
    """Add the tokens that the files beside ``tokenizer.json`` name and it does not, as transformers does.

    A named token that is an ordinary entry of the vocabulary would else be cut into pieces where a template writes it.
    One that is no entry gets the next id, if the model has that.

    Returns:
        The texts of those that the model has no id for.
    """
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    wanted = {token.content: token for token in special.declared if token != known.get(token.content)}
    for token in special.named.values():
        before = wanted.get(token.content) or known.get(token.content)
        if before is None:
            wanted[token.content] = token
        elif not before.special:
            wanted[token.content] = _as_special(before)
    for token in special.listed:
        if token.content not in known:
            wanted.setdefault(token.content, token)
    wanted.pop("", None)
    fresh = [content for content in wanted if library.token_to_id(content) is None]
    first = max(
        [library.get_vocab_size(with_added_tokens=False), *(id_ + 1 for id_ in library.get_added_tokens_decoder())]
    )
    room = max(0, vocab_size - first) if is_int(vocab_size) else len(fresh)
    left_out = fresh[room:]
    lacking = set(left_out)
    library.add_tokens([token for content, token in wanted.items() if content not in lacking])
    return left_out


def _as_special(token: Any) -> Any:
    flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return type(token)(token.content, **flags, special=True)


def _read_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own, or the (default) one of ``tokenizer_config.json``."""
    try:
        path = directory / "chat_template.jinja"
        return read_text(path, BundleError, REMEDY, max_bytes=_MAX_TEMPLATE_BYTES)
    except BundleError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    elif isinstance(template, dict):
        template = template.get("default")
    if template is None or isinstance(template, str):
        return template
    raise BundleError(
        f"{printable(str(directory / _SETTINGS))}: chat_template is {brief(template)}; "
        f"expected text, or a list of {{name, template}}",
        f"{REMEDY}",
    )
