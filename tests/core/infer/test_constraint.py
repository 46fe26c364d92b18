"""Answers held to a form: what may come next is exactly what keeps the form, whatever the model prefers."""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import json
import re

import pytest
import torch

pytest.importorskip("llguidance")

from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, MissingError, UsageError
from minigpt.core.infer.constraint import Compiler, Form, parse_form, token_contents

TEXT = ['{"name": "春風又綠江南岸", "n": [1, 2.5e3, true, null]} yes yesterday no 🙂 12-34'] * 5
UNUSED = 9  # logits behind the tokenizer's last token, as a padded embedding has them
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def sentencepiece():
    """A tokenizer as Llama 2 has it: a space is ▁, and characters that are not in the vocabulary are bytes."""
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁yes",
        "yes",
        "no",
        '"',
        "春",
        "{",
    ]
    raw = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False} for i, t in enumerate(vocabulary[:3])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(vocabulary)}, "merges": [],
                  "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True},
    }  # fmt: skip
    return Tokenizer(json.dumps(raw), {"eos_token": "</s>", "bos_token": "<s>"})


OURS = Tokenizer.train(TEXT, 400)
TOKENIZERS = {"ours": OURS, "sentencepiece": sentencepiece()}
COMPILERS = {name: Compiler(t, t.vocab_size + UNUSED) for name, t in TOKENIZERS.items()}


def allowed(constraint, size):
    logits = torch.randn(size)
    before = logits.clone()
    constraint.mask(logits)
    finite = logits.isfinite()
    assert torch.equal(logits[finite], before[finite]), "what may come keeps its logit"
    assert (logits[~finite] == float("-inf")).all()
    return set(torch.nonzero(finite)[:, 0].tolist())


def begins_utf8(content):
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(content)
        return True
    return False


def sampled(form, seed, tokenizer=OURS, compiler=COMPILERS["ours"], most=400):
    """A text from random logits that lean ever more towards what closes. None when it did not come to an end."""
    random = torch.Generator().manual_seed(seed)
    contents = token_contents(tokenizer)
    closing = torch.tensor([any(c in b'"]}' for c in b) for b in contents] + [False] * UNUSED)
    closing[list(tokenizer.eos_ids)] = True
    constraint, ids = compiler.start(form), []
    for step in range(most):
        logits = 3 * torch.randn(len(closing), generator=random) + closing * (step / 10)
        constraint.mask(logits)
        id = int(torch.multinomial(logits.softmax(-1), 1, generator=random))
        if id in tokenizer.eos_ids:
            return tokenizer.decode(ids)
        constraint.accept(id)
        ids.append(id)
    return None


# ---------------------------------------------------------------------------------------------- masks

CHOICES = ("yes", "yesterday", "no", "春🙂", "春風", 'a"b\\\n', "<|im_end|>", " yes", "\x00\x7f")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_mask_allows_what_begins_a_choice(name):
    """In every state that can be reached: token by token and byte for byte, against trying each one."""
    tokenizer, compiler = TOKENIZERS[name], COMPILERS[name]
    size = tokenizer.vocab_size + UNUSED
    contents = token_contents(tokenizer)
    texts = [text.encode() for text in CHOICES]
    pending, seen = [()], 0
    while pending:
        ids = pending.pop()
        constraint = compiler.start(Form("choice", CHOICES))
        for id in ids:
            constraint.accept(id)
        said = b"".join(contents[i] for i in ids)
        goes_on = {i for i, b in enumerate(contents) if b and any(t.startswith(said + b) for t in texts)}
        ends = set(tokenizer.eos_ids) if said in texts else set()
        assert allowed(constraint, size) == goes_on | ends, said
        assert constraint.done == (said in texts and not goes_on)
        pending += [(*ids, i) for i in goes_on]
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_control_and_unused_logits_never_come(name):
    """Not even in a form that takes any text: it can begin with every token that begins UTF-8, and end at once."""
    tokenizer = TOKENIZERS[name]
    found = allowed(COMPILERS[name].start(Form("regex", r"(?s:.)*")), tokenizer.vocab_size + UNUSED)
    begin_text = {id for id, content in enumerate(token_contents(tokenizer)) if content and begins_utf8(content)}
    assert found == begin_text | set(tokenizer.eos_ids) and not begin_text & tokenizer.special_ids


