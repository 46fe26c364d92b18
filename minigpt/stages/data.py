"""Look at data and check it before training."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import CheckFailed, DataError, UsageError
from minigpt.core.files import quoted
from minigpt.core.groups import CommonConfig, split_docs_option
from minigpt.core.report import Context, Report, Result
from minigpt.stages import Verb
from minigpt.stages.survey import Finding, Survey, describe, has_own_template, remark_unwritten, survey

if TYPE_CHECKING:
    from minigpt.core.data.chat import Rendered
    from minigpt.core.data.reader import Input
    from minigpt.core.data.schema import Record, Row
    from minigpt.core.data.tokenizer import Tokenizer

KINDS = ("auto", "text", "chat")
SAMPLE = 1000  # good rows that are tokenised to estimate the tokens of a file
SHOWN = 2000  # characters of a sample
MIDDLE = 400  # characters of one part of it


@dataclass
class FilesConfig:
    """Which files, and how to read them."""

    files: list[str] = opt([], "file, directory, glob or - for stdin", argument=True, metavar="FILE")
    kind: str = opt(
        "auto",
        "what the rows are for: text to pretrain on, chat to fine-tune on; auto goes by the first row of each file",
        panel="Data",
        choices=KINDS,
    )
    split_docs: str = split_docs_option()


@dataclass
class PreviewConfig:
    files: FilesConfig = group(FilesConfig)
    rows: int = opt(2, "samples to show of each file", short="-n", panel="Output", low=0)
    tokenizer: str | None = opt(
        None,
        "tokenizer directory, or any model that --model takes elsewhere",
        short="-t",
        panel="Model",
        metavar="PATH",
        shown="one trained on the file, as pretrain does",
    )
    common: CommonConfig = group(CommonConfig)


@dataclass
class CheckConfig:
    files: FilesConfig = group(FilesConfig)
    tokenizer: str | None = opt(
        None,
        "model or tokenizer whose chat template every conversation is tried with",
        short="-t",
        panel="Model",
        metavar="PATH",
        shown="rows alone",
    )
    limit: int = opt(20, "bad rows to list; 0 = all", panel="Output", low=0)
    common: CommonConfig = group(CommonConfig)


@dataclass
class DemoConfig:
    out: str | None = opt(None, "directory of the files", short="-o", panel="Output", metavar="DIR")
    lang: str = opt("both", "language of the rows", panel="Data", choices=("en", "zh", "both"))
    seed: int = opt(0, "another number makes other rows of the same kinds", panel="Data", low=0)
    overwrite: bool = opt(False, "replace files that are there", panel="Output")
    common: CommonConfig = group(CommonConfig)


# ---------------------------------------------------------------------------------------------- files


def wanted_files(cfg: FilesConfig, command: str) -> list[Input]:
    from minigpt.core.data.reader import expand

    if not cfg.files:
        raise UsageError(f"{command} needs a file", fix=f"minigpt {command} chats.jsonl, or - for stdin")
    return expand(cfg.files)


def opened(named: str | None, report: Report) -> Tokenizer | None:
    if named is None:
        return None
    from minigpt.core.convert.open import open_tokenizer

    return open_tokenizer(named, report)


# ---------------------------------------------------------------------------------------------- check


def check(cfg: CheckConfig, context: Context) -> Result:
    """Read every row. Lists the bad ones; exit 7 when there are any, 3 when a file cannot be read at all."""
    from minigpt.core.data.chat import template
    from minigpt.core.data.reader import size_of
    from minigpt.core.data.schema import reasons

    inputs = wanted_files(cfg.files, "data check")
    tokenizer = opened(cfg.tokenizer, context.report)
    if tokenizer is not None and not has_own_template(tokenizer):
        tokenizer.chat_template = template(True)
    surveys: list[Survey] = []
    findings: list[dict[str, Any]] = []
    total, before = sum(size_of(i.path) for i in inputs), 0
    with context.report.progress(total, label="check") as bar:
        for source in inputs:
            surveys.append(Survey(source.name))
            for _, outcome in survey(source, cfg.files, surveys[-1], bar, before, tokenizer):
                if isinstance(outcome, Finding) and (not cfg.limit or len(findings) < cfg.limit):
                    context.report.out(str(outcome))
                    findings.append({"where": outcome.where, "reason": outcome.fault.reason, "fix": outcome.fault.fix})
            before += size_of(source.path)
    for one in surveys:
        context.report.note("file", describe(one))
        one.tell(context.report)
    counts = sum((one.bad for one in surveys), Counter[str]())
    rows = sum(one.rows for one in surveys)
    facts = {"rows": rows, "files": [one.facts() for one in surveys], "findings": findings}
    if not rows:
        raise DataError("there is not one row in the data", fix="name other files")
    if counts:
        hidden = sum(counts.values()) - len(findings)
        more = f"{hidden:,} more are not listed: --limit 0 lists all. " if hidden else ""
        raise CheckFailed(
            f"{sum(counts.values()):,} of {rows:,} rows are bad: {reasons(counts)}",
            fix=f"{more}{findings[0]['fix']}, or train with --max-bad to skip and count such rows",
            data=facts,
        )
    return Result(f"{rows:,} rows, all good", facts)


# ---------------------------------------------------------------------------------------------- preview


def preview(cfg: PreviewConfig, context: Context) -> Result:
    """Shape, rows and tokens of each file, and samples as the model will see them: what it learns stands in ⟦ ⟧.

    Letters that spell a token, and are learnt as letters, stand behind a backslash.
    """
    inputs = wanted_files(cfg.files, "data preview")
    tokenizer = opened(cfg.tokenizer, context.report)
    shown = [Preview(cfg, context, source, tokenizer).run() for source in inputs]
    return Result(data={"files": shown})


@dataclass
class Preview:
    """The preview of one file."""

    cfg: PreviewConfig
    context: Context
    source: Input
    tokenizer: Tokenizer | None

    def run(self) -> dict[str, Any]:
        from minigpt.core.data.chat import template
        from minigpt.core.data.reader import size_of

        found = Survey(self.source.name)
        good: list[tuple[Row, Record]] = []
        bad: list[Finding] = []
        own = self.tokenizer if has_own_template(self.tokenizer) else None
        with self.context.report.progress(size_of(self.source.path), label="read") as bar:
            for row, outcome in survey(self.source, self.cfg.files, found, bar, tokenizer=own):
                if isinstance(outcome, Finding):
                    bad.append(outcome) if len(bad) < 3 else None
                elif len(good) < SAMPLE:
                    good.append((row, outcome))
        report = self.context.report
        report.out(describe(found))
        for finding in bad:
            report.warn(str(finding), fix=f"minigpt data check {quoted(self.source.name)}")
        if not good:
            raise DataError(
                f"{self.source.name} has no row that can be used", fix=f"minigpt data check {quoted(self.source.name)}"
            )
        tokenizer = self.tokenizer or self._own([record for _, record in good])
        if own is None:
            give_template(tokenizer, [record for _, record in good])
            for row, record in good:
                remark_unwritten(tokenizer, row, record, found)
        found.tell(report)
        rendered = [as_tokens(tokenizer, record, found.kind) for _, record in good]
        per_row = sum(len(r.ids) for r in rendered) / len(rendered)
        tokens = round(per_row * found.records)
        learnt = sum(sum(r.mask) for r in rendered) / sum(len(r.ids) for r in rendered)
        exact = "" if found.records == len(good) else "about "
        longest = max(len(r.ids) for r in rendered)
        report.out(
            f"{exact}{tokens:,} tokens, {per_row:.0f} a row, the longest of {len(rendered):,} has {longest:,}; "
            f"{learnt:.0%} are learnt; {self._whose(tokenizer)}"
        )
        if own is None and found.kind == "chat":
            thinking = "with" if tokenizer.chat_template == template(True) else "without"
            report.note(
                "template", f"minigpt's own, {thinking} think blocks; -t MODEL shows what a model's own template writes"
            )
        for (row, _), one in zip(good[: self.cfg.rows], rendered, strict=False):
            report.out(f"\n{row.where}: {len(one.ids):,} tokens, {sum(one.mask):,} learnt")
            report.marked(cut(spans(tokenizer, one)))
        samples = [
            {
                "where": row.where,
                "ids": one.ids,
                "learnt": one.mask,
                "text": tokenizer.decode(one.ids, skip_special=False),
            }
            for (row, _), one in zip(good[: self.cfg.rows], rendered, strict=False)
        ]
        facts = {"tokens": tokens, "exact": not exact, "vocab_size": tokenizer.vocab_size, "samples": samples}
        return found.facts() | facts

    def _own(self, records: list[Record]) -> Tokenizer:
        """A tokenizer of the size that pretraining would choose, trained on the rows that were read."""
        from minigpt.core.data.formats import texts
        from minigpt.core.data.reader import text_size
        from minigpt.core.data.tokenizer import Tokenizer, suggested_vocab

        words = (text for record in records for text in texts(record) if text)
        return Tokenizer.train(words, suggested_vocab(text_size(self.source.path)))

    def _whose(self, tokenizer: Tokenizer) -> str:
        name = self.cfg.tokenizer or f"trained on up to {SAMPLE:,} rows of it"
        return f"{tokenizer.vocab_size:,} tokens in the vocabulary ({name})"


def give_template(tokenizer: Tokenizer, records: list[Record]) -> None:
    """A tokenizer gets our chat template, with think blocks when a record has reasoning."""
    from minigpt.core.data.chat import template
    from minigpt.core.data.schema import Conversation

    talks = [record for record in records if isinstance(record, Conversation)]
    tokenizer.chat_template = template(any(m.get("reasoning_content") for talk in talks for m in talk.messages))


def as_tokens(tokenizer: Tokenizer, record: Record, kind: str) -> Rendered:
    """A record's ids and what of them is learnt, as a store of this kind holds them."""
    from minigpt.core.data.chat import Rendered, render
    from minigpt.core.data.schema import Document

    if isinstance(record, Document):
        ids = [tokenizer.opening_id, *tokenizer.encode(record.text), tokenizer.document_id]
        return Rendered(ids, [False] + [True] * (len(ids) - 1))
    ids, mask = render(tokenizer, record.messages, record.tools or None)
    return Rendered(ids, mask if kind == "chat" else [False] + [True] * (len(ids) - 1))


