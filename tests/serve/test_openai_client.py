"""OpenAI's own client, against answers that the session gives directly."""

import asyncio
import json
import re
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from gta_edge.runtime.generation import batch_guesses
from gta_edge.runtime.generation.loop import generate
from gta_edge.serve.app import make_app
from gta_edge.serve.settings import Settings
from tests.helpers.batches import Cheap
from tests.helpers.service import Service, running

PROMPT = [5, 17, 203, 96, 44]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def streamed(chunks):
    """Text, finish reason and usage of a stream."""
    chunks = list(chunks)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    said = [choice.delta.content if hasattr(choice, "delta") else choice.text for choice in choices]
    assert all(choice.finish_reason is None for choice in choices[:-1])
    return "".join(said), choices[-1].finish_reason, chunks[-1].usage


def mean_logprob(choice):
    values = choice.logprobs.token_logprobs
    return sum(values) / len(values)


# --- the text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 7, "top_p": 0.9}])
def test_completions_are_what_generate_gives(service: Service, options):
    expected = generate(service.session, PROMPT, max_new_tokens=40, **options)
    text = "".join(expected)
    answer = service.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, **options)
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == answer.usage.total_tokens - len(PROMPT) == 40
    stream = service.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, stream=True, **options)
    assert streamed(stream)[:2] == (text, "length")


def test_chats_go_through_the_template(service: Service):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hällo"}]},
    ]
    prompt = "system: Be brief.\nuser: Hällo\nassistant:"
    ids = service.session.tokenizer.encode(prompt, add_special_tokens=False)
    text = "".join(generate(service.session, ids, max_new_tokens=30))
    options = {"model": "tiny", "messages": messages, "max_completion_tokens": 30}
    answer = service.openai.chat.completions.create(**options)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (text, "assistant")
    assert answer.usage.prompt_tokens == len(ids)
    stream = service.openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    said, reason, usage = streamed(stream)
    assert (said, reason) == (text, answer.choices[0].finish_reason)
    assert usage.completion_tokens == 30


def test_tools_and_template_options_reach_the_template(service: Service):
    tools = [{"type": "function", "function": {"name": "sun"}}]
    call = {"id": "1", "type": "function", "function": {"name": "sun", "arguments": '{"place": "Rome"}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ]
    text = f"<tools>{json.dumps(tools)}</tools>user: ?\nassistant: Rome\ntool: y\nassistant: glad"
    expected = len(service.session.tokenizer.encode(text, add_special_tokens=False))
    extra = {"chat_template_kwargs": {"mood": "glad"}}
    options = {"model": "tiny", "messages": messages, "max_tokens": 1, "extra_body": extra}
    answer = service.openai.chat.completions.create(**options, tools=tools)
    assert answer.usage.prompt_tokens == expected
    answer = service.openai.chat.completions.create(**options, tools=tools, tool_choice="none")
    assert answer.usage.prompt_tokens < expected


def test_several_answers_to_several_prompts(service: Service):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    answer = service.openai.completions.create(model="tiny", prompt=[PROMPT, [9, 8]], n=2, **options)
    seeds = [(PROMPT, 3), (PROMPT, 4), ([9, 8], 3), ([9, 8], 4)]
    expected = [
        "".join(generate(service.session, ids, max_new_tokens=12, temperature=1.0, seed=seed)) for ids, seed in seeds
    ]
    assert [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)] == expected
    assert answer.usage.prompt_tokens == len(PROMPT) + 2
    parts = ["", "", "", ""]
    for chunk in service.openai.completions.create(model="tiny", prompt=[PROMPT, [9, 8]], n=2, stream=True, **options):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == expected


def test_of_many_answers_the_most_probable_are_given(service: Service):
    options = {"model": "tiny", "prompt": [PROMPT, [9, 8]], "max_tokens": 9, "temperature": 1.5, "seed": 3}
    everything = service.openai.completions.create(**options, n=5, logprobs=0)
    expected = []
    for start in (0, 5):
        expected += sorted(everything.choices[start : start + 5], key=mean_logprob, reverse=True)[:2]
    best = service.openai.completions.create(**options, n=2, best_of=5)
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert [(choice.index, choice.logprobs) for choice in best.choices] == [(i, None) for i in range(4)]
    assert best.usage == everything.usage.model_copy(update={"prompt_tokens_details": best.usage.prompt_tokens_details})


def test_stop_strings_end_an_answer(service: Service):
    text = "".join(generate(service.session, "Once", max_new_tokens=60))
    stop = text[20:23]
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "stop": [stop]}
    answer = service.openai.completions.create(**options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert streamed(service.openai.completions.create(**options, stream=True))[0] == answer.choices[0].text


def test_options_of_sampling_take_effect(service: Service):
    """Each makes another token the likeliest, or the only one."""
    create = service.openai.completions.create

    def first(**options):
        answer = create(model="tiny", prompt=PROMPT, max_tokens=1, logprobs=0, **options)
        return answer.choices[0].logprobs.tokens[0]

    order = np.argsort(-service.session.forward([PROMPT])[0])
    service.session.reset()
    name = service.session.tokenizer.token_bytes(int(order[1])).decode(errors="replace")
    assert first(logit_bias={str(order[1]): 100}) == name
    assert first(temperature=1.5, extra_body={"top_k": 1}) == first()
    assert first(temperature=1.5, extra_body={"min_p": 1}) == first()
    free = create(model="tiny", prompt=PROMPT, max_tokens=40).choices[0].text
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 5}}):
        assert create(model="tiny", prompt=PROMPT, max_tokens=40, **penalty).choices[0].text != free