def test_every_end_counts():
    """Our tokenizers end a turn and a document with different tokens; either ends an answer."""
    assert len(OURS.eos_ids) == 2
    for end in OURS.eos_ids:
        constraint = COMPILERS["ours"].start(Form("regex", "a|ab"))
        assert not allowed(constraint, OURS.vocab_size) & set(OURS.eos_ids)
        constraint.accept(OURS.encode("a")[0])
        assert set(OURS.eos_ids) <= allowed(constraint, OURS.vocab_size) and not constraint.done
        constraint.accept(end)


def test_contents_are_those_that_the_library_finds_in_the_file():
    """The bytes of each token, against llguidance's own reading of tokenizer.json; control tokens aside,
    and the byte FF, which never comes in text and marks a control token there."""
    for tokenizer in TOKENIZERS.values():
        reference = LLTokenizer(json.dumps(tokenizer._json), n_vocab=tokenizer.vocab_size)
        for id, content in enumerate(token_contents(tokenizer)):
            if id not in tokenizer.special_ids and content != b"\xff":
                assert content == reference.decode_bytes([id]), tokenizer.token(id)


def test_an_added_run_of_spaces_is_content():
    """As in GPT-NeoX's tokenizers, which spell it as it is and not in the alphabet of bytes."""
    blank = {"id": OURS.vocab_size, "content": "   ", "special": False, "normalized": False, "lstrip": False,
             "rstrip": False, "single_word": False}  # fmt: skip
    raw = {**OURS._json, "added_tokens": [*OURS._json["added_tokens"], blank]}
    tokenizer = Tokenizer(json.dumps(raw), OURS.config)
    assert token_contents(tokenizer)[blank["id"]] == b"   "


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_json_is_an_object(name):
    tokenizer = TOKENIZERS[name]
    texts = [sampled(Form("json"), seed, tokenizer, COMPILERS[name]) for seed in range(25)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 20 and all(isinstance(json.loads(text), dict) for text in ended)
    assert len(set(ended)) > 10


def test_random_json_fits_its_schema():
    form = Form("schema", json.dumps(PERSON))
    ended = [json.loads(text) for seed in range(25) if (text := sampled(form, seed)) is not None]
    assert len(ended) >= 20
    for person in ended:
        assert person.keys() == {"name", "age"} and len(person["name"]) <= 9 and 0 <= person["age"] <= 150


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{2}-[0-9]{2}",
        "(yes|no)!?",
        "春.{0,3}",
        "[^a-z]{3}",
        "a/b|#",
        "//x",
        "(?i)ja",
        "a\nb",
        r"\d+\.\d",
        "^ab?$",
        "x*",
    ],
)
def test_random_text_matches_its_regular_expression(pattern):
    """Also slashes, hashes and newlines, which mean something in the library's language."""
    ended = [text for seed in range(8) if (text := sampled(Form("regex", pattern), seed)) is not None]
    assert len(ended) == 8 and all(re.fullmatch(pattern, text) for text in ended)


def test_random_choices():
    """Each one comes."""
    assert {sampled(Form("choice", CHOICES), seed) for seed in range(60)} == set(CHOICES)


@given(st.text(min_size=1, max_size=6), st.text(min_size=1, max_size=6))
def test_any_text_is_a_choice(one, other):
    """Whatever means something in the library's language means itself."""
    constraint = COMPILERS["ours"].start(Form("choice", (one, other)))
    for id in OURS.encode(one):
        constraint.accept(id)
    assert set(OURS.eos_ids) <= allowed(constraint, OURS.vocab_size)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('春風🙂é"\\/\n\x00a ', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("春🙂a", max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text('春🙂a"', max_size=3), VALUES, max_size=3), st.sampled_from([None, 1, 4]))
