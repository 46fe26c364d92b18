"""Train a tokenizer, pack data with it, or look at what it does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import new_dir, quoted
from minigpt.core.groups import CommonConfig, fill_option, split_docs_option
from minigpt.core.report import Context, Report, Result
from minigpt.stages import Verb

if TYPE_CHECKING:
    from minigpt.core.data.tokenizer import Tokenizer


@dataclass
class CorpusConfig:
    """Text files and how to read them."""

    data: list[str] = opt(
        [], "file, directory, glob, sample:… or - for stdin", short="-d", panel="Data", metavar="PATH"
    )
    max_bad: str = opt("0", "bad rows to skip and count before giving up, as a number or 1%", panel="Data")
    split_docs: str = split_docs_option()
    fill: list[str] = fill_option()


@dataclass
class TrainConfig:
    corpus: CorpusConfig = group(CorpusConfig)
    vocab_size: int | None = opt(
        None, "number of tokens, special ones included", panel="Model", low=1, shown="by corpus, up to 6,400"
    )
    out: str | None = opt(None, "directory of the tokenizer", short="-o", metavar="DIR")
    overwrite: bool = opt(False, "replace what is in --out")
    common: CommonConfig = group(CommonConfig)


def tokenizer_option() -> Any:
    return opt(
        None,
        "tokenizer directory, or any model that --model takes elsewhere",
        short="-t",
        panel="Model",
        metavar="PATH",
    )


@dataclass
class PackConfig:
    corpus: CorpusConfig = group(CorpusConfig)
    tokenizer: str | None = tokenizer_option()
    kind: str = opt("text", "text learns every token, chat the assistant's", panel="Data", choices=("text", "chat"))
    thinking: str = opt(
        "auto",
        "think blocks in the chat template; auto = the tokenizer's own template, or ours without",
        panel="Data",
        choices=("auto", "on", "off"),
    )
    out: str | None = opt(None, "directory of the store", short="-o", metavar="DIR")
    common: CommonConfig = group(CommonConfig)


@dataclass
class EncodeConfig:
    text: list[str] = opt([], "text to encode; - or nothing reads lines from stdin", argument=True, metavar="TEXT")
    tokenizer: str | None = tokenizer_option()
    pieces: bool = opt(False, "show the pieces of text instead of their numbers", panel="Output")
    control: bool = opt(False, "read special tokens in the text as such; else they are ordinary text", panel="Data")
    common: CommonConfig = group(CommonConfig)


@dataclass
class DecodeConfig:
    ids: list[str] = opt(
        [], "token ids; - or nothing reads a row of them a line from stdin", argument=True, metavar="ID"
    )
    tokenizer: str | None = tokenizer_option()
    special: bool = opt(True, "show special tokens", panel="Output")
    common: CommonConfig = group(CommonConfig)


@dataclass
class StatsConfig:
    corpus: CorpusConfig = group(CorpusConfig)
    tokenizer: str | None = tokenizer_option()
    most_bytes: int = opt(20_000_000, "bytes of text to measure, taken evenly over the data", panel="Data", low=1)
    common: CommonConfig = group(CommonConfig)


# ---------------------------------------------------------------------------------------------- making


def only_tokenizer(path: Path) -> bool:
    """A directory that holds a tokenizer's files and nothing that would be lost with them."""
    files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    return path.is_dir() and {p.name for p in path.iterdir()} <= files


def train(cfg: TrainConfig, context: Context) -> Result:
    """Learn a byte-level BPE from text. The result is the directory."""
    out = wanted_out(cfg.out, "tokenize train")
    if out.exists() and not cfg.overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out} already exists", fix="choose another --out, or replace it with --overwrite")
    if out.exists() and not only_tokenizer(out):
        raise UsageError(
            f"--out {out} is not a tokenizer's directory, so it is not replaced", fix="choose another --out"
        )
    from minigpt.core.data.reader import total_bytes
    from minigpt.core.data.tokenizer import Tokenizer, suggested_vocab

    corpus = wanted_data(cfg.corpus, "tokenize train")
    vocab_size = cfg.vocab_size or suggested_vocab(total_bytes(corpus.data))
    counted = Counted(corpus_texts(corpus), context.report)
    began = time.monotonic()
    with counted.bar:
        tokenizer = Tokenizer.train(counted, vocab_size)
    if not counted.bytes:
        raise DataError("there is no text in the data", fix="name other --data")
    with new_dir(out) as work:
        tokenizer.save(work)
    found = tokenizer.vocab_size
    if found < vocab_size:
        context.report.warn(
            f"the text has pairs for {found:,} tokens only, {vocab_size:,} were asked for", fix="train on more text"
        )
    seconds = time.monotonic() - began
    context.report.note(
        "saved",
        f"{out}: {found:,} tokens from {counted.bytes / 1e6:.1f} MB in {counted.texts:,} texts, {seconds:.1f} s",
    )
    made = quoted(out)
    context.report.note("next", f"minigpt tokenize stats -t {made} -d …      minigpt pretrain -t {made} -d …")
    facts = {"tokenizer": str(out), "vocab_size": found, "fingerprint": tokenizer.fingerprint}
    return Result(str(out), {**facts, "texts": counted.texts, "bytes": counted.bytes})


