"""Everything beside a model that text in and out needs, read and checked together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gta_edge.config import ModelConfig
from gta_edge.errors import BundleError, CheckpointError, InputError
from gta_edge.formats.generation_config import GenerationConfig
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.support.text import printable

__all__ = ["TextFiles", "check_text_files"]


@dataclass(frozen=True)
class TextFiles:
    """The tokenizer of a bundle or checkpoint, None without one, and what its files say about generating."""

    tokenizer: Tokenizer | None
    generation: GenerationConfig

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
    """Open a checkpoint's files as a bundle of it would be opened, chat template included.

    A bundle's files cannot be corrected, since their hashes are recorded: so they are opened before they are copied.

    Raises:
        CheckpointError: what a bundle of them could not be opened or used with, naming the checkpoint's file.
    """
    try:
        files = TextFiles.load(directory, config)
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    template = files.tokenizer.chat_template if files.tokenizer else None
    if template is not None:
        try:
            template.check()
        except InputError as error:
            raise CheckpointError(
                f"{printable(str(directory))}: {error}, or remove it from tokenizer_config.json or chat_template.jinja"
            ) from error
    return files