def spans(tokenizer: Tokenizer, rendered: Rendered) -> list[tuple[str, bool]]:
    """Text in stretches that are learnt or not. Stretches are decoded whole, so that no character is halved."""
    return [
        (shown(tokenizer, [id for id, _ in stretch]), learnt)
        for learnt, stretch in itertools.groupby(
            zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1]
        )
    ]


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text in which letters that spell a token, and are none, stand behind a backslash: `\\<|endoftext|>`."""
    text = tokenizer.decode(ids, skip_special=False)
    if all(text.count(name) == ids.count(id) for name, id in tokenizer.added.items() if name in text):
        return text
    pieces = []
    for control, run in itertools.groupby(ids, key=lambda id: id in tokenizer.special_ids):
        piece = tokenizer.decode(list(run), skip_special=False)
        if not control:
            for name in tokenizer.added:
                piece = piece.replace(name, f"\\{name}")
        pieces.append(piece)
    return "".join(pieces)


def cut(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The parts, shortened in their middles so that what is learnt stays in sight, and SHOWN characters in all."""
    kept: list[tuple[str, bool]] = []
    left = SHOWN
    for text, learnt in parts:
        if left <= 0:
            return [*kept, (" …", False)]
        if len(text) > MIDDLE:
            text = f"{text[: MIDDLE * 2 // 3]} … {text[-MIDDLE // 3 :]}"
        kept.append((text, learnt))
        left -= len(text)
    text, learnt = kept[-1]
    return [*kept[:-1], (text.rstrip("\n"), learnt)]


