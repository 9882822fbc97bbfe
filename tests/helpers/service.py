"""A service on a free port of this machine, in a thread of the test's process, and what asks it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from gta_edge.runtime.registry import load
from gta_edge.runtime.session import Session
from gta_edge.serve.app import make_app
from gta_edge.serve.scheduler import Scheduler
from gta_edge.serve.server import listen, make_server, url_of
from gta_edge.serve.settings import Settings


@dataclass(frozen=True)
class Service:
    """One that runs.

    Attributes:
        url: its address.
        scheduler: runs its requests.
        session: another one of the same bundle, to compare with.
        http: asks it.
        openai: asks it as OpenAI's users do.
        server: uvicorn's; ``should_exit`` ends it.
    """

    url: str
    scheduler: Scheduler
    session: Session
    http: httpx.Client
    openai: openai.OpenAI
    server: Any

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port

    def send(self, content: bytes, wait: float = 10) -> bytes:
        """Send bytes over a connection of their own, and return what comes until the other end closes it."""
        with socket.create_connection(self.address, timeout=wait) as connection:
            connection.sendall(content)
            received = b""
            with suppress(ConnectionResetError):  # that is an end, too
                while block := connection.recv(2**16):
                    received += block
            return received

    def post(self, body: bytes, path: str = "/v1/completions", wait: float = 10) -> bytes:
        """Return the whole response to a body, errors of HTTP included."""
        lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        return self.send("\r\n".join([*lines, "", ""]).encode() + body, wait)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Wait until no request runs or waits; fail where that takes long."""
        end = time.monotonic() + seconds
        while any(self.scheduler.metrics()[name] for name in ("requests_running", "requests_waiting")):
            assert time.monotonic() < end, self.scheduler.metrics()
            time.sleep(0.01)

    def still_answers(self) -> None:
        """Check that nothing is left of earlier requests, and that another one is answered."""
        self.wait_until_idle()
        answer = self.http.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 2


@contextmanager
def running(
    bundle,
    *,
    slots: int = 2,
    queue: int = 64,
    session=None,
    speculate: bool = False,
    drain_seconds: float = 5,
    **settings,
) -> Iterator[Service]:
    """Run a service of a bundle, or of a session; further arguments are those of ``Settings``."""
    own = session or load(bundle, "onnxruntime", threads=1)
    with listen("127.0.0.1", 0) as listening, own:
        scheduler = Scheduler(own, slots=slots, queue=queue, speculate=speculate)
        ready = threading.Event()
        app = make_app(own, scheduler, Settings(model="tiny", **settings))
        server = make_server(app, drain_seconds=drain_seconds, ready=ready.set, expire=scheduler.stop)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(20)
            url = url_of(listening)
            with (
                load(bundle, "onnxruntime", threads=1) as other,
                httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
                openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
            ):
                yield Service(url, scheduler, other, http, client, server)
        finally:
            server.should_exit = True
            thread.join(20)
            scheduler.close(drain=False)
            assert not thread.is_alive()


def slow(bundle, seconds: float = 0.02) -> Session:
    """Return a session whose every step takes some time, for answers that are still made when something happens."""
    session = load(bundle, "onnxruntime", threads=1)
    run = session._run

    def run_slowly(*arguments):
        time.sleep(seconds)
        return run(*arguments)

    session._run = run_slowly
    return session


def error_of(response: bytes) -> tuple[int, dict]:
    """Return the status of a response and the error that its body tells."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]
