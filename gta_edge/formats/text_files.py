"""Everything beside a model that text in and out needs, read and checked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gta_edge.errors import BundleError, CheckpointError, InputError
from gta_edge.formats.generation_config import GenerationConfig
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.model.config import ModelConfig
from gta_edge.support.text import brief, printable

__all__ = ["TextFiles", "check_text_files"]


@dataclass(frozen=True)
class TextFiles:
    """The tokenizer of a bundle or checkpoint, None without one, and what its files say about generating.

    Attributes:
        notes: what ``check_text_files`` found that a person should know of, though it is no fault.
    """

    tokenizer: Tokenizer | None
    generation: GenerationConfig
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: Path, config: ModelConfig) -> TextFiles:
        """Read the files.

        Raises:
            BundleError: one of them is damaged, or does not suit the model.
        """
        tokenizer = Tokenizer.load(directory)
        end = None if tokenizer is None else tokenizer.end_token_id
        return cls(tokenizer, GenerationConfig.load(directory, config, end))


def check_text_files(directory: Path, config: ModelConfig) -> TextFiles:
    """Open a checkpoint's files as a bundle of it would be opened, and render the chat template.

    A bundle's files cannot be corrected, since their hashes are recorded: so they are opened before they are copied.

    Raises:
        CheckpointError: what a bundle of them could not be opened or used with, naming the checkpoint's file.
    """
    try:
        files = TextFiles.load(directory, config)
    except BundleError as error:
        raise CheckpointError(error.problem, error.remedy) from error
    if files.tokenizer is None:
        return files
    try:
        refusal = files.tokenizer.check_chat_template()
    except InputError as error:
        raise CheckpointError(
            f"{printable(str(directory))}: {error}, or remove it from tokenizer_config.json or chat_template.jinja"
        ) from error
    return replace(files, notes=tuple(_notes(files.tokenizer, config.vocab_size, refusal)))


def _notes(tokenizer: Tokenizer, vocab_size: int, refusal: str | None) -> Iterator[str]:
    if refusal is not None:
        yield f"the chat template refuses a chat of one message by the user: {refusal}"
    if tokenizer.left_out:
        yield (
            f"the tokenizer's files name {_some(tokenizer.left_out)}, which tokenizer.json lacks and the model's "
            f"vocabulary of {vocab_size} has no room for: such text is ordinary text"
        )
    beyond = tokenizer.beyond(vocab_size)
    if beyond:
        named = [f"{brief(text)} ({id_})" for id_, text in beyond.items()]
        yield (
            f"tokenizer.json has {len(beyond)} tokens that the model's vocabulary of {vocab_size} lacks, "
            f"{', '.join(named[:3])}{' ...' if len(named) > 3 else ''}: a prompt with one of them is refused"
        )


def _some(texts: Sequence[str]) -> str:
    shown = ", ".join(brief(text) for text in texts[:3])
    return f"{shown} and {len(texts) - 3} more" if len(texts) > 3 else shown
