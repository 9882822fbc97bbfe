"""The service as an ASGI application: what each address answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gta_edge.errors import GtaEdgeError, InputError
from gta_edge.libraries.optional import optional
from gta_edge.runtime.generation.grammar import Grammar
from gta_edge.runtime.session import Session
from gta_edge.serve.answers import Answers, ChatAnswers, CompletionAnswers
from gta_edge.serve.choices import Choices, Mailbox
from gta_edge.serve.fields import json_object
from gta_edge.serve.guard import Guard, read_body
from gta_edge.serve.metrics import Metrics
from gta_edge.serve.page import Page
from gta_edge.serve.prompts import Prompts
from gta_edge.serve.reply import Reply
from gta_edge.serve.request_error import RequestError
from gta_edge.serve.scheduler import RequestOptions, Scheduler
from gta_edge.serve.schema import ChatRequest, CompletionRequest, Options, TokenizeRequest
from gta_edge.serve.settings import Settings
from gta_edge.serve.tool_calls import LLAMA, CallParser, call_grammar, format_of
from gta_edge.support.text import brief

__all__ = ["make_app"]

_Asked = Callable[[], Sequence[RequestOptions]]


def make_app(session: Session, scheduler: Scheduler, settings: Settings) -> Any:
    """Return the ASGI application of a service.

    Args:
        session: whose tokenizer, vocabulary and defaults it goes by; the scheduler runs it.
        scheduler: runs the requests.
        settings: see there.

    Raises:
        BackendError: starlette or prometheus-client is not installed.
    """
    service = _Service(session, scheduler, settings)
    routing, middleware = optional("starlette.routing", "serve"), optional("starlette.middleware", "serve")
    addresses: list[tuple[str, Callable[[Any], Any], str]] = [
        ("/", service.page, "GET"),
        ("/health", service.health, "GET"),
        ("/metrics", service.metrics_text, "GET"),
        ("/v1/models", service.models, "GET"),
        ("/v1/models/{model:path}", service.model, "GET"),
        ("/v1/completions", service.completions, "POST"),
        ("/v1/chat/completions", service.chat_completions, "POST"),
        ("/tokenize", service.tokenize, "POST"),
    ]
    return optional("starlette.applications", "serve").Starlette(
        routes=[routing.Route(path, answer, methods=[method]) for path, answer, method in addresses],
        middleware=[middleware.Middleware(Guard, settings, service.answered)],
        exception_handlers={optional("starlette.exceptions", "serve").HTTPException: _not_there},
    )


_PATHS = frozenset({"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize"})
"""Those that are counted apart."""


async def _not_there(request: Any, error: Any) -> None:
    """Tell that there is no such address, or not by this method, as other errors are told."""
    what = "takes another method" if error.status_code == 405 else "does not exist"
    raise RequestError(
        error.status_code,
        f"{brief(request.url.path)} {what}",
        "there are POST /v1/chat/completions, /v1/completions and /tokenize, GET /v1/models, /health, /metrics and /",
        headers=dict(error.headers or {}),
    )


class _Service:
    """Answers requests, as starlette's endpoints."""

    def __init__(self, session: Session, scheduler: Scheduler, settings: Settings) -> None:
        self._session, self._scheduler, self._settings = session, scheduler, settings
        self._prompts = Prompts(session)
        self._metrics = Metrics(self._figures)
        self._mailbox: Mailbox | None = None  # of the loop that the last request came in
        self._page = Page()
        self._call_format = None if session.tokenizer is None else format_of(session.tokenizer.chat_template)
        self._responses = optional("starlette.responses", "serve")
        self._created = int(time.time())

    # --- text ------------------------------------------------------------------------------------------------------

    async def completions(self, request: Any) -> Reply:
        started = time.perf_counter()
        parsed = CompletionRequest.parse(json_object(await read_body(request.receive, self._settings)))
        options = parsed.options
        self._check_model(options.model)
        count = len(parsed.prompts)
        names = [f"prompt[{i}]" if count > 1 else "prompt" for i in range(count)]
        prompts = await asyncio.to_thread(lambda: list(map(self._prompts.of_completion, parsed.prompts, names)))
        echoed = await asyncio.to_thread(self._echoed, parsed, prompts) if parsed.echo else []
        asked = await self._asked(options, chat=False, of_prompt=options.logprobs if parsed.echo else None)
        answers = CompletionAnswers(self._settings.model, self._session.tokenizer, echoed)
        return self._reply(prompts, options, asked, answers, started)

    def _echoed(self, parsed: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[tuple[str, int]]:
        found = []
        for given, ids in zip(parsed.prompts, prompts, strict=True):
            text = given if isinstance(given, str) else self._prompts.tokenizer.decode(ids)
            found += [(text, ids[0])] * parsed.options.n
        return found

    async def chat_completions(self, request: Any) -> Reply:
        started = time.perf_counter()
        parsed = ChatRequest.parse(json_object(await read_body(request.receive, self._settings)))
        options = parsed.options
        self._check_model(options.model)
        ids = await asyncio.to_thread(self._prompts.of_chat, parsed)
        form = self._call_format
        if parsed.forced:
            form = form or LLAMA  # any will do, of a model that knows none
            options = replace(options, grammar=("grammar", call_grammar(parsed.forced, form)))
        try:
            asked = await self._asked(options, chat=True)
        except InputError as error:
            raise await asyncio.to_thread(self._blamed, parsed.forced, error) from error
        new_parser = None
        if form is not None and parsed.tools is not None:
            new_parser = partial(CallParser, form, frozenset(tool["function"]["name"] for tool in parsed.tools))
        answers = ChatAnswers(self._settings.model, self._session.tokenizer, new_parser)
        return self._reply([ids], options, asked, answers, started)

    def _blamed(self, functions: Sequence[Mapping[str, Any]], error: GtaEdgeError) -> GtaEdgeError:
        """Return what is told of a grammar of calls that cannot be used: of which function the schema is wrong."""
        for function in functions:
            try:
                Grammar(self._session, "json_schema", function.get("parameters") or {})
            except InputError as wrong:
                problem = f"tool {brief(function['name'])}: {wrong.problem}"
                return RequestError(400, problem, wrong.remedy, param="tools", code="invalid_value")
        return error

    async def _asked(self, options: Options, *, chat: bool, of_prompt: int | None = None) -> _Asked:
        """Return what is asked of the scheduler, for each answer to a prompt, when it is asked for."""
        session, settings = self._session, self._settings
        wanted = session.max_length if options.max_tokens is None else options.max_tokens
        most = wanted if settings.max_tokens is None else min(wanted, settings.max_tokens)
        ends = session.end_token_ids | session.chat_end_token_ids if chat else session.end_token_ids
        grammar = None
        if options.grammar is not None:
            grammar = await asyncio.to_thread(Grammar, session, *options.grammar)
        common = RequestOptions(
            max_new_tokens=most,
            stop=options.stop,
            end_token_ids=frozenset() if options.ignore_eos else ends,
            logprobs=0 if options.logprobs is None and options.best_of > options.n else options.logprobs,
            prompt_logprobs=of_prompt,
        )
        vocabulary = session.config.vocab_size
        sampling = [options.sampling_for(i, settings.sampling, vocabulary) for i in range(options.best_of)]
        return lambda: [
            replace(common, sampling=each, constraint=None if grammar is None else grammar.constraint())
            for each in sampling
        ]

    def _reply(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options,
        asked: _Asked,
        answers: Answers,
        started: float,
    ) -> Reply:
        asked_for, room = len(prompts) * options.best_of, self._scheduler.room
        if asked_for > room:  # which no waiting would change
            raise RequestError(
                400,
                f"{asked_for} answers are asked for, and the service takes {room}",
                "ask for fewer in a request, or start it with a larger --queue",
                param="n" if options.n > 1 else "best_of" if options.best_of > 1 else "prompt",
                code="invalid_value",
            )
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:  # an ASGI application may outlive a loop
            self._mailbox = Mailbox(loop)
        choices = Choices(self._scheduler, self._mailbox)
        for ids in prompts:
            for each in asked():
                choices.submit(ids, each)
        return Reply(
            choices,
            answers,
            options,
            seconds=self._settings.answer_seconds,
            metrics=self._metrics,
            started=started,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model:
            raise RequestError(
                404,
                f"the model {brief(name)} is not served here",
                f"there is {self._settings.model}; leave it out to take whichever there is",
                param="model",
                code="model_not_found",
            )

    async def tokenize(self, request: Any) -> Any:
        parsed = TokenizeRequest.parse(json_object(await read_body(request.receive, self._settings)))
        tokenizer = self._prompts.tokenizer
        ids = await asyncio.to_thread(tokenizer.encode, parsed.content, add_special_tokens=parsed.add_special)
        if not parsed.with_pieces:
            return self._responses.JSONResponse({"tokens": ids})
        pieces = await asyncio.to_thread(lambda: list(map(self._piece, ids)))
        found = [{"id": token, "piece": piece} for token, piece in zip(ids, pieces, strict=True)]
        return self._responses.JSONResponse({"tokens": found})

    def _piece(self, token: int) -> str | list[int]:
        """Return a token's text, or its bytes where they are a part of a character."""
        said = self._prompts.tokenizer.token_bytes(token)
        try:
            return said.decode()
        except UnicodeDecodeError:
            return list(said)

    def answered(self, path: str, status: int) -> None:
        """Count a response, by its path where that is one of ours."""
        self._metrics.answered(path if path in _PATHS else "other", status)

    # --- about the service -----------------------------------------------------------------------------------------

    async def page(self, request: Any) -> Any:
        return self._responses.Response(self._page.content, headers=self._page.headers, media_type="text/html")

    async def health(self, request: Any) -> Any:
        if self._scheduler.closed:
            raise RequestError(503, "no requests are taken any more", "restart the service")
        return self._responses.JSONResponse({"status": "ok"})

    async def metrics_text(self, request: Any) -> Any:
        content, kind = self._metrics.text()
        return self._responses.Response(content, headers={"content-type": kind})

    async def models(self, request: Any) -> Any:
        return self._responses.JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Any) -> Any:
        self._check_model(request.path_params["model"])
        return self._responses.JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self._settings.model, "object": "model", "created": self._created, "owned_by": "gta-edge"}
        chats = self._session.tokenizer is not None and self._session.tokenizer.has_chat_template
        return {**about, "max_model_len": self._session.max_length, "chat": chats}

    def _figures(self) -> dict[str, float]:
        return {**self._scheduler.metrics(), "cache_bytes": self._session.cache_bytes}