# ---------------------------------------------------------------------------------------------- demo


def demo(cfg: DemoConfig, context: Context) -> Result:
    """Every part of the sample as a file. The result is the directory."""
    from minigpt.core.data import sample
    from minigpt.core.files import write_atomic

    if not cfg.out:
        raise UsageError("data demo needs --out", fix="minigpt data demo -o demo")
    out = Path(cfg.out)
    paths = {part: out / f"{part}.jsonl" for part in sample.PARTS}
    present = [path for path in paths.values() if path.exists()]
    if present and not cfg.overwrite:
        raise UsageError(
            f"{present[0]} already exists", fix="choose another --out, or replace the files with --overwrite"
        )
    counts: dict[str, int] = {}
    for part, path in paths.items():
        text = sample.jsonl(part, cfg.lang, cfg.seed)
        write_atomic(path, text)
        counts[part] = text.count("\n")
        context.report.note("wrote", f"{path}: {counts[part]:,} rows, {sample.PARTS[part][1]}")
    context.report.note(
        "next", f"minigpt data preview {quoted(paths['chat'])}      minigpt pretrain -d {quoted(paths['text'])}"
    )
    return Result(str(out), {"directory": str(out), "rows": counts})


VERBS: dict[str, Verb] = {
    "demo": Verb(
        DemoConfig,
        demo,
        "Write out the data set that comes with minigpt.",
        (
            "minigpt data demo -o demo",
            "minigpt data demo -o demo-zh --lang zh",
            "minigpt data demo -o demo --seed 1 --overwrite",
        ),
    ),
    "preview": Verb(
        PreviewConfig,
        preview,
        "Show what a file holds and what a model would learn from it.",
        (
            "minigpt data preview chats.jsonl",
            "minigpt data preview poems.jsonl -n 5 -t runs/poems",
            "zcat big.jsonl.gz | head -1000 | minigpt data preview -",
        ),
    ),
    "check": Verb(
        CheckConfig,
        check,
        "Find every row that cannot be trained on.",
        (
            "minigpt data check chats.jsonl",
            "minigpt data check data/ --limit 0 > bad-rows.txt",
            "minigpt data check chats.jsonl -t runs/chat --json | jq .files",
        ),
    ),
}
