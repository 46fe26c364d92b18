"""Any text survives, content is never control, and transformers agrees."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minigpt.core.data.chat import render
from minigpt.core.data.tokenizer import CONTROL, MARKERS, SMALLEST_VOCAB, Tokenizer, suggested_vocab
from minigpt.core.errors import DataError, UsageError

TEXTS = [
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。",
    "The quick brown fox jumps over the lazy dog.\n\n  1 + 1 = 2",
] * 20
TOKENIZER = Tokenizer.train(TEXTS, 512)
SPECIAL = st.sampled_from([*CONTROL, *MARKERS])
TRICKY = st.lists(st.one_of(st.text(max_size=8), SPECIAL), max_size=8).map("".join)


def test_special_tokens_have_the_agreed_ids():
    expected = {
        "<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|vision_pad|>": 11, "<|video_pad|>": 13,
        "<|audio_pad|>": 16, "<tts_pad>": 17, "<tts_text_bos_single>": 20, "<tool_call>": 21, "</tool_call>": 22,
        "<tool_response>": 23, "</tool_response>": 24, "<think>": 25, "</think>": 26, "<|buffer1|>": 27,
        "<|buffer9|>": 35,
    }  # fmt: skip
    assert {k: TOKENIZER.added[k] for k in expected} == expected
    assert sorted(TOKENIZER.added.values()) == list(range(36))


@settings(max_examples=300, deadline=None)
@given(TRICKY)
def test_round_trip_and_no_control(text):
    """Any string, literals of special tokens included: no special id comes out, and decoding gives the string back."""
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.special_ids & set(ids)
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert TOKENIZER.encode_batch([text, "x"])[0] == ids


@settings(max_examples=100, deadline=None)
@given(TRICKY)
def test_token_bytes_add_up_to_the_text(text):
    assert TOKENIZER.token_bytes[TOKENIZER.encode(text)].sum() == len(text.encode())


def test_specials_have_no_bytes():
    assert TOKENIZER.token_bytes[:36].sum() == 0 and (TOKENIZER.token_bytes[36:] > 0).all()


def test_template_text_becomes_control():
    assert TOKENIZER.encode_template("<|im_start|>a<|im_end|>")[::2] == [1, 2]


def test_skip_special_hides_control_and_shows_markers():
    ids = [1, *TOKENIZER.encode("a"), 25, 2]
    assert TOKENIZER.decode(ids) == "a<think>"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|im_start|>a<think><|im_end|>"


def test_training_is_deterministic():
    assert Tokenizer.train(TEXTS, 512).fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.train(TEXTS[:1], 400).fingerprint != TOKENIZER.fingerprint


def test_saved_folder_opens_in_transformers_with_equal_ids(tmp_path):
    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == TOKENIZER.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, 0)
    for text in [*TEXTS[:2], "a <|im_end|> b", "<think>\n\n</think>", " \n\t 🙂é", ""]:
        assert theirs(text)["input_ids"] == TOKENIZER.encode_template(text)
        ids = TOKENIZER.encode_template(text)
        assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids)


def test_load_is_the_inverse_of_save(tmp_path):
    TOKENIZER.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        assert Tokenizer.load(path).fingerprint == TOKENIZER.fingerprint
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    TOKENIZER.save(tmp_path / "run" / "tokenizer")
    assert Tokenizer.load(tmp_path / "run").fingerprint == TOKENIZER.fingerprint


def test_roles():
    assert (TOKENIZER.document_id, TOKENIZER.turn_end_id, TOKENIZER.pad_id, TOKENIZER.eos_ids) == (0, 2, 0, (2, 0))


def foreign(folder, **config):
    """A byte-level tokenizer of another family: its own markers, ids behind the vocabulary."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    core.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_roles_of_a_foreign_tokenizer_come_from_its_own_files(tmp_path):
    folder = foreign(tmp_path / "a", bos_token="<|begin_of_text|>", eos_token={"content": "<|end_of_text|>"},
                     chat_template="{{ messages }}<|eot_id|>")  # fmt: skip
    (folder / "generation_config.json").write_text('{"eos_token_id": [5]}')
    t = Tokenizer.load(folder)
    begin, end, turn = (t.added[x] for x in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    assert t.document_id == end and t.turn_end_id == turn and t.role("bos_token") == begin
    assert t.eos_ids == (turn, end, 5) and t.pad_id == end
    assert not t.special_ids & set(t.encode("<|eot_id|> and <|begin_of_text|>"))


def test_tokenizer_without_roles_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="end-of-document"):
        _ = Tokenizer.load(foreign(tmp_path / "a")).document_id


def test_faults_name_the_file(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match="too small"):
        Tokenizer.train(TEXTS, SMALLEST_VOCAB - 1)


def test_suggested_vocabulary_grows_with_the_corpus():
    assert [suggested_vocab(n) for n in (0, 10_000, 1_115_394, 14_164_239, 10**12)] == [320, 320, 2112, 6400, 6400]


def test_roles_from_the_map_and_blank_added_tokens_are_content(tmp_path):
    """GPT-NeoX keeps its roles in special_tokens_map.json and runs of spaces among its added tokens."""
    folder = foreign(tmp_path / "a")
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.add_tokens(["    "])
    core.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end_of_text|>"}')
    t = Tokenizer.load(folder)
    assert t.document_id == t.added["<|end_of_text|>"]
    text = "if x:\n    y"
    assert t.encode(text) == core.encode(text).ids and core.token_to_id("    ") in t.encode(text)
    assert t.token_bytes[t.encode(text)].sum() == len(text)


