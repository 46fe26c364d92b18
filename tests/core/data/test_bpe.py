"""Training a tokenizer: any text in seconds, ordinary text as ever, and it can be stopped."""

import os
import random
import signal
import threading
import time

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from minigpt.core.data import bpe
from minigpt.core.data.tokenizer import Tokenizer

LETTERS = "".join(random.Random(0).choices("acgt", k=400_000))
ORDINARY = [
    "The quick brown fox_jumps over 12,345 lazy dogs -- isn't it?\n\n\tdef f(x):\n        return x ** 2\n",
    "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。" * 9 + "①②Ⅷ½" * 20,
    "x" * 250 + " " + "-" * 255 + " " * 250 + "end",
    "".join(f"word{i} " for i in range(400)),
]


def plain(texts, vocab_size):
    """What the trainer learns from texts as they are."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(texts, trainer(vocab_size))
    return core.to_str()


def trainer(vocab_size):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)


def learnt(texts, vocab_size):
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.learn(core, trainer(vocab_size), texts)
    return core.to_str()


def test_ordinary_text_gives_the_merges_it_always_gave():
    """Words of up to 256 characters pass as they are, whatever stands in them."""
    assert learnt(ORDINARY * 5, 600) == plain(ORDINARY * 5, 600)


@pytest.mark.parametrize(
    "text", [LETTERS, "-=" * 100_000, " \n" * 100_000, "山水" * 100_000], ids=lambda t: repr(t[:2])
)
def test_a_word_without_end_takes_seconds(text):
    """400,000 letters took 200 s, and twice as many had no end; the text still comes back from the tokenizer."""
    began = time.monotonic()
    tokenizer = Tokenizer.train([text], 400)
    assert time.monotonic() - began < 20  # about 1, when nothing else runs
    assert tokenizer.decode(tokenizer.encode(text[:1000])) == text[:1000]


def test_long_words_are_cut_and_nothing_is_lost():
    text = "one " + "x" * 600 + "12" + "!" * 300 + " two" + "\t" * 520 + "三" * 257
    pieces = list(bpe._pieces([text, "short"]))
    assert "".join(pieces) == text + "short" and pieces[-1] == "short"
    core = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [end - begin for piece in pieces for _, (begin, end) in core.pre_tokenize_str(piece)]
    assert max(words) <= bpe.LONGEST + 1  # a word may have a space before it


def test_ctrl_c_ends_training_while_it_merges():
    """The trainer is deaf, the command is not: it ends while merges still go on."""
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=600_000))

    def texts():
        yield text
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        learnt(texts(), 8000)
    assert "tokenizer training" in {thread.name for thread in threading.enumerate()}


def test_a_fault_of_the_reading_is_told_as_it_is():
    def texts():
        yield "one"
        raise LookupError("line 2")

    with pytest.raises(LookupError, match="line 2"):
        learnt(texts(), 300)
