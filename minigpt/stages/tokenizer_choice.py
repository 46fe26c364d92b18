"""Which tokenizer and chat template a training run uses: given, the model's own, or trained on the data."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from minigpt.core.convert.open import open_tokenizer
from minigpt.core.data import reader
from minigpt.core.data.chat import template
from minigpt.core.data.formats import normalise, texts_for_training
from minigpt.core.data.placeholders import parse_fill
from minigpt.core.data.schema import BadRow, Conversation
from minigpt.core.data.tokenizer import TURN_END, Tokenizer, suggested_vocab
from minigpt.core.errors import UsageError
from minigpt.core.files import new_dir, read_json
from minigpt.core.report import Report
from minigpt.stages.tokenize import Counted

MOST_BYTES = 30e6  # of text that a tokenizer is trained on: more changes few merges and takes minutes


def choose(
    kind: str,
    cfg: Any,
    origins: dict[str, str],
    run: Path,
    saved: Path | None,
    report: Report,
    settled: tuple[str | None] | None = None,
) -> tuple[Tokenizer, str]:
    """The tokenizer of a run, and a note on it for the run's first lines.

    kind: `text` or `chat`, which needs a chat template. saved: the checkpoint that is resumed; its tokenizer stays.
    Else --tokenizer, else the model's, else one trained on the data and kept in the run directory.
    settled: the chat template that another process of this run has chosen.
    """
    own, note = run / "tokenizer", ""
    if saved is not None:
        tokenizer = Tokenizer.load(saved)
        if origins.get("tokenizer") == "command line" and not cfg.train.allow_changes:
            _refuse_another(tokenizer, str(cfg.data.tokenizer), report)
    elif cfg.data.tokenizer:
        tokenizer = open_tokenizer(cfg.data.tokenizer, report)
        if cfg.model:
            _refuse_a_strange_one(tokenizer, cfg)
    elif cfg.model:
        tokenizer = Tokenizer.load(cfg.model)
    elif own.is_dir():
        tokenizer = Tokenizer.load(own)
    else:
        tokenizer = _train(cfg, origins, own, report)
        note = f"{tokenizer.vocab_size:,} BPE trained here"
    if settled is not None:
        [tokenizer.chat_template] = settled
    elif kind == "chat":
        _give_template(tokenizer, cfg, resumed=saved is not None)
    elif not cfg.model:
        tokenizer.chat_template = None  # a base model does not know how to chat
    return tokenizer, note


def _refuse_another(saved: Tokenizer, named: str, report: Report) -> None:
    """A run goes on with the tokenizer it began with, wherever that lies now."""
    given = open_tokenizer(named, report)
    given.chat_template = saved.chat_template  # the run's own choice
    if given.fingerprint != saved.fingerprint:
        raise UsageError(
            f"--tokenizer {named} is not the one that this run was trained with",
            found=f"{given.fingerprint[:12]}, the run has {saved.fingerprint[:12]}",
            fix="leave --tokenizer away, start a new run with another --out, or pass --allow-changes",
        )


def _refuse_a_strange_one(given: Tokenizer, cfg: Any) -> None:
    """A model knows its own tokens: others, even as many, would be read as if they were these."""
    if not (Path(cfg.model) / "tokenizer.json").is_file():
        return  # it came without one, and what fits its embedding is all that can be known
    own = Tokenizer.load(cfg.model)
    if given.vocabulary != own.vocabulary:
        raise UsageError(
            f"--tokenizer {cfg.data.tokenizer} has other tokens than the model of --model {cfg.model}",
            found=f"{given.vocab_size:,} tokens ({given.vocabulary[:12]}), "
            f"the model's own has {own.vocab_size:,} ({own.vocabulary[:12]})",
            fix="leave --tokenizer away: a model brings its own",
        )


def _train(cfg: Any, origins: dict[str, str], own: Path, report: Report) -> Tokenizer:
    if cfg.vocab_size is None:
        cfg.vocab_size = suggested_vocab(reader.total_bytes(cfg.data.data))
        origins["vocab_size"] = "auto"
    texts = texts_for_training(
        cfg.data.data,
        split_docs=cfg.data.split_docs,
        max_bad=cfg.data.max_bad,
        most_bytes=MOST_BYTES,
        fill=parse_fill(cfg.data.fill),
    )
    report.note("tokens", f"training a tokenizer of {cfg.vocab_size:,} tokens on the data")
    counted = Counted(texts, report)
    with counted.bar:
        tokenizer = Tokenizer.train(counted, cfg.vocab_size)
    with new_dir(own) as work:
        tokenizer.save(work)
    return tokenizer


def _give_template(tokenizer: Tokenizer, cfg: Any, resumed: bool) -> None:
    """The model's own template; else ours, with a think block when the data has reasoning to learn.

    A model that was trained with ours without the block gets one when it is given reasoning.
    """
    wish, data = cfg.thinking, cfg.data.data
    if wish == "auto" and (resumed or tokenizer.chat_template not in (None, template(False))):
        return
    if TURN_END not in tokenizer.added:
        raise UsageError(
            f"the tokenizer of {cfg.model} has neither a chat template nor the tokens of ours",
            found=f"no {TURN_END} among its added tokens",
            fix="start from a model that has them",
        )
    if packed := [p for p in data if p != "-" and (Path(p) / "meta.json").is_file()]:
        rendered = read_json(Path(packed[0]) / "meta.json").get("tokenizer")
        for thinking in (False, True):  # the template it was packed with; any other is refused when it is opened
            tokenizer.chat_template = template(thinking)
            if tokenizer.fingerprint == rendered:
                return
    thinking = wish == "on" or (wish == "auto" and not packed and has_reasoning(data))
    tokenizer.chat_template = template(thinking)


def has_reasoning(specs: list[str]) -> bool:
    """Whether any conversation of the data thinks before it answers."""
    for source in reader.expand(specs):
        for row in reader.rows(source):
            with contextlib.suppress(BadRow):  # told when the store is built
                record = normalise(row.value, "chat")
                if isinstance(record, Conversation) and any(m.get("reasoning_content") for m in record.messages):
                    return True
    return False
