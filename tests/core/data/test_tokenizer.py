"""Any text survives, content is never control, and transformers agrees."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

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
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (2, 0, 1)
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


def test_half_a_character_is_named():
    with pytest.raises(DataError, match="half a character"):
        TOKENIZER.encode("a\ud800")
