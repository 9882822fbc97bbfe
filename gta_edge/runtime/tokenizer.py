"""Text to ids and back, as the files beside a model say: tokenizer, chat template and end tokens.

The work is done by the ``tokenizers`` library and by jinja2, both imported when first needed. What is here: reading
the files, errors in our terms, and text that can be shown while its tokens still arrive.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.config import ModelConfig
from gta_edge.errors import BundleError, GtaEdgeError, InputError

if TYPE_CHECKING:
    import jinja2

__all__ = ["IncrementalDecoder", "Tokenizer", "end_token_ids"]

_UNKNOWN_CHARACTER = "\ufffd"
"""What a decoder gives for bytes that are no UTF-8, or not yet."""

_WINDOW = 16
"""Tokens after which a window that cannot be closed is cut."""

_WINDOW_KEPT = 4
"""Tokens that a cut leaves: an unfinished character has at most 3 bytes, so at most 3 of them belong to it."""


class Tokenizer:
    """The tokenizer of one model; ``load`` makes it from files.

    Args:
        library: a ``tokenizers.Tokenizer``.
        chat_template: jinja source of the chat template; None where the model has none.
        variables: the special tokens by the names that templates use, such as ``bos_token``.
    """

    def __init__(
        self, library: Any, chat_template: str | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        # a saved limit would cut prompts in silence
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._variables = dict(variables or {})
        self._template: jinja2.Template | None = None
        self.chat_template = chat_template
        self._silent = {token for token, added in library.get_added_tokens_decoder().items() if added.special}
        self._byte_values = _byte_values(library)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """Read the tokenizer of a bundle or checkpoint; None where the directory has no ``tokenizer.json``.

        Raises:
            BundleError: a file of the tokenizer is damaged or cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            return None
        import tokenizers

        with _translated(lambda text: BundleError(f"{path}: is not a tokenizer ({text}); copy the file anew")):
            library = tokenizers.Tokenizer.from_file(str(path))
        settings = _read_object(directory / "tokenizer_config.json")
        return cls(library, _read_template(directory, settings), _special_tokens(settings))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with the special tokens that ``tokenizer.json`` puts around one.

        Raises:
            InputError: no text, not encodable as UTF-8, or text that this tokenizer has no tokens for.
        """
        with _translated(
            lambda reason: InputError(f"the text cannot be tokenized ({reason}); give valid Unicode text")
        ):
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and ids that the tokenizer does not know."""
        text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def is_silent(self, token: int) -> bool:
        """Tell whether an id has no text: a special token, or one the tokenizer does not know."""
        return token in self._silent or self._library.id_to_token(token) is None

    def byte_value(self, token: int) -> int | None:
        """Return the byte that a byte-fallback token such as ``<0xE4>`` stands for; None for any other token."""
        return self._byte_values.get(token)

    @property
    def has_byte_fallback(self) -> bool:
        """Whether characters outside the vocabulary are spelled in byte tokens (sentencepiece)."""
        return bool(self._byte_values)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text that asks the model for its answer to ``messages``.

        Encode it with ``add_special_tokens=False``: a template writes the special tokens itself.

        Args:
            messages: each with the texts ``role`` and ``content``.

        Raises:
            InputError: no template, messages of another form, or a template that is wrong or refuses them.
        """
        if self.chat_template is None:
            raise InputError(
                "the model has no chat template; give the prompt as plain text, "
                "or put a chat_template.jinja into the checkpoint and export it again"
            )
        plain = _check_messages(messages)
        with _translated(lambda reason: InputError(f"the chat template failed: {reason}; check it and the messages")):
            if self._template is None:
                self._template = _compile(self.chat_template)
            return self._template.render(
                **self._variables, messages=plain, tools=None, documents=None, add_generation_prompt=True
            )


class IncrementalDecoder:
    """Text of tokens that arrive one at a time: what is returned is final, and never part of a character.

    Bytes that can become no character give U+FFFD as soon as that is certain. A character that is still incomplete
    when the tokens end is never returned, so there is nothing to flush.

    The library's own ``DecodeStream`` is not used: it returns nothing while bytes are invalid, at a cost that grows
    with their square, and after a byte-fallback character followed by an invalid byte it fails for good.

    What a token adds is the growth of a window's text by it, since the text of a token alone lacks its leading space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._returned = 0  # characters of the window's text that were returned, or belong to tokens before
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take the next id and return the text that is now complete, often one token's, sometimes none."""
        if self._tokenizer.is_silent(token):
            return ""
        value = self._tokenizer.byte_value(token)
        if value is not None:
            # not by the window: the library spoils the whole run of byte tokens while its last character is incomplete
            self._restart([token])
            return self._bytes.decode(bytes([value]))
        broken = self._bytes.decode(b"", final=True)  # U+FFFD if the byte tokens before ended within a character
        return broken + self._grow(token)

    def _grow(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # a byte-level tokenizer gives one U+FFFD for an incomplete character at the end, however many bytes it has
        held = text.endswith(_UNKNOWN_CHARACTER) and not self._tokenizer.has_byte_fallback
        end = len(text) - held
        piece = text[self._returned : end]
        self._returned = max(self._returned, end)
        if not held:
            self._restart([token])
        elif len(self._window) > _WINDOW:
            self._restart(self._window[-_WINDOW_KEPT:])
            self._returned -= 1
        return piece

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._returned = len(self._tokenizer.decode(window))


def end_token_ids(directory: Path, config: ModelConfig) -> frozenset[int]:
    """Return the tokens that end a text: ``eos_token_id`` of ``generation_config.json``, else the config's.

    Raises:
        BundleError: the file is damaged, or an id is not in the model's vocabulary.
    """
    path = directory / "generation_config.json"
    found = _read_object(path).get("eos_token_id")
    if found is None:
        return frozenset(config.eos_token_ids)
    ids = found if isinstance(found, list) else [found]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise BundleError(
                f"{path}: eos_token_id is {found!r}; expected ids from 0 to {config.vocab_size - 1}: correct the file"
            )
    return frozenset(ids)


# --- files ---------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str | None:
    """Return a file's text; None where it is absent."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: is not UTF-8 ({error.reason}); copy the file anew") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, which is an object; empty where the file is absent."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is not valid JSON ({error}); copy the file anew") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path}: holds {type(content).__name__}; expected a JSON object: copy the file anew")
    return content


def _read_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own, or the (default) one of ``tokenizer_config.json``."""
    template = _read_text(directory / "chat_template.jinja")
    if template is not None:
        return template
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise BundleError(
        f"{directory / 'tokenizer_config.json'}: chat_template is {type(template).__name__}; "
        "expected text, or a list of {name, template}: correct the file"
    )


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return ``bos_token`` and the like, given as text or as an object with ``content``."""
    tokens: dict[str, str] = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


# --- libraries -----------------------------------------------------------------------------------------------------


@contextmanager
def _translated(translate: Callable[[str], GtaEdgeError]) -> Iterator[None]:
    """Turn whatever a library raises into our error, made from its message on one line."""
    try:
        yield
    except (GtaEdgeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise translate(" ".join(str(error).split()) or type(error).__name__) from error


def _byte_values(library: Any) -> dict[int, int]:
    """Return byte-fallback tokens with their bytes; none where the decoder does not turn them into bytes."""
    probe = library.token_to_id("<0x41>")
    if probe is None or library.decode([probe]) != "A":
        return {}
    tokens = {library.token_to_id(f"<0x{value:02X}>"): value for value in range(256)}
    tokens.pop(None, None)
    return tokens


def _check_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"the messages are {messages!r}; expected a list of {{'role': …, 'content': …}}")
    for message in messages:
        texts = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"a message is {message!r}; expected {{'role': …, 'content': …}}, both text")
    return [dict(message) for message in messages]


def _compile(source: str) -> jinja2.Template:
    """Compile a chat template in a sandbox, with what templates written for transformers rely on."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}`` marks the answers for training; for us it is just its content."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # without HTML escapes, unlike jinja2's

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)