def test_any_json_can_be_written(value, indent):
    """Chinese and emoji as they are, though their bytes are spread over tokens, on one line or on many."""
    constraint = COMPILERS["ours"].start(Form("json"))
    for id in OURS.encode(json.dumps(value, ensure_ascii=False, indent=indent)):
        assert not constraint.done and id in allowed(constraint, OURS.vocab_size)
        constraint.accept(id)
    assert constraint.done and allowed(constraint, OURS.vocab_size) == set(OURS.eos_ids)


def test_white_space_comes_to_an_end():
    """A model that prefers spaces cannot write them for ever."""
    constraint, spaces = COMPILERS["ours"].start(Form("json")), 0
    (brace,), blanks = OURS.encode("{"), {OURS.encode(c)[0] for c in " \n\t"}
    constraint.accept(brace)
    while found := allowed(constraint, OURS.vocab_size) & blanks:
        constraint.accept(min(found))
        spaces += 1
    assert 0 < spaces < 50


# ---------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("json", Form("json")),
        ("regex:a:b|c", Form("regex", "a:b|c")),
        ("choice:yes|no", Form("choice", ("yes", "no"))),
        (r"choice:a\|b|c d", Form("choice", ("a|b", "c d"))),
    ],
)
def test_parse_form(text, form):
    assert parse_form(text) == form and hash(form) == hash(parse_form(text))


def test_a_schema_comes_from_a_file(tmp_path):
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    assert parse_form(f"schema:{file}") == Form("schema", json.dumps(PERSON))
    with pytest.raises(DataError, match="is missing"):
        parse_form(f"schema:{tmp_path / 'none.json'}")


@pytest.mark.parametrize("text", ["", "yaml", "json:x", "regex", "choice", "Regex:a"])
def test_an_unknown_form_is_refused_with_those_that_are_known(text):
    with pytest.raises(UsageError, match=r"--form takes json, schema:FILE\.json, regex:.* or choice:yes\|no"):
        parse_form(text)


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("xml", "", "no form 'xml'"),
        ("regex", "", "is empty"),
        ("regex", "a\\", "ends in a backslash"),
        ("regex", "[0-9", r"\[0-9 cannot be followed: unclosed character class"),
        ("regex", "(?=a)b", "look-around.* not supported"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "\ud800", "half a character"),
        ("choice", ("yes", "\udfff"), "half a character"),
        ("choice", (), "needs texts"),
        ("choice", ("yes", ""), "none of them empty"),
        ("schema", "{", "is not JSON"),
        ("schema", "[]", "is not an object"),
        ("schema", '{"type": "bogus"}', "JSON schema cannot be followed: Invalid type: bogus"),
        ("schema", '{"type": "integer", "minimum": 2, "maximum": 1}', r"minimum \(2\) is greater"),
        ("schema", '{"$ref": "http://example.com/a.json"}', "does not fetch"),
    ],
)
def test_a_form_that_is_none_is_refused_in_words(kind, value, told):
    with pytest.raises(UsageError) as fault:
        Form(kind, value)
    assert re.search(told, f"{fault.value.message}: {fault.value.found or ''}")


def test_a_tokenizer_that_cannot_write_the_form_says_so():
    """A vocabulary of words without bytes: no token begins 春."""
    raw = {"version": "1.0", "added_tokens": [],
           "model": {"type": "WordLevel", "vocab": {"</s>": 0, "yes": 1}, "unk_token": "</s>"}}  # fmt: skip
    tokenizer = Tokenizer(json.dumps(raw), {"eos_token": "</s>"})
    with pytest.raises(UsageError, match="no token for what the form needs next"):
        Compiler(tokenizer, 2).start(Form("choice", ("春",))).mask(torch.zeros(2))


def test_without_the_package_the_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("minigpt.core.infer.constraint.find_spec", lambda n: None if n == "llguidance" else real(n))
    with pytest.raises(MissingError) as fault:
        Form("json")
    assert "minigpt-lm[constraints]" in fault.value.fix
