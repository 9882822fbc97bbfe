"""Requests that are wrong or incomplete, and clients that leave: a 4xx or a clean end, and the next is served."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from gta_edge.serve import server
from tests.helpers.service import Service, error_of, running, slow

VALID = {"prompt": [1, 2, 3], "max_tokens": 2}


@pytest.fixture(autouse=True)
def _nothing_is_left(service: Service):
    yield
    service.still_answers()


# --- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not JSON"),
        (b'{"prompt": "a"', "the body is not JSON"),
        (b'{"prompt": "\xff"}', "the body is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "the body is not JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[1, 2]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_what_is_no_json_object(service: Service, body, said):
    status, error = error_of(service.post(body))
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert said in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": ["a", [1, 300]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 257}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stop": ""}, None),
        ({"stop": 3}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"model": 1}, "model"),
        ({"sufix": "a"}, "sufix"),
        ({"": "a"}, ""),
        ({"x" * 100_000: "a"}, "x" * 200),
    ],
)
def test_fields_that_are_wrong_are_named(service: Service, change, param):
    response = service.http.post("/v1/completions", json=VALID | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert len(error["message"]) < 700
    assert error["message"].isprintable()


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "auto"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a"}], "store": True}, "store"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": "a"}], "response_format": {}}, "response_format.type"),
        ({"messages": [{"role": "user", "content": "a"}], "regex": "("}, None),
        ({"messages": [{"role": "user", "content": "a"}], "regex": "a", "grammar": "b"}, "regex"),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "json_schema": {"allOf": [{"type": "null"}, {"type": "array"}]},
            },
            None,
        ),
    ],
)
def test_chats_that_are_wrong(service: Service, content, param):
    response = service.http.post("/v1/chat/completions", json=content)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_prompt_that_is_too_long(service: Service):
    for prompt in ([1] * 129, "a" * 200_000):
        with pytest.raises(openai.BadRequestError, match="tokens and the model 128 positions") as caught:
            service.openai.completions.create(model="tiny", prompt=prompt, max_tokens=1)
        assert caught.value.code == "context_length_exceeded"
    full = service.openai.completions.create(model="tiny", prompt=[1] * 128, max_tokens=5)
    assert (full.usage.completion_tokens, full.choices[0].finish_reason) == (1, "length")


def test_ten_megabytes_are_refused_and_told_of(service: Service):
    body = json.dumps({"prompt": "a" * 10 * 2**20}).encode()
    assert error_of(service.post(body))[0] == 413
    with pytest.raises(openai.APIStatusError) as caught:
        service.openai.completions.create(model="tiny", prompt="a" * 10 * 2**20)
    assert caught.value.status_code == 413


def test_addresses_that_there_are_not(service: Service):
    assert service.http.get("/v2").status_code == 404
    wrong = service.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "POST /v1/chat/completions" in wrong.json()["error"]["message"]


# --- connections ---------------------------------------------------------------------------------------------------


def test_half_a_body(service: Service):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"
    assert error_of(service.send(head + b'{"prompt": [1'))[0] == 408  # the service waits half a second here
    with socket.create_connection(service.address) as connection:  # and one who leaves
        connection.sendall(head + b'{"prompt": [1')


@pytest.mark.parametrize(
    "content", [b"\x00\xff" * 500, b"GET / HTTP/9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_no_http(service: Service, content):
    assert service.send(content).startswith((b"HTTP/1.1 400", b""))


@pytest.mark.parametrize("content", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: 127"])
def test_a_client_that_says_nothing_more_is_left(chat_bundle, monkeypatch, content):
    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.2)
    with running(chat_bundle) as service:
        assert service.send(content, wait=5) == b""
        service.still_answers()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(chat_bundle, stream):
    """A step takes 50 ms, and the answer would take six seconds."""
    with running(chat_bundle, slots=1, session=slow(chat_bundle, 0.05)) as service:
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 120, "ignore_eos": True, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(service.address) as connection:
            connection.sendall(head.encode() + body)
            while not service.scheduler.metrics()["requests_running"]:
                time.sleep(0.01)
        started = time.monotonic()
        service.wait_until_idle(2)
        assert time.monotonic() - started < 2
        service.still_answers()


def test_two_hundred_connections(service: Service):
    """Half of them say nothing, the others ask all at once: each is answered, or told to come again."""
    idle = [socket.create_connection(service.address) for _ in range(100)]
    body = json.dumps(VALID | {"ignore_eos": True}).encode()
    found = []
    threads = [threading.Thread(target=lambda: found.append(service.post(body, wait=60))) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for connection in idle:
        connection.close()
    statuses = [response.split()[1] for response in found]
    assert len(statuses) == 100
    assert statuses.count(b"200") >= 60
    for status, response in zip(statuses, found, strict=True):
        if status == b"200":
            assert json.loads(response.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 2
        else:
            assert status == b"429"
            assert b"\r\nretry-after: 1\r\n" in response


def test_a_full_queue_says_when_to_come_again(chat_bundle):
    with running(chat_bundle, slots=1, queue=1, session=slow(chat_bundle), max_requests=3) as service:
        long = {"prompt": [1], "max_tokens": 100, "ignore_eos": True, "stream": True}
        with service.http.stream("POST", "/v1/completions", json=long) as first:
            pieces = first.iter_raw()
            next(pieces)  # it runs, and the next one waits
            with service.http.stream("POST", "/v1/completions", json=long) as second:
                assert (first.status_code, second.status_code) == (200, 200)
                refused = httpx.post(f"{service.url}/v1/completions", json=VALID, trust_env=False)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
                assert int(refused.headers["retry-after"]) >= 1
            two = httpx.post(f"{service.url}/v1/completions", json=VALID | {"n": 2}, trust_env=False)
            assert two.status_code == 429
        service.wait_until_idle()
        assert service.http.post("/v1/completions", json=VALID | {"n": 2}).status_code == 200
        for more in ({"n": 3}, {"prompt": [[1], [2], [3]]}):  # which no waiting would change
            too_many = service.http.post("/v1/completions", json=VALID | more)
            assert too_many.status_code == 400
            assert "3 answers are asked for, and the service takes 2; ask for fewer" in too_many.text
        service.still_answers()


def test_an_answer_ends_when_its_time_is_over(chat_bundle):
    with running(chat_bundle, slots=1, session=slow(chat_bundle, 0.05), answer_seconds=0.5) as service:
        answer = service.openai.completions.create(
            model="tiny", prompt=[1, 2], max_tokens=100, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
        assert 0 < answer.usage.completion_tokens < 100
        service.still_answers()


def test_a_stream_that_the_end_of_the_service_cuts_has_its_last_events(chat_bundle):
    with running(chat_bundle, slots=1, session=slow(chat_bundle, 0.05), drain_seconds=0.2) as service:
        stream = service.openai.completions.create(
            model="tiny", prompt=[1, 2], max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        service.server.should_exit = True
        events = list(stream)  # which raises where the connection is cut
        assert len(events) < 90
        assert events[-1].choices[0].finish_reason == "length"


def test_a_service_whose_scheduler_has_failed_is_not_healthy(chat_bundle):
    with running(chat_bundle) as service:
        assert service.http.get("/health").status_code == 200
        service.scheduler._batch.step = lambda: 1 / 0
        assert service.http.post("/v1/completions", json=VALID).status_code == 500
        service.scheduler._thread.join(10)
        answer = service.http.get("/health")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")


def test_a_model_that_fails_harms_one_request(chat_bundle):
    session = slow(chat_bundle, 0)
    run, failing = session._run, threading.Event()

    def run_or_fail(*arguments):
        if failing.is_set():
            failing.clear()
            raise RuntimeError("the device is gone")
        return run(*arguments)

    session._run = run_or_fail
    with running(chat_bundle, session=session) as service:
        for stream in (False, True):
            failing.set()
            answer = service.http.post("/v1/completions", json=VALID | {"stream": stream})
            assert answer.status_code == (200 if stream else 500)
            assert "server_error" in answer.text
            assert "Traceback" not in answer.text
            service.still_answers()
