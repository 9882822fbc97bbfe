"""Texts that follow each other in one cache: what it holds of the next one is not run again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.errors import InputError, OutputError
from gta_edge.runtime.generation.kept_caches import common_prefix
from gta_edge.runtime.prompt_cache import CacheSize, load_prompt_cache, save_prompt_cache
from gta_edge.runtime.session import Claim, Ids, Logits, Session, checked_session
from gta_edge.runtime.token_tree import TokenTree
from gta_edge.support.arguments import path_argument
from gta_edge.support.files import check_new_file

if TYPE_CHECKING:
    from gta_edge.runtime.generation.loop import Generation, Prompt

__all__ = ["Conversation"]


class Conversation:
    """Prompts to one session that go on from what its cache holds, where they begin like it: a chat, for instance.

    A prompt is given whole each time, the messages so far with the new one. Of it only that is run which follows the
    longest common beginning with the tokens in the cache, so a turn costs its own tokens. What else uses the session in
    between empties the cache, and the next prompt is run whole.

    Args:
        session: runs the model.

    Attributes:
        session: the same.
        reused_tokens: tokens of the last prompt that were not run again.
    """

    def __init__(self, session: Session) -> None:
        self.session = checked_session(session, "the session")
        self.reused_tokens = 0
        self._claim: Claim | None = None
        self._ids: Ids = np.zeros(0, np.int64)
        self._turn: _Turn | None = None

    @property
    def ids(self) -> Ids:
        """Tokens that the cache holds, int64 [N] (a copy)."""
        return self._ids.copy() if self._claim is not None and self._claim.holds else np.zeros(0, np.int64)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Continue a prompt as ``generate`` does, with its options, but without emptying the cache first.

        A generation that has not ended when the next one begins is over: asking it for more is an InputError.

        Raises:
            InputError: options or a prompt that make no sense for this model.
            CapacityError: the prompt is longer than the model has positions for.
        """
        from gta_edge.runtime.generation.loop import generate

        generation: Generation = generate(self.session, prompt, conversation=self, **options)
        return generation

    def save(self, path: str | os.PathLike[str]) -> CacheSize:
        """Write the cache to a file, a prompt cache, in place of an older one.

        Raises:
            InputError: the cache holds nothing, or a policy manages it; or what is there is no prompt cache.
            OutputError: it cannot be written.
            BackendError: the backend exports no cache.
        """
        place = path_argument(path, "the prompt cache")
        if self._claim is None or not self._claim.holds or not len(self._ids):
            raise InputError("the cache holds nothing that could be saved", "generate something first")
        return save_prompt_cache(self.session, place, self._ids, self._claim.export_cache())

    def load(self, path: str | os.PathLike[str]) -> CacheSize:
        """Take a prompt cache from a file in place of what the cache holds; going on is then as if never stopped.

        Raises:
            InputError: there is none; it is damaged, of a newer format, or of another bundle, backend or type.
            CapacityError: there is no memory for it.
            BackendError: the backend imports no cache.
        """
        ids, saved = load_prompt_cache(self.session, path_argument(path, "the prompt cache"))
        self._claim, self._turn = self.session.claim(1), None
        self._ids = ids[:0]
        self._claim.import_cache(saved)
        self._ids = ids
        return CacheSize.of(self.session, len(ids))

    def resume(self, path: str | os.PathLike[str]) -> CacheSize | None:
        """Load a prompt cache if there is one; and make sure now that one can be saved there in the end.

        Raises:
            InputError: as of ``load`` and ``save``.
            OutputError: nothing can be written there.
            BackendError: the backend exports no cache.
        """
        self.session.require_exports()
        place = check_new_file(path, force=True)
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{place} cannot be written", "give a file in a directory that can be written to")
        return self.load(place) if place.exists() else None

    def begin(self) -> Claim:
        """Return the right to go on from the cache; the first call of ``forward`` with it is a whole prompt."""
        self._turn = _Turn(self)
        return self._turn


class _Turn(Claim):
    """The claim of one generation in a conversation, until the next one begins."""

    def __init__(self, conversation: Conversation) -> None:
        super().__init__(conversation.session)
        self._conversation, self._begins = conversation, True

    @property
    def holds(self) -> bool:
        of = self._conversation
        return of._turn is self and of._claim is not None and of._claim.holds

    def forward(self, ids: Any, *, lengths: Any = None, all_logits: bool = False, tree: Any = None) -> Logits:
        if tree is not None:
            return self._held().forward(ids, lengths=lengths, all_logits=all_logits, tree=tree)
        tokens, of = np.asarray(ids, np.int64), self._conversation
        if self._begins:
            of.reused_tokens = self._rewind(tokens[0])
            tokens, self._begins = tokens[:, of.reused_tokens :], False
        logits = self._held().forward(tokens, lengths=lengths, all_logits=all_logits)
        of._ids = np.concatenate([of._ids, tokens[0]])
        return logits

    def tree(self, sequence: int = 0) -> TokenTree:
        return self._held().tree(sequence)

    def accept(self, tree: TokenTree, node: int, *, close: bool = False) -> None:
        claim, came = self._held(), tree.ids(node)
        claim.accept(tree, node, close=close)
        self._conversation._ids = np.concatenate([self._conversation._ids, came])

    def truncate(self, length: Any) -> None:
        self._held().truncate(length)
        self._conversation._ids = self._conversation._ids[: int(length)]

    def _held(self) -> Claim:
        of = self._conversation
        if of._turn is not self or of._claim is None:
            raise InputError("another generation of the conversation began", "finish one before the next")
        return of._claim

    def _rewind(self, prompt: Ids) -> int:
        """Leave in the cache what a prompt begins with, but for its last token; return how many tokens that is."""
        of = self._conversation
        if of._claim is None or not of._claim.holds:
            of._claim, of._ids = of.session.claim(), of._ids[:0]
        claim = self._held()
        count = of.session.reusable(len(of._ids), min(common_prefix(prompt, of._ids), len(prompt) - 1))
        if count < len(of._ids) or of.session.trees:  # a tree that an interrupted generation left is closed
            try:
                claim.truncate(count)
            except InputError:  # a policy has dropped some of them
                count = 0
                claim.reset()
            of._ids = of._ids[:count]
        return count
