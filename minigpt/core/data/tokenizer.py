"""Byte-level BPE (Sennrich et al., 2016, arXiv:1508.07909; bytes as in GPT-2): any text in, the same text out.

Content never becomes control: text is encoded by a twin of the tokenizer that knows no control tokens, so `<|im_end|>`
in somebody's message is six ordinary pieces. Only a chat template's own markers become special ids. Control are added
tokens that are special, that look like markers (`<think>`, `[INST]`), or that the chat template writes, as `USER:`;
other added tokens are words of the vocabulary (`covidvirus`, four spaces) and get the ids that transformers gives them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from minigpt.core.data.added_tokens import MORE_SPECIAL, ROLES, is_control, merged, of_older_days
from minigpt.core.data.bpe import learn
from minigpt.core.errors import DataError, MinigptError, UsageError
from minigpt.core.files import read_json

DOCUMENT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# Ids 0 to 35 of every tokenizer trained here. The first 21 never show in text; tools, thinking and spare ones do.
CONTROL = (
    DOCUMENT, TURN_START, TURN_END,
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
    "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
)  # fmt: skip
MARKERS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    *(f"<|buffer{i}|>" for i in range(1, 10)),
)  # fmt: skip
SMALLEST_VOCAB = len(CONTROL) + len(MARKERS) + 256  # specials and single bytes
_TURN_ENDS = (TURN_END, "<|eot_id|>", "<end_of_turn>", "<|end|>")  # how other families end a turn


class Tokenizer:
    """A tokenizer with its roles and chat template. Made by `train` or `load`.

    raw: contents of tokenizer.json. config: of tokenizer_config.json.
    chat_template: jinja source, None for a base model.
    extra_eos: further ids that end generation (from generation_config.json).
    """

    def __init__(
        self, raw: str, config: dict[str, Any], chat_template: str | None = None, extra_eos: Sequence[int] = ()
    ):
        self._json = {**json.loads(raw), "truncation": None, "padding": None}
        self.config = config
        self._extra_eos = tuple(extra_eos)
        self._full = tokenizers.Tokenizer.from_str(json.dumps(self._json))
        self._json["added_tokens"] = merged(self._full, self._json.get("added_tokens") or [], config)
        self._words: list[dict[str, Any]] | None = None
        self.chat_template = chat_template

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        """What the template writes decides which added tokens are control, and so how content is encoded."""
        self._chat_template = source
        tokens = self._json["added_tokens"]
        control = [t for t in tokens if is_control(t, source or "")]
        words = [t for t in tokens if t not in control]
        self.added = {t["content"]: int(t["id"]) for t in control}
        self.eats_left = frozenset(t["content"] for t in control if t.get("lstrip"))  # spaces before the token
        self.eats_right = frozenset(t["content"] for t in control if t.get("rstrip"))
        if words != self._words:
            self._words = words
            self._plain = self._twin({})
            # where a vocabulary is a list, the twin numbers these anew
            twins = {self._plain.token_to_id(t["content"]): int(t["id"]) for t in words}
            self._moved = {twin: id for twin, id in twins.items() if twin != id}
            self._inner = self._without_prefix()

    def _twin(self, changes: dict[str, Any]) -> tokenizers.Tokenizer:
        """The tokenizer without control tokens. changes: of keys of tokenizer.json."""
        words, model = self._words or [], self._json["model"]
        if isinstance(model.get("vocab"), dict):
            model = {**model, "vocab": {**model["vocab"], **{t["content"]: t["id"] for t in words}}}
        raw = {**self._json, "model": model, "added_tokens": words, "post_processor": None, **changes}
        return tokenizers.Tokenizer.from_str(json.dumps(raw))

    def _without_prefix(self) -> tokenizers.Tokenizer | None:
        """The twin for text in the midst of a line; None when it would be no other, as for all but old tokenizers."""
        steps = {key: _unprefixed(self._json.get(key)) for key in ("normalizer", "pre_tokenizer")}
        return None if all(steps[key] == self._json.get(key) for key in steps) else self._twin(steps)

    # ---------------------------------------------------------------------------------------- making

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` tokens (fewer when the text has no more pairs).

        UsageError when vocab_size is too small for the bytes and special tokens.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise UsageError(
                f"--vocab-size {vocab_size} is too small",
                fix=f"it needs at least {SMALLEST_VOCAB}: 256 bytes and {SMALLEST_VOCAB - 256} special tokens",
            )
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*CONTROL, *MARKERS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        learn(core, trainer, texts)
        raw = json.loads(core.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["content"] not in MARKERS  # markers survive skip_special_tokens
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": DOCUMENT,  # prepended, it makes the frame of a training document
            "eos_token": TURN_END,
            "pad_token": DOCUMENT,
            "unk_token": DOCUMENT,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131_072,
        }
        return cls(json.dumps(raw, ensure_ascii=False), config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A tokenizer.json, or a tokenizer's, a model's or a run's directory. DataError names what is missing."""
        folder = _folder(Path(path))
        file = folder / "tokenizer.json"
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_file) if config_file.is_file() else {}
        if (roles := folder / "special_tokens_map.json").is_file():
            config = {**{k: v for k, v in read_json(roles).items() if k in (*ROLES, *MORE_SPECIAL)}, **config}
        if "added_tokens_decoder" not in config and (older := folder / "added_tokens.json").is_file():
            config = {**config, "added_tokens_decoder": of_older_days(read_json(older), config)}
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else _template(config, folder)
        extra: list[int] = []
        for name in ("generation_config.json", "config.json"):
            eos = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
            extra += [eos] if isinstance(eos, int) else list(eos or ())
        try:
            return cls(file.read_text(encoding="utf-8"), config, template, extra)
        except MinigptError:
            raise
        except Exception as e:  # the library raises bare Exception for a file it cannot read
            raise DataError(f"{file} is not a tokenizer", found=str(e)) from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja: transformers opens them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._json, ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        config = {**self.config, "tokenizer_class": "PreTrainedTokenizerFast"}  # the one that reads any tokenizer.json
        config.pop("chat_template", None)
        if isinstance(config.get("extra_special_tokens"), list):  # transformers 5's key; 4 wants another type there
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
        template = folder / "chat_template.jinja"
        template.unlink(missing_ok=True)
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")

    # ---------------------------------------------------------------------------------------- text and ids

    @property
    def raw(self) -> dict[str, Any]:
        """tokenizer.json, with the added tokens that only tokenizer_config.json names. Not to be changed."""
        return self._json

    @cached_property
    def vocab_size(self) -> int:
        """The largest id of a token and one more, added ones included: rows that an embedding needs.

        Where ids have gaps that is more than there are tokens.
        """
        return max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Content as ids; never a control token's. DataError for half a character (a lone surrogate)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], inner: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores.

        inner: they go on where other text ended, so a tokenizer that puts a space before a text puts none here.
        """
        twin = self._inner if inner and self._inner is not None else self._plain
        try:
            ids = [e.ids for e in twin.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            broken = next(t for t in texts if any("\ud800" <= c <= "\udfff" for c in t))
            raise DataError("the text holds half a character (a lone surrogate)", found=ascii(broken)) from None
        return [[self._moved.get(i, i) for i in row] for row in ids] if self._moved else ids

    def encode_template(self, text: str) -> list[int]:
        """A template's own text: its markers become added tokens."""
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids as text. Bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling of one id."""
        return self._full.id_to_token(id)

    @cached_property
    def prefixes_once(self) -> bool:
        """It puts its space before the first text only, and not before those behind an added token."""
        return '"prepend_scheme": "first"' in json.dumps(self._json.get("pre_tokenizer"))

    @cached_property
    def is_byte_level(self) -> bool:
        """Each character of a vocabulary entry stands for one byte."""
        return '"ByteLevel"' in json.dumps([self._json.get("pre_tokenizer"), self._json.get("decoder")])

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) bytes of text that each token stands for; 0 for control tokens."""
        sizes = np.array([len(content) for content in self.contents], dtype=np.int64)
        sizes[list(self.added.values())] = 0
        return sizes

    @cached_property
    def contents(self) -> list[bytes]:
        """(V,) the bytes that each token writes; an added one writes its name."""
        added = {int(t["id"]) for t in self._json["added_tokens"]}
        found = [b""] * self.vocab_size
        for spelling, id in self._full.get_vocab(with_added_tokens=True).items():
            if id in added or (self.is_byte_level and not BYTE_OF.keys() >= set(spelling)):
                found[id] = spelling.encode()
            else:
                found[id] = bytes(BYTE_OF[c] for c in spelling) if self.is_byte_level else _piece(spelling)
        return found

    # ---------------------------------------------------------------------------------------- roles

    def role(self, name: str) -> int | None:
        """Id of `bos_token`, `eos_token`, `pad_token` or `unk_token` as the tokenizer's own config names it."""
        token = self.config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        return self._full.token_to_id(content) if isinstance(content, str) else None

    @property
    def document_id(self) -> int:
        """The token before and after every document."""
        for found in (self.added.get(DOCUMENT), self.role("eos_token"), self.role("bos_token")):
            if found is not None:
                return found
        raise DataError(
            "the tokenizer names no end-of-document token", fix=f"add {DOCUMENT} or eos_token to its config"
        )

    @property
    def opening_id(self) -> int:
        """The token before a text: the one that the tokenizer itself puts there (Llama's), else the document's."""
        first = self._full.encode("a", add_special_tokens=True).ids[:1]
        if first and first[0] in self.special_ids:
            return first[0]
        bos = self.role("bos_token") if self.config.get("add_bos_token") else None
        return self.document_id if bos is None else bos

    @property
    def turn_end_id(self) -> int | None:
        """The token that ends a turn of a conversation; None for a tokenizer without one."""
        template = self.chat_template or TURN_END
        for marker in _TURN_ENDS:
            if marker in template and marker in self.added:
                return self.added[marker]
        return self.role("eos_token")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends generation, the turn's end first."""
        wanted = [self.turn_end_id, self.role("eos_token"), self.document_id, *self._extra_eos]
        return tuple(dict.fromkeys(i for i in wanted if i is not None and i < self.vocab_size))

    @property
    def pad_id(self) -> int:
        """Fills the unused end of a row; such positions have no loss, so any token would do."""
        pad = self.role("pad_token")
        return self.document_id if pad is None else pad

    @property
    def special_ids(self) -> frozenset[int]:
        """Every control token's id."""
        return frozenset(self.added.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of vocabulary, merges, added tokens and template: equal fingerprints give equal ids."""
        canonical = json.dumps([self._json, self.chat_template], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def vocabulary(self) -> str:
        """sha256 of what decides which text an id stands for: vocabulary, merges, how text is split, added tokens.

        Equal for the same tokens in other files: with another template, or as another version writes them.
        """
        raw = json.loads(self._full.to_str())
        added = sorted((t["id"], t["content"]) for t in raw["added_tokens"])
        canonical = json.dumps([[raw[key] for key in ("model", "normalizer", "pre_tokenizer")], added], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _template(config: dict[str, Any], folder: Path) -> str | None:
    """The chat template of tokenizer_config.json: one, or several by name of which the default is ours.

    DataError when there are several and none of them is the default: which one a model is to be asked with decides
    what it answers.
    """
    found = config.get("chat_template")
    named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)} if isinstance(found, list) else {}
    names = [str(name) for name in named] + sorted(f.stem for f in folder.glob("additional_chat_templates/*.jinja"))
    default = named.get("default") if isinstance(found, list) else found
    if names and not isinstance(default, str):
        raise DataError(
            f"{folder} names chat templates, and none of them is the default",
            found=", ".join(names),
            fix=f"write the one that is to be used to {folder / 'chat_template.jinja'}",
        )
    return default if isinstance(default, str) else None


def _unprefixed(step: Any) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json that puts no space before the text."""
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    changed = dict(step)
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            changed[parts] = [part for part in map(_unprefixed, step[parts]) if part is not None]
    if changed.get("add_prefix_space"):
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    return changed


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print stand for themselves, the others for the characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()


def _piece(spelling: str) -> bytes:
    """An entry of a sentencepiece vocabulary: `▁` is a space, `<0xE4>` one byte."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", spelling):
        return bytes([int(spelling[3:5], 16)])
    return spelling.replace("▁", " ").encode()


def _folder(path: Path) -> Path:
    """The directory that holds tokenizer.json: the path itself, its file, a run's tokenizer or its newest step."""
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    for candidate in _candidates(path):
        if (candidate / "tokenizer.json").is_file():
            return candidate
    if not path.exists():
        raise DataError(f"the tokenizer {path} does not exist", fix="name a directory with tokenizer.json")
    if (path / "tokenizer.model").is_file() or (path / "vocab.json").is_file():
        raise DataError(
            f"{path} has its tokenizer in an older form only",
            found="no tokenizer.json",
            fix=f"transformers writes it: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})",
        )
    raise DataError(f"{path} holds no tokenizer.json", fix="name a tokenizer's, a model's or a run's directory")


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    latest = path / "latest"
    if latest.is_file():
        yield path / latest.read_text(encoding="utf-8").strip()
    yield path / "tokenizer"


def suggested_vocab(size: int) -> int:
    """A vocabulary that a corpus of `size` bytes can fill: 2 * sqrt(size), in steps of 64, from 320 to 6,400.

    Small models spend their parameters on layers rather than on rarely seen tokens.
    """
    return int(min(6400, max(320, round(2 * size**0.5 / 64) * 64)))
