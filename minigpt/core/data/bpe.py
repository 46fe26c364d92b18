"""Learning merges from text of any kind, in a time that does not grow with the length of its words.

A merge rewrites every word that holds its pair, from end to end: a word of 400,000 letters, as in base64, genomes or
text without spaces, costs its square. The trainer therefore sees long words in pieces.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator

import tokenizers

LONGEST = 256  # characters of a word that the trainer sees whole
_SPACES = re.compile(rf"\s{{{LONGEST + 1}}}")
_RUN = re.compile(r"[^\W_]+|\s+|(?:[^\w\s]|_)+")  # letters and digits, spaces, signs: no word of GPT-2's mixes them


def learn(core: tokenizers.Tokenizer, trainer: tokenizers.trainers.Trainer, texts: Iterable[str]) -> None:
    """Train `core` on texts. What reading them raises is raised here, and so is Ctrl-C at any time.

    The trainer is deaf to signals while it merges, so it works in a thread and the caller's waits for it.
    """
    if threading.current_thread() is not threading.main_thread():  # signals go elsewhere
        core.train_from_iterator(_pieces(texts), trainer)
        return
    over, faults = threading.Event(), list[BaseException]()

    def read() -> Iterator[str]:
        for piece in _pieces(texts):
            if over.is_set():
                raise KeyboardInterrupt  # of a training that nobody waits for
            yield piece

    def work() -> None:
        try:
            core.train_from_iterator(read(), trainer)
        except BaseException as e:
            faults.append(e)

    thread = threading.Thread(target=work, name="tokenizer training", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        over.set()
        raise
    if faults:
        raise faults[0]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with a cut after every LONGEST characters of a word that has more."""
    for text in texts:
        if max(map(len, text.split()), default=0) <= LONGEST and not _SPACES.search(text):
            yield text
            continue
        begin = 0
        for run in _RUN.finditer(text):
            for end in range(run.start() + LONGEST, run.end(), LONGEST):
                yield text[begin:end]
                begin = end
        yield text[begin:]