def test_answers_meet_a_schema(service: Service):
    """Of a model of random weights, several at a time, streamed or not."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    options = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "n": 3, "temperature": 2.0}
    answer = service.openai.chat.completions.create(**options, response_format=form)
    for choice in answer.choices:
        assert json.loads(choice.message.content)["a"] in (1, 22)
        assert choice.finish_reason == "stop"
    extra = {"regex": "(yes|no)"}
    stream = service.openai.completions.create(model="tiny", prompt=PROMPT, stream=True, extra_body=extra)
    assert streamed(stream)[0] in ("yes", "no")


# --- probabilities -------------------------------------------------------------------------------------------------


def test_probabilities_of_a_chat_are_those_of_the_logits(service: Service):
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    found = service.openai.chat.completions.create(**options, temperature=2.0, seed=1).choices[0].logprobs.content
    tokenizer = service.session.tokenizer
    ids = tokenizer.encode("user: hi\nassistant:", add_special_tokens=False)
    new = generate(service.session, ids, max_new_tokens=6, temperature=2.0, seed=1)
    list(new)
    logits = _fresh(service).forward([[*ids, *new.ids]], all_logits=True)[0]
    for i, entry in enumerate(found):
        expected = log_softmax(logits[len(ids) - 1 + i])
        assert entry.logprob == pytest.approx(expected[new.ids[i]], abs=1e-4)
        assert bytes(entry.bytes) == tokenizer.token_bytes(new.ids[i])
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(np.sort(expected)[:-4:-1], abs=1e-4)


def _fresh(service):
    service.session.reset()
    return service.session


def test_a_prompt_is_scored_as_evaluation_harnesses_ask(service: Service):
    """As lm-eval's local-completions does: ids, echo, one token more, whose entry it leaves out."""
    ids = [3, 77, 140, 9, 250, 31]
    answer = service.openai.completions.create(
        model="tiny", prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234
    )
    found = answer.choices[0].logprobs
    logits = _fresh(service).forward([ids], all_logits=True)[0]
    expected = [log_softmax(logits[i])[ids[i + 1]] for i in range(len(ids) - 1)]
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert len(found.tokens) == len(ids) + 1
    assert found.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
    for i, top in enumerate(found.top_logprobs[1:-1]):
        assert max(top.values()) == pytest.approx(log_softmax(logits[i]).max(), abs=1e-4)
    alone = service.openai.completions.create(model="tiny", prompt=ids, echo=True, max_tokens=0, logprobs=0)
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert alone.choices[0].text == service.session.tokenizer.decode(ids)


# --- the service ---------------------------------------------------------------------------------------------------


def test_models(service: Service):
    (model,) = service.openai.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 128)
    assert service.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; there is tiny"):
        service.openai.models.retrieve("other")


def test_tokens_of_a_text(service: Service):
    content = "Grüße"
    ids = service.http.post("/tokenize", json={"content": content}).json()["tokens"]
    assert ids == service.session.tokenizer.encode(content, add_special_tokens=False)
    pieces = service.http.post("/tokenize", json={"content": content, "with_pieces": True}).json()["tokens"]
    parts = [piece["piece"] for piece in pieces]
    assert b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts) == content.encode()
    special = service.http.post("/tokenize", json={"content": content, "add_special": True}).json()["tokens"]
    assert special == service.session.tokenizer.encode(content)


def test_guesses_are_told_and_change_nothing(service: Service, chat_bundle: Path, monkeypatch):
    monkeypatch.setattr(batch_guesses, "StepCosts", Cheap)
    said = '{"a": [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], "b": [1, 2, 3, 1, 2, 3]}'
    options = {"model": "tiny", "prompt": PROMPT * 4, "max_tokens": 100, "extra_body": {"regex": re.escape(said)}}
    plain = service.openai.completions.create(**options)
    assert plain.usage.completion_tokens_details is None
    with running(chat_bundle, speculate=True) as guessing:
        answer = guessing.openai.completions.create(**options)
        assert answer.choices[0].text == plain.choices[0].text == said
        stream = guessing.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}, n=2)
        usage = list(stream)[-1].usage
        counts = [each.completion_tokens_details for each in (answer.usage, usage)]
        metrics = guessing.http.get("/metrics").text
    accepted = sum(each.accepted_prediction_tokens for each in counts)
    drafted = accepted + sum(each.rejected_prediction_tokens for each in counts)
    assert accepted > 60
    assert f"gta_edge_accepted_tokens_total {float(accepted)}" in metrics
    assert f"gta_edge_drafted_tokens_total {float(drafted)}" in metrics


def test_health_and_metrics(service: Service):
    assert service.http.get("/health").json() == {"status": "ok"}
    service.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=3)

    def figures():
        service.wait_until_idle()
        lines = service.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = figures()
    service.openai.completions.create(model="tiny", prompt=PROMPT, max_tokens=11, extra_body={"ignore_eos": True})
    after = figures()
    counted = {name: after[name] - before[name] for name in after if name in before}
    assert counted["gta_edge_generation_tokens_total"] == 11
    assert counted["gta_edge_prompt_tokens_total"] == len(PROMPT)
    assert counted['gta_edge_requests_total{path="/v1/completions",status="200"}'] == 1
    assert counted["gta_edge_time_to_first_token_seconds_count"] == 1
    assert after["gta_edge_requests_running"] == 0
    assert after["process_resident_memory_bytes"] > 0


def test_the_application_outlives_an_event_loop(service: Service):
    """As where an application is asked without a server, by ``asyncio.run`` for each request."""
    app = make_app(service.session, service.scheduler, Settings(model="tiny"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
            return await asyncio.wait_for(client.post("/v1/completions", json=body), 20)

    for _ in range(2):
        assert asyncio.run(ask()).json()["usage"]["completion_tokens"] == 2