class Counted:
    """Texts on their way to the trainer: counted, and shown as a bar."""

    def __init__(self, texts: Iterator[str], report: Report):
        self.source, self.texts, self.bytes = texts, 0, 0
        self.bar = report.progress(None, label="tokenizer")

    def __iter__(self) -> Iterator[str]:
        for text in self.source:
            self.texts += 1
            self.bytes += len(text.encode("utf-8"))
            self.bar.update(self.texts, f"texts, {self.bytes / 1e6:.1f} MB")
            yield text
        self.bar.update(self.texts, f"texts, {self.bytes / 1e6:.1f} MB, learning merges")


def pack(cfg: PackConfig, context: Context) -> Result:
    """Make the token store that training reads; `--data DIR` of pretrain and sft takes it."""
    out = wanted_out(cfg.out, "tokenize pack")
    corpus = wanted_data(cfg.corpus, "tokenize pack")
    tokenizer = wanted_tokenizer(cfg.tokenizer, "tokenize pack", context)
    from minigpt.core.data import store
    from minigpt.core.data.chat import template
    from minigpt.core.data.placeholders import parse_fill

    if cfg.kind == "chat" and (cfg.thinking != "auto" or tokenizer.chat_template is None):
        tokenizer.chat_template = template(cfg.thinking == "on")
    made = store.build(
        corpus.data,
        tokenizer,
        kind=cfg.kind,
        val_share=0.0,
        max_bad=corpus.max_bad,
        split_docs=corpus.split_docs,
        fill=parse_fill(corpus.fill),
        report=context.report,
        out=out,
    )
    for note in made.notes:
        context.report.warn(note)
    meta = made.meta
    context.report.note("saved", f"{out}: {meta['documents']:,} documents, {meta['tokens']:,} tokens ({cfg.kind})")
    keys = ("kind", "documents", "tokens", "supervised", "characters", "bad", "unsupervised", "fingerprint")
    return Result(str(out), {"store": str(out), **{key: meta[key] for key in keys}})


# ---------------------------------------------------------------------------------------------- looking


def encode(cfg: EncodeConfig, context: Context) -> Result:
    """One line of ids for each text."""
    tokenizer = wanted_tokenizer(cfg.tokenizer, "tokenize encode", context)
    rows = []
    for _, text in given(cfg.text, "text"):
        ids = tokenizer.encode_template(text) if cfg.control else tokenizer.encode(text)
        pieces = spelled(tokenizer, ids) if cfg.pieces or cfg.common.json else []
        context.report.out(json.dumps(pieces, ensure_ascii=False) if cfg.pieces else " ".join(map(str, ids)))
        if cfg.common.json:
            rows.append({"text": text, "ids": ids, "pieces": pieces})
    return Result(data={"rows": rows})


def spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token as text. Bytes that are only a part of a character are written as `\\xe6`."""
    pieces = []
    for id in ids:
        text = tokenizer.decode([id], skip_special=False)
        spelling = tokenizer.token(id) or ""
        if "\ufffd" in text and tokenizer.is_byte_level:
            text = tokenizer.contents[id].decode("utf-8", "backslashreplace")
        pieces.append(text or spelling)
    return pieces


def decode(cfg: DecodeConfig, context: Context) -> Result:
    """One text for each row of ids."""
    tokenizer = wanted_tokenizer(cfg.tokenizer, "tokenize decode", context)
    rows = []
    words = [" ".join(cfg.ids)] if cfg.ids and cfg.ids != ["-"] else cfg.ids
    for where, row in given(words, "ids"):
        ids = [parse_id(word, where, tokenizer.vocab_size) for word in row.strip("[] \t").replace(",", " ").split()]
        text = tokenizer.decode(ids, skip_special=not cfg.special)
        context.report.out(text)
        if cfg.common.json:
            rows.append({"ids": ids, "text": text})
    return Result(data={"rows": rows})


def parse_id(word: str, where: str, vocab_size: int) -> int:
    if word.isascii() and word.isdigit():
        if int(word) < vocab_size:
            return int(word)
        raise DataError(
            f"{where} has a number that is no token", found=word, fix=f"ids go from 0 to {vocab_size - 1:,}"
        )
    raise DataError(f"{where} is not a row of token ids", found=word, fix="write ids as 17 4 301, or as [17, 4, 301]")


def given(texts: list[str], what: str) -> Iterator[tuple[str, str]]:
    """(where from, text) of the command line's texts, or of the lines of stdin."""
    if texts and texts != ["-"]:
        yield from ((f"{what} {n}" if len(texts) > 1 else what, text) for n, text in enumerate(texts, 1))
        return
    if not texts and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(f"there is no {what}", fix=f"write it behind the command, or pipe lines of {what} into it")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield f"stdin:{number}", line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise DataError(f"stdin:{number} is not UTF-8", found=str(e)) from None


