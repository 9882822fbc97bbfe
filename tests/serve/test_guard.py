"""Who is let in."""

import httpx
import pytest

from tests.helpers.service import Service, running

KEY = "0123456789abcdef"


def status(service: Service, path="/v1/models", **headers):
    return httpx.get(f"{service.url}{path}", headers=headers, trust_env=False).status_code


def test_keys(chat_bundle):
    with running(chat_bundle, api_keys=(b"another-key", KEY.encode())) as service:
        assert status(service, authorization=f"Bearer {KEY}") == 200
        assert status(service, authorization=f"bearer {KEY}", origin="https://else.where") == 200
        for wrong in (
            {},
            {"authorization": KEY},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": b"Bearer \xe9"},
        ):
            assert status(service, **wrong) == 401
        assert status(service, "/metrics") == 401
        assert status(service, "/health") == status(service, "/") == 200
        refused = httpx.get(f"{service.url}/v1/models", trust_env=False)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:1"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_pages_of_others_are_kept_out(service: Service, headers, expected):
    assert status(service, **headers) == expected


def test_the_own_page_is_let_in(service: Service):
    assert status(service, origin=service.url) == 200
