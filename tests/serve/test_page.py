"""The page, in a browser, with a conversation; and what it may do, without one."""

import re

import pytest

from tests.helpers.browser import PROGRAM, Page, browser
from tests.helpers.service import Service, running, slow

ANSWER = "document.querySelector('.turn.assistant:last-child > div').textContent"
IDLE = "!document.getElementById('send').hidden"


def ask(page: Page, text: str) -> str:
    page.value("document.getElementById('text').focus()")
    page.type(f"{text}\n")
    page.until(f"document.querySelector('.turn.assistant:last-child') && {IDLE}")
    return page.value(ANSWER)


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_a_conversation(chat_bundle):
    """Every step takes 20 ms, so that an answer can be stopped."""
    with running(chat_bundle, session=slow(chat_bundle), max_tokens=24) as service, browser() as page:
        page.open(service.url)
        page.until("document.getElementById('model').textContent === 'tiny'")
        first = ask(page, "Hi")
        expected = service.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
        assert first == expected.choices[0].message.content
        assert re.fullmatch(
            r"\d+ tokens · [\d.]+ tokens/s · prompt \d+.*", page.value("document.getElementById('speed').textContent")
        )
        assert page.until("document.getElementById('cache').textContent").startswith("cache: ")

        # what was said goes with the next message; an option too
        page.value("document.getElementById('settings').querySelector('[name=max_tokens]').value = 3")
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "Yo"},
        ]
        expected = service.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
        assert ask(page, "Yo") == expected.choices[0].message.content
        assert page.value("document.querySelectorAll('.turn').length") == 4
        page.click("#again")
        page.until(IDLE)
        assert page.value(ANSWER) == expected.choices[0].message.content
        assert page.value("document.querySelectorAll('.turn').length") == 4

        # markup is shown, not obeyed
        page.click("#new")
        ask(page, "<img src=x onerror=\"document.title='broken'\">")
        assert page.value("document.querySelectorAll('main img').length") == 0

        # an error is told
        ask(page, "long " * 200)
        assert "128 positions" in page.value(ANSWER)

        dark = "getComputedStyle(document.body).backgroundColor"
        before = page.value(dark)
        page.click("#theme")
        assert page.value(dark) != before
        told = [text for text in page.logged if "400" not in text]  # the refused message
        assert told == []


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_an_answer_is_stopped_and_a_key_is_asked_for(chat_bundle):
    with running(chat_bundle, session=slow(chat_bundle, 0.1), api_keys=(b"0123456789",)) as service, browser() as page:
        page.open(service.url)
        page.until("document.getElementById('speed').textContent.includes('API key')")
        page.click("#open-settings")
        page.value("document.querySelector('[name=key]').focus()")
        page.type("0123456789\n")
        page.until("document.getElementById('model').textContent === 'tiny'")
        page.value("document.getElementById('text').focus()")
        page.type("Hi\n")
        page.until(f"document.querySelector('.turn.assistant') && {ANSWER} !== '…'")
        assert service.scheduler.metrics()["requests_running"] == 1
        page.click("#stop")
        page.until(IDLE)
        service.wait_until_idle(3)


def test_the_page_is_whole_and_confined(service: Service):
    response = service.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch("'sha256-[^']+'", policy["script-src"])
    assert "unsafe" not in response.headers["content-security-policy"]
    assert not re.search(r"https?://|//\w", response.text)  # nothing from elsewhere
    assert not re.search(r"\son\w+=|style=", response.text)  # which the policy would not let run or apply