def test_an_added_word_is_content(tmp_path):
    """`add_tokens(["covidvirus"])` makes a word of the vocabulary: content has the ids that transformers gives it."""
    folder = foreign(tmp_path / "a", eos_token="<|end_of_text|>")
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.add_tokens(["covidvirus", "naïve idea", "<think>"])
    core.save(str(folder / "tokenizer.json"))
    t, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a covidvirus, a naïve idea", "covidvirus", "xcovidvirusx"):
        assert t.encode(text) == theirs(text)["input_ids"]
        assert t.token_bytes[t.encode(text)].sum() == len(text.encode())
        assert t.decode(t.encode(text)) == text
    assert t.encode("covidvirus") == [core.token_to_id("covidvirus")] and "covidvirus" not in t.added
    assert t.added["<think>"] not in t.encode("<think> and <|end_of_text|>")  # a marker, though not marked special
    t.chat_template = "{% for m in messages %}{{ m.content }}<|end_of_text|>{% endfor %}"
    rendered = render(t, [{"role": "user", "content": "covidvirus<think>"}]).ids
    assert rendered == [core.token_to_id("covidvirus"), *t.encode("<think>"), t.added["<|end_of_text|>"]]


def test_what_the_template_writes_is_control(tmp_path):
    """An added token that the chat template writes comes from no message; a plain word stays one."""
    folder = foreign(tmp_path / "a", eos_token="<|end_of_text|>")
    core = Core.from_file(str(folder / "tokenizer.json"))
    core.add_tokens(["USER:", "assistant"])
    core.save(str(folder / "tokenizer.json"))
    t = Tokenizer.load(folder)
    colon, word = core.token_to_id("USER:"), core.token_to_id("assistant")
    assert t.encode("USER: assistant")[0] == colon
    t.chat_template = "{% for m in messages %}USER: {{ m.content }}{% endfor %} assistant"
    ids = render(t, [{"role": "user", "content": "USER: assistant"}], generation_prompt=True).ids
    assert ids.count(colon) == 1 and ids.count(word) == 2 and "USER:" in t.added


def test_tokens_of_the_configuration_are_merged(tmp_path):
    """Special tokens that only tokenizer_config.json names: ids and text as transformers has them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoder = {
        "310": {"content": "<|b|>", **flags}, "303": {"content": "<|a|>", **flags},
        "311": {"content": "virusword", **flags, "special": False},
    }  # fmt: skip
    folder = foreign(tmp_path / "a", eos_token="<|z|>", pad_token="<|a|>", added_tokens_decoder=decoder,
                     additional_special_tokens=["<|y|>"], tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    t, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    added = theirs.get_added_vocab()
    assert {**t.added, "virusword": t.encode("virusword")[0]} == added and t.vocab_size == len(theirs)
    assert (t.role("eos_token"), t.role("pad_token")) == (theirs.eos_token_id, theirs.pad_token_id)
    text = "fox<|a|><|b|>virusword<|y|> dog<|z|>"
    assert t.encode_template(text) == theirs(text)["input_ids"] and not t.special_ids & set(t.encode(text))
    t.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.fingerprint == t.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "b").get_added_vocab() == added


def test_an_old_list_of_added_tokens_is_merged(tmp_path):
    """added_tokens.json, as transformers 4 wrote it beside a tokenizer.json."""
    folder = foreign(tmp_path / "a", eos_token="<|z|>", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "added_tokens.json").write_text('{"<|z|>": 303, "virusword": 304}')
    t, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert t.encode_template("fox<|z|>virusword") == theirs("fox<|z|>virusword")["input_ids"]
    assert t.added["<|z|>"] in t.eos_ids and "virusword" not in t.added


def test_ids_with_gaps(tmp_path):
    """An end token above the count of tokens still ends, and its row is counted; ids are the library's."""
    folder = foreign(tmp_path / "a", eos_token="</s>")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["</s>"] = 1000
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 1000, "content": "</s>"})
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 1005, "content": "virusword", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    t, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert t.role("eos_token") == theirs.eos_token_id == 1000 and 1000 in t.eos_ids
    assert t.vocab_size == max(theirs.get_vocab().values()) + 1
    assert t.encode("a virusword b") == theirs("a virusword b")["input_ids"]
    assert len(t.contents) == len(t.token_bytes) == t.vocab_size


def test_templates_without_a_default_are_named(tmp_path):
    """Several chat templates of which none is the default: told, instead of a base model."""
    named = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = foreign(tmp_path / "a", eos_token="<|end_of_text|>", chat_template=named)
    with pytest.raises(DataError, match="none of them is the default") as fault:
        Tokenizer.load(folder)
    assert fault.value.found == "rag, tool_use" and "chat_template.jinja" in fault.value.fix
    (folder / "chat_template.jinja").write_text("c")
    assert Tokenizer.load(folder).chat_template == "c"
    named.append({"name": "default", "template": "d"})
    assert Tokenizer.load(foreign(tmp_path / "b", chat_template=named)).chat_template == "d"


def test_bos_makes_the_frame_of_a_document(tmp_path):
    """lm-eval and others put bos before a text: so began the documents that the model learnt from."""
    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[1]
    assert [theirs.bos_token_id, *theirs(text)["input_ids"]] == [TOKENIZER.opening_id, *TOKENIZER.encode(text)]
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text)  # nothing is added unasked


def test_half_a_character_is_named():
    with pytest.raises(DataError, match="half a character"):
        TOKENIZER.encode("a\ud800")
