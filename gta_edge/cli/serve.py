"""``gta-edge serve``: an OpenAI-compatible service with a web page."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.choices import BatchSpeculate
from gta_edge.cli.options import BundleArgument, SamplingOptions, SessionOptions
from gta_edge.cli.output import current

__all__ = ["serve"]

_MODULES = ("starlette", "uvicorn", "prometheus_client")
_MAX_SLOTS = 256


@dataclass(frozen=True)
class _Sampling(SamplingOptions):
    temperature: Annotated[float | None, typer.Option(help="Where a request leaves it open; 0 is greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="The same: draw from the k likeliest tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="The same: from the likeliest tokens of this total.")] = None
    min_p: Annotated[float | None, typer.Option(help="The same: drop tokens below this fraction.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="The same: above 1 discourages repetition.")] = None


def serve(
    bundle: BundleArgument,
    *,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of API keys, one a line; GTA_EDGE_API_KEY holds one, too.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="The model's name for clients; the bundle's by default.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=_MAX_SLOTS, help="Answers that are made at a time.")] = 4,
    queue: Annotated[int, typer.Option(min=0, max=10000, help="Answers that may wait for one of those to end.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which an answer ends as it is.")] = 600,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that answers may take after SIGTERM.")] = 30,
    cache_ram: Annotated[
        int, typer.Option(min=0, max=2**20, help="MiB for caches of texts that have ended; 0 keeps none.")
    ] = 256,
    prompt_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory for caches of texts that have ended.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    speculate: Annotated[
        BatchSpeculate, typer.Option(help="Guess tokens of each answer from its text so far.")
    ] = BatchSpeculate.OFF,
    max_body: Annotated[int, typer.Option(min=1, max=1024, help="Size of a request at most, in MiB.")] = 4,
    sampling: _Sampling,
    unit: Annotated[bool, typer.Option("--unit", help="Print a systemd unit of this command, and end.")] = False,
    opening: SessionOptions,
) -> None:
    """Serve a model to OpenAI's clients, and a chat page to browsers.

    It listens at this machine alone unless --host says otherwise. SIGTERM ends it when it has answered what it had.
    """
    from gta_edge.formats.bundle import Bundle
    from gta_edge.libraries.optional import require_modules
    from gta_edge.runtime.generation.sampling import Sampling
    from gta_edge.serve.app import make_app
    from gta_edge.serve.keys import VARIABLE, read_keys
    from gta_edge.serve.scheduler import Scheduler
    from gta_edge.serve.server import listen, make_server, url_of
    from gta_edge.serve.settings import Settings

    output = current()
    if alias is not None and not alias.strip():
        raise typer.BadParameter("--alias is empty: give a name, or leave it out for the bundle's")
    if prompt_cache is not None:
        opening.cache.require_whole("--prompt-cache")
    keys = read_keys(api_key_file, os.environ)
    Sampling(**sampling.given())  # what it and the policy refuse is told before the model is loaded
    opening.cache.policy()
    if unit:
        Bundle.open(bundle)
        if VARIABLE in os.environ:
            output.note(f"note: the unit does not have the key of {VARIABLE}: give it a file with --api-key-file")
        _print_unit(bundle, {"--api-key-file": api_key_file, "--prompt-cache": prompt_cache}, drain_timeout)
        return
    require_modules(_MODULES, "serve", lambda name: None)
    with listen(host, port) as listening:
        local = listening.getsockname()[0] in ("127.0.0.1", "::1")
        if not (local or keys):
            output.note(f"note: anyone who reaches {host} can use this service: --api-key-file asks them for a key")
        with output.progress() as progress:
            session = opening.load(bundle, progress=progress)
        with session:
            name = alias or bundle.absolute().name
            settings = Settings(
                model=name,
                api_keys=keys,
                local=local,
                sampling={**session.chat_sampling, **sampling.given()},
                max_tokens=max_tokens,
                max_body_bytes=max_body * 2**20,
                max_requests=parallel + queue + 16,
                answer_seconds=timeout,
            )
            scheduler = Scheduler(
                session,
                slots=parallel,
                queue=queue,
                kept_bytes=cache_ram * 2**20,
                prompt_cache=prompt_cache,
                speculate=speculate is BatchSpeculate.LOOKUP,
            )

            def ready() -> None:
                _tell_ready(url_of(listening), session, settings, parallel)

            try:
                app = make_app(session, scheduler, settings)
                server = make_server(app, drain_seconds=drain_timeout, ready=ready, expire=scheduler.stop)
                server.run(sockets=[listening])
            finally:
                scheduler.close(drain=False)


def _tell_ready(url: str, session: Any, settings: Any, slots: int) -> None:
    output = current()
    found = {"url": url, "model": settings.model, "backend": session.backend, "slots": slots}
    found |= {"max_length": session.max_length, "sampling": dict(settings.sampling), "pid": os.getpid()}
    if output.json:
        output.document(found)
    else:
        print(f"{settings.model} on {session.backend} at {url} (page) and {url}/v1 (API)")
        if settings.sampling:
            taken = ", ".join(f"{option} {value:g}" for option, value in settings.sampling.items())
            output.note(f"where a request leaves it open: {taken}")
        output.note(f"{slots} answers at a time, of up to {session.max_length:,} tokens each; Ctrl-C ends it")
    sys.stdout.flush()


def _print_unit(bundle: Path, paths: dict[str, Path | None], drain_timeout: float) -> None:
    """Print the unit of this very command, with absolute paths: a unit has no directory that it is started in."""
    from gta_edge.serve.unit import systemd_unit
    from gta_edge.support.files import cache_directory

    given = {option: path for option, path in paths.items() if path is not None}
    absolute = {str(path): str(path.absolute()) for path in (bundle, *given.values())}
    absolute |= {f"{option}={path}": f"{option}={path.absolute()}" for option, path in given.items()}
    writable = [bundle, *(path for option, path in given.items() if option == "--prompt-cache")]
    written = [path.absolute() for path in writable] + ([found] if (found := cache_directory()) else [])
    words = [absolute.get(word, word) for word in sys.argv[1:] if word != "--unit"]
    text = systemd_unit(
        [sys.executable, "-m", "gta_edge", *words],
        user=getpass.getuser(),
        description=f"gta-edge serve {bundle.absolute().name}",
        writable=written,
        stop_seconds=drain_timeout + 10,
    )
    output = current()
    if output.json:
        output.document({"unit": text})
    else:
        print(text, end="")
