"""Can a tokenizer write this text at all? Ids are turned back into text, and what does not come back is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import tokenizers

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError

TEXTS = 1000  # of the first texts of the data …
CHARACTERS = 2_000_000  # … or fewer, when they are long
MOST_LOST = 0.05  # a larger share of the characters is another script, not a rare sign


class RoundTrip:
    """The account of the first texts of some data.

    Spaces are not counted, for many tokenizers put one before a text, and neither is what the tokenizer's own
    normaliser rewrites. characters: looked at. lost: character → how often it did not come back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.texts = self.characters = 0
        self.lost: Counter[str] = Counter()
        self._normaliser: tokenizers.normalizers.Normalizer | None = tokenizer._full.normalizer
        unknown = tokenizer._json["model"].get("unk_token")
        self._unknown = None if unknown is None else tokenizer._full.token_to_id(unknown)

    @property
    def complete(self) -> bool:
        return self.texts >= TEXTS or self.characters >= CHARACTERS

    def add(self, texts: Iterable[str], encoded: Iterable[Sequence[int]]) -> None:
        """Texts and their ids; those beyond the first TEXTS are passed over."""
        for text, ids in zip(texts, encoded, strict=True):
            if self.complete:
                return
            self.texts += 1
            self.characters += len("".join(text.split()))
            written = self._written(ids)
            if written != text:
                self.lost.update(Counter(self._signs(self._normalised(text))) - Counter(self._signs(written)))

    def check(self) -> None:
        """DataError when more than MOST_LOST of the characters are lost."""
        lost = self.lost.total()
        if lost > MOST_LOST * self.characters:
            raise DataError(
                f"the tokenizer cannot write this text: {lost:,} of {self.characters:,} characters are lost",
                found=" ".join(sign for sign, _ in self.lost.most_common(8)),
                fix="choose another with --tokenizer, or train one on this data: minigpt tokenize train",
            )

    def _written(self, ids: Sequence[int]) -> str:
        known = [id for id in ids if id != self._unknown]
        contents = self.tokenizer.contents
        if self.tokenizer.is_byte_level:
            return b"".join(contents[id] for id in known if id < len(contents)).decode("utf-8", "replace")
        return self.tokenizer.decode(known, skip_special=False)

    def _normalised(self, text: str) -> str:
        return text if self._normaliser is None else self._normaliser.normalize_str(text)

    def _signs(self, text: str) -> str:
        """A text without its spaces; `▁` is how sentencepiece spells one."""
        return "".join(text.replace("▁", " ").split())
