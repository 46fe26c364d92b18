"""What a tokenizer cannot write is noticed; what it only writes in its own way is not taken for that."""

import json

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

from minigpt.core.data.chat import template
from minigpt.core.data.roundtrip import RoundTrip
from minigpt.core.data.store import build
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError

ENGLISH = ["The quick brown fox jumps over the lazy dog, again and again. 0123456789"] * 9
CHINESE = ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]


def trained(model, pre, decoder, normalizer=None, alphabet=(), unk=None, texts=ENGLISH):
    core = Core(model)
    core.pre_tokenizer, core.decoder = pre, decoder
    if normalizer is not None:
        core.normalizer = normalizer
    kinds = {"BPE": trainers.BpeTrainer, "WordPiece": trainers.WordPieceTrainer, "Unigram": trainers.UnigramTrainer}
    more = {"unk_token": unk} if type(model).__name__ == "Unigram" else {}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([unk] if unk else [])]
    core.train_from_iterator(
        texts,
        kinds[type(model).__name__](
            vocab_size=300, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False, **more
        ),
    )
    return Tokenizer(core.to_str(), {"eos_token": "<|endoftext|>"})


def bytelevel(normalizer=None, alphabet=(), decoder=True):
    pre = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return trained(models.BPE(), pre, decoders.ByteLevel() if decoder else None, normalizer, alphabet)


FULL = pre_tokenizers.ByteLevel.alphabet()
WRITES_ENGLISH_ONLY = {
    "bytes that are dropped": lambda: bytelevel(),
    "characters that are unknown": lambda: trained(
        models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), decoders.Metaspace(), unk="<unk>"
    ),
    "word pieces": lambda: trained(
        models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
        normalizers.BertNormalizer(), unk="[UNK]",
    ),
}  # fmt: skip
WRITES_ANYTHING = {
    "all bytes": lambda: bytelevel(alphabet=FULL),
    "all bytes, without a decoder": lambda: bytelevel(alphabet=FULL, decoder=False),
    "after NFC": lambda: bytelevel(normalizers.NFC(), FULL),
    "in small letters": lambda: bytelevel(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), FULL),
    "ours": lambda: Tokenizer.train(ENGLISH, 320),
    "with a space before": lambda: trained(
        models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), unk="<unk>", texts=ENGLISH + CHINESE
    ),
}


def account(tokenizer, texts):
    trip = RoundTrip(tokenizer)
    trip.add(texts, tokenizer.encode_batch(texts))
    return trip


@pytest.mark.parametrize("name", WRITES_ENGLISH_ONLY)
def test_another_script_is_refused(name):
    """Chinese through a tokenizer of English: every sign is counted, English is not."""
    tokenizer = WRITES_ENGLISH_ONLY[name]()
    assert account(tokenizer, ENGLISH).lost.total() == 0
    trip = account(tokenizer, CHINESE)
    assert trip.lost.total() == trip.characters == 24
    with pytest.raises(DataError, match="24 of 24 characters are lost") as caught:
        trip.check()
    assert set(caught.value.found.split()) < set("".join(CHINESE))


@pytest.mark.parametrize("name", WRITES_ANYTHING)
def test_what_is_only_written_in_another_way_is_not_lost(name):
    """Normalisation, a space before the text and letters in two code points are no loss."""
    texts = [*ENGLISH, *CHINESE, "  two  spaces\n\tand a tab "]
    if "space before" not in name:
        texts += ["cafe\u0301 Ａ ﬁ", "🙂"]
    trip = account(WRITES_ANYTHING[name](), texts)
    assert trip.lost.total() == 0 and trip.characters > 500
    trip.check()


def test_only_the_first_texts_are_looked_at():
    tokenizer = bytelevel()
    trip = account(tokenizer, ENGLISH * 112 + CHINESE)
    assert trip.complete and trip.texts == 1000 and not trip.lost


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_store_is_not_made_of_what_cannot_be_written(here):
    """Refused whole; a few signs are told, also when the store comes from the cache; a conversation counts too."""
    tokenizer = bytelevel()
    (here / "zh.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    with pytest.raises(DataError, match="cannot write this text"):
        build(["zh.txt"], tokenizer)
    assert not list((here / "cache" / "stores").glob("*"))
    (here / "en.txt").write_text("\n".join([*ENGLISH, "a 山 again"]), encoding="utf-8")
    for _ in range(2):
        (note,) = build(["en.txt"], tokenizer, val_share=0.0).notes
        assert "cannot write 1 of " in note and "such as 山" in note
    tokenizer.chat_template = template()
    row = {"instruction": CHINESE[0], "output": CHINESE[1]}
    (here / "chat.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="cannot write this text"):
        build(["chat.jsonl"], tokenizer, kind="chat")


def test_a_split_that_drops_signs_is_a_loss():
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[0-9]"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = trained(models.BPE(), pre, decoders.ByteLevel(), alphabet=FULL)
    assert account(tokenizer, ["year 1984"]).lost == {"1": 1, "9": 1, "8": 1, "4": 1}
