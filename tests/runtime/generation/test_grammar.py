"""Texts that are held to a grammar, whatever the model would say."""

import json
import re

import numpy as np
import pytest

from gta_edge.errors import InputError
from gta_edge.runtime.generation.grammar import Grammar, GrammarConstraint
from gta_edge.runtime.generation.loop import generate
from tests.helpers.batches import Heard
from tests.helpers.generation import CONFIG, EOS, ScriptedSession, byte_level, save

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["tea", "coffee"]},
        "cups": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 12},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "kind", "cups"],
    "additionalProperties": False,
}


class RandomSession(ScriptedSession):
    """Says whatever comes: other logits at each step."""

    def __init__(self, tokenizer, seed):
        super().__init__([], tokenizer, CONFIG.replace(max_position_embeddings=1024))
        self.random = np.random.default_rng(seed)

    def _run(self, input_ids, past_length, logit_positions):
        shape = (1, logit_positions.shape[1], self.config.vocab_size)
        return self.random.standard_normal(shape).astype(np.float32) * 3


# they reach over what a grammar parts: the mask must take them by their bytes
WORDS = ['": "', "tea", '"kind', 'coffee", ', "1, 1", "]}"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tokenizer"), byte_level(WORDS))


def constrained(session, kind, text, **options):
    constraint = Grammar(session, kind, text).constraint()
    generation = generate(session, [1, 2], max_new_tokens=600, constraint=constraint, **options)
    return "".join(generation), generation


@pytest.mark.parametrize("seed", range(12))
def test_every_text_meets_its_schema(tokenizer, seed):
    text, generation = constrained(RandomSession(tokenizer, seed), "json_schema", SCHEMA, temperature=1.5, seed=seed)
    assert generation.finish_reason == "stop"
    found = json.loads(text)
    assert found.keys() == SCHEMA["properties"].keys()
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 6
    assert found["kind"] in ("tea", "coffee")
    assert 1 <= len(found["cups"]) <= 3
    assert all(isinstance(cup, int) and 1 <= cup <= 12 for cup in found["cups"])


@pytest.mark.parametrize("expression", ["(ab|ac)d{2}", "[0-9]{3}-[0-9]{2}", "x(yz)*", "ä+ö?"])
@pytest.mark.parametrize("seed", range(3))
def test_every_text_matches_its_expression(tokenizer, expression, seed):
    text, _ = constrained(RandomSession(tokenizer, seed), "regex", expression, temperature=1.0, seed=seed)
    assert re.fullmatch(expression, text)


def test_what_may_come_next_is_exactly_that(tokenizer):
    """Of a grammar that can be followed by hand."""
    session = ScriptedSession([], tokenizer)
    constraint = Grammar(session, "regex", "(tea|t1, 1)x?").constraint()

    def allowed():
        logits = np.zeros(CONFIG.vocab_size, np.float32)
        constraint.prepare()
        constraint.apply(logits)
        return {
            EOS if token == EOS else tokenizer.token_bytes(int(token)).decode() for token in np.flatnonzero(logits == 0)
        }

    def accept(text):
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        return constraint.accept(token)

    assert allowed() == {"t", "tea"}
    assert not accept("t")
    assert allowed() == {"e", "1", "1, 1"}
    assert not accept("1, 1")
    assert allowed() == {"x", EOS}
    assert accept("x")
    assert Grammar(session, "regex", "a").constraint().accept(EOS)


def test_a_grammar_of_llama_cpp(tokenizer):
    text, _ = constrained(RandomSession(tokenizer, 0), "grammar", 'root ::= ("yes" | "no") "!"')
    assert text in ("yes!", "no!")


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json_schema", "{", "the JSON schema cannot be used"),
        ("json_schema", "[1]", "a schema is an object"),
        ("json_schema", {"type": "thing"}, "Invalid type: thing"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable schema"),
        ("json_schema", {"$ref": "http://else.where/schema"}, "the JSON schema cannot be used"),
        ("regex", r"[^\s\S]", r"the regular expression cannot be used \(nothing meets it\); correct it"),
        ("grammar", "start: start", r"the grammar cannot be used \(nothing meets it\)"),
        ("words", "tea", "kind is 'words'; expected one of json_schema, regex, grammar"),
        ("regex", "(", "the regular expression cannot be used"),
        ("grammar", "start: other", "the grammar cannot be used"),
    ],
)
def test_grammars_that_are_refused(tokenizer, kind, text, said):
    with pytest.raises(InputError, match=said) as caught:
        Grammar(ScriptedSession([], tokenizer), kind, text)
    assert "\n" not in str(caught.value)


def test_a_step_that_is_run_again_computes_its_mask_once(tokenizer, monkeypatch):
    """Two threads must not compute with one matcher."""
    calls, compute = [], GrammarConstraint._compute
    monkeypatch.setattr(GrammarConstraint, "_compute", lambda self: calls.append(1) or compute(self))
    constraint = Grammar(ScriptedSession([], tokenizer), "regex", "ab").constraint()
    for token in tokenizer.encode("ab", add_special_tokens=False):
        logits = np.zeros(CONFIG.vocab_size, np.float32)
        constraint.prepare()
        constraint.prepare()
        constraint.apply(logits)
        assert logits[token] == 0
        constraint.accept(token)
    assert len(calls) == 2


def test_a_grammar_that_becomes_too_complex_says_so_in_short(tokenizer):
    with pytest.raises(InputError, match=r"the grammar failed \([^<{]*\); simplify it"):
        constrained(RandomSession(tokenizer, 0), "regex", "(a{1000}){1000}")


def test_what_a_grammar_needs(tokenizer):
    with pytest.raises(InputError, match="needs a tokenizer"):
        Grammar(ScriptedSession([]), "regex", "a")
    session = ScriptedSession([], tokenizer, CONFIG.replace(eos_token_ids=()))
    with pytest.raises(InputError, match="needs an end token"):
        Grammar(session, "regex", "a")
    session = ScriptedSession([], tokenizer)
    constraint = Grammar(session, "regex", "a").constraint()
    with pytest.raises(InputError, match="leave one of both out"):
        generate(session, [1], constraint=constraint, n=2)
    with pytest.raises(
        InputError, match=r"constraint is <.*Grammar .*>; expected what a Grammar's constraint\(\) returns"
    ):
        generate(session, [1], constraint=Grammar(session, "regex", "a"))
    list(generate(RandomSession(tokenizer, 0), [1], constraint=constraint))
    with pytest.raises(InputError, match="the constraint was used for another text; make one for each"):
        generate(session, [1], constraint=constraint)


def test_a_grammar_of_another_tokenizer_is_refused(tokenizer, tmp_path):
    session = RandomSession(tokenizer, 0)
    constraint = Grammar(session, "regex", "a|b").constraint()
    same = save(tmp_path, byte_level(WORDS))
    list(generate(RandomSession(same, 0), "?", constraint=Grammar(session, "regex", "a").constraint()))
    larger, other = RandomSession(same, 0), RandomSession(same, 0)
    larger.config = CONFIG.replace(vocab_size=301)
    other.tokenizer = save(tmp_path, byte_level(["word"]))
    for each in (larger, other):
        for use in (
            lambda each=each: generate(each, [1], constraint=constraint),
            lambda each=each: Heard(each, [1], constraint=constraint),
        ):
            with pytest.raises(InputError, match="compiled for another tokenizer than the session's; make a Grammar"):
                use()