def stats(cfg: StatsConfig, context: Context) -> Result:
    """How well a tokenizer fits some text."""
    tokenizer = wanted_tokenizer(cfg.tokenizer, "tokenize stats", context)
    corpus = wanted_data(cfg.corpus, "tokenize stats")
    from minigpt.core.eval.tokenizer_fit import Fit

    fit = Fit(tokenizer)
    with context.report.progress(None, label="stats") as bar:
        for batch in batches(corpus_texts(corpus, cfg.most_bytes)):
            fit.add(batch)
            bar.update(fit.texts, f"texts, {fit.tokens:,} tokens")
    if not fit.tokens:
        raise DataError("there is no text in the data", fix="name other --data")
    if fit.changed:
        context.report.warn(
            f"{fit.changed:,} of {fit.texts:,} texts do not come back the same from encode and decode",
            fix=f"the first: {fit.first_changed!r}",
        )
    facts = fit.figures()
    return Result("\n".join(stats_lines(facts)), {"tokenizer": cfg.tokenizer, **facts})


def stats_lines(facts: dict[str, Any]) -> Iterator[str]:
    same = "every text comes back the same" if not facts["changed"] else f"{facts['changed']:,} texts change"
    yield f"texts             {facts['texts']:,} ({facts['bytes'] / 1e6:.2f} MB, {facts['characters']:,} characters)"
    yield f"tokens            {facts['tokens']:,}, {facts['used']:.1%} of the vocabulary is used"
    yield f"bytes a token     {facts['bytes_per_token']:.3f}"
    yield f"tokens a char     {facts['tokens_per_character']:.3f}"
    yield f"byte fallback     {facts['fallback']:.2%} of the tokens are single bytes of a longer character"
    yield f"round trip        {same}"
    yield ""
    yield "script          characters       tokens   tokens a char"
    for name, part in facts["scripts"].items():
        rate = f"{part['tokens_per_character']:.3f}" if part["characters"] else "-"
        yield f"{name:<12} {part['characters']:>13,} {part['tokens']:>12,} {rate:>15}"


def batches(texts: Iterator[str], size: int = 500) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- what must be given


def wanted_out(out: str | None, command: str) -> Path:
    if out is None:
        raise UsageError(f"{command} needs a place to write to", fix="name a directory with --out")
    return Path(out).expanduser()


def wanted_data(corpus: CorpusConfig, command: str) -> CorpusConfig:
    """The corpus, once its paths are known to be there."""
    from minigpt.core.data.reader import expand

    if not corpus.data:
        raise UsageError(f"{command} needs data", fix="name a file, a directory or - with --data")
    expand(corpus.data)
    return corpus


def corpus_texts(corpus: CorpusConfig, most_bytes: float = 100e6) -> Iterator[str]:
    """The corpus's texts, taken evenly over it when it is larger than `most_bytes`."""
    from minigpt.core.data.formats import texts_for_training
    from minigpt.core.data.placeholders import parse_fill

    return texts_for_training(corpus.data, corpus.split_docs, corpus.max_bad, most_bytes, parse_fill(corpus.fill))


def wanted_tokenizer(named: str | None, command: str, context: Context) -> Tokenizer:
    from minigpt.core.convert.open import open_tokenizer

    if named is None:
        raise UsageError(f"{command} needs a tokenizer", fix="name its directory, or a model, with --tokenizer")
    return open_tokenizer(named, context.report)


VERBS: dict[str, Verb] = {
    "train": Verb(
        TrainConfig,
        train,
        "Learn a byte-level BPE tokenizer from text.",
        (
            "minigpt tokenize train -d poems.jsonl -o tok",
            "minigpt tokenize train -d texts/ --vocab-size 6400 -o tok",
            "zcat big.jsonl.gz | minigpt tokenize train -d - -o tok",
        ),
    ),
    "pack": Verb(
        PackConfig,
        pack,
        "Tokenise data once, into the store that training reads.",
        (
            "minigpt tokenize pack -d poems.jsonl -t tok -o poems.store",
            "minigpt tokenize pack -d chats.jsonl -t runs/poems --kind chat -o chats.store",
            "minigpt tokenize pack -d poems.jsonl -t tok -o poems.store && minigpt pretrain -d poems.store -t tok",
        ),
    ),
    "encode": Verb(
        EncodeConfig,
        encode,
        "Text to token ids.",
        (
            "minigpt tokenize encode -t tok 'Hello, world'",
            "minigpt tokenize encode -t runs/poems --pieces 春風又綠江南岸",
            "minigpt tokenize encode -t tok < lines.txt > ids.txt",
        ),
    ),
    "decode": Verb(
        DecodeConfig,
        decode,
        "Token ids to text.",
        (
            "minigpt tokenize decode -t tok 72 101 108",
            "minigpt tokenize decode -t tok < ids.txt",
            "minigpt tokenize encode -t tok hi | minigpt tokenize decode -t tok --no-special -",
        ),
    ),
    "stats": Verb(
        StatsConfig,
        stats,
        "Measure how well a tokenizer fits some text.",
        (
            "minigpt tokenize stats -t tok -d poems.jsonl",
            "minigpt tokenize stats -t runs/poems -d texts/ --most-bytes 5M",
            "minigpt tokenize stats -t tok -d poems.jsonl --json | jq .tokens_per_character",
        ),
    ),
}
