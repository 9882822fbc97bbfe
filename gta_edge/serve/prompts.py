"""From what a client sends to the ids that the model continues."""

from __future__ import annotations

from collections.abc import Sequence

from gta_edge.errors import CapacityError
from gta_edge.formats.tokenizer import NO_TOKENIZER, Tokenizer
from gta_edge.runtime.session import Session
from gta_edge.serve.request_error import RequestError
from gta_edge.serve.schema import ChatRequest
from gta_edge.support.text import brief

__all__ = ["Prompts"]


class Prompts:
    """Makes ids of texts and chats, and checks ids.

    The methods take time for a long text (tokenizing, or the process that renders templates), and may be called in any
    thread.

    Args:
        session: whose tokenizer, vocabulary and positions they are for.
    """

    def __init__(self, session: Session) -> None:
        self._tokenizer = session.tokenizer
        self._vocab_size = session.config.vocab_size
        self._max_length = session.max_length

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: it has none.
        """
        if self._tokenizer is None:
            raise RequestError(400, "the model has no tokenizer", NO_TOKENIZER, code="no_tokenizer")
        return self._tokenizer

    def of_completion(self, prompt: str | Sequence[int], name: str = "prompt") -> list[int]:
        """Return the ids of a text or, checked, of ids.

        Raises:
            RequestError: ids outside the vocabulary, or no tokens at all.
            CapacityError: more tokens than the model has positions for.
            InputError: text that cannot be tokenized.
        """
        if isinstance(prompt, str):
            return self._checked(self.tokenizer.encode(prompt), name)
        if outside := [token for token in prompt if not 0 <= token < self._vocab_size]:
            raise RequestError(
                400,
                f"{name} has token id {outside[0]}",
                f"expected 0 to {self._vocab_size - 1}, the model's vocabulary",
                param=name,
                code="invalid_value",
            )
        return self._checked(list(prompt), name)

    def of_chat(self, request: ChatRequest) -> list[int]:
        """Return the ids that ask for an answer to a chat, by the model's chat template.

        Raises:
            RequestError: a variable for the template that it has from elsewhere.
            CapacityError: more tokens than the model has positions for.
            InputError: no chat template, or messages that it refuses.
        """
        tokenizer = self.tokenizer
        if taken := [name for name in request.template_options if name in tokenizer.template_names]:
            name = "chat_template_kwargs"
            problem = f"{name} has {brief(taken[0])}, which the service gives the template itself"
            raise RequestError(400, problem, "leave it out", param=f"{name}.{taken[0]}", code="invalid_value")
        text = tokenizer.apply_chat_template(request.messages, tools=request.tools, options=request.template_options)
        return self._checked(tokenizer.encode(text, add_special_tokens=False), "messages")

    def _checked(self, ids: list[int], name: str) -> list[int]:
        if not ids:
            raise RequestError(400, f"{name} has no tokens", "give text, or at least one id", param=name)
        if len(ids) > self._max_length:
            problem = f"{name} has {len(ids)} tokens and the model {self._max_length} positions"
            raise CapacityError(problem, "shorten it")
        return ids
