"""Measure loss and bits per byte, or how many answers are right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, UsageError
from minigpt.core.groups import CommonConfig, DeviceConfig, LoadConfig
from minigpt.core.report import Context, Result
from minigpt.stages.loading import load_model, model_option

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model

EXAMPLES = (
    "minigpt eval -m runs/poems -d held-out.jsonl",
    "minigpt eval -m runs/chat -d alpaca.json --json | jq .metrics.loss",
    "minigpt eval -m runs/chat -d sample:eval --answers",
)
WRONG = 5  # answers that are shown


@dataclass
class Config:
    model: str | None = model_option()
    data: list[str] = opt([], "file, directory, glob or -", short="-d", panel="Data", metavar="PATH")
    kind: str = opt(
        "auto",
        "text scores every token, chat the answers only; auto = chat for a chat model",
        panel="Data",
        choices=("auto", "text", "chat"),
    )
    answers: bool = opt(
        False, "ask each question greedily and look for its `answer` in what comes back; no loss", panel="Data"
    )
    max_tokens: int = opt(64, "most tokens of an answer, with --answers", panel="Run", low=1)
    max_len: int | None = opt(None, "tokens a row", panel="Data", low=2, shown="the model's context, up to 2,048")
    max_bad: str = opt("0", "bad rows to skip and count before giving up, as a number or 1%", panel="Data")
    rows: int = opt(1000, "most rows to read", panel="Data", low=1)
    batch_size: int | None = opt(
        None, "rows computed at once", panel="Run", low=1, shown="8, or 64 with --answers", advanced=True
    )
    load: LoadConfig = group(LoadConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Score a model on what it has not seen. The table goes to stdout."""
    if cfg.model is None or not cfg.data:
        raise UsageError("eval needs a model and data", fix="minigpt eval -m runs/poems -d held-out.jsonl")
    if cfg.load.compile and not cfg.answers:
        raise UsageError("--compile is for answers", fix="add --answers, or leave it out")
    from minigpt.core.convert.open import open_model

    path = open_model(cfg.model, context.report).path
    model = load_model(path, cfg.load, cfg.device, context.report)
    return answered(cfg, context, model) if cfg.answers else predicted(cfg, context, model)


def predicted(cfg: Config, context: Context, model: Model) -> Result:
    """Loss, perplexity and bits per byte, whole and by document length."""
    from minigpt.core.data import store
    from minigpt.core.data.source import eval_batches
    from minigpt.core.eval.harness import evaluate, length_label
    from minigpt.core.infer.request import not_numbers

    kind = cfg.kind if cfg.kind != "auto" else ("chat" if model.is_chat else "text")
    data = store.build(cfg.data, model.tokenizer, kind=kind, val_share=0.0, max_bad=cfg.max_bad, report=context.report)
    for note in data.notes:
        context.report.warn(note)
    max_len = cfg.max_len or min(model.decoder.config.max_position_embeddings, 2048)
    batches = eval_batches(
        data,
        max_len=max_len,
        max_rows=cfg.rows,
        micro_rows=cfg.batch_size or 8,
        pad_id=model.tokenizer.pad_id,
        split="all",
    )
    with context.report.progress(None, label="eval") as bar:
        seen = 0

        def counted():  # type: ignore[no-untyped-def]
            nonlocal seen
            for batch in batches:
                yield batch
                seen += len(batch.input_ids)
                bar.update(seen, f"{seen} rows")

        scores = evaluate(model.decoder, counted(), model.tokenizer.token_bytes, model.runtime.device)
    if not math.isfinite(scores.loss):
        raise not_numbers()
    lines = [
        f"loss            {scores.loss:.4f} nats a token",
        f"perplexity      {scores.perplexity:.2f}",
        f"bits per byte   {scores.bits_per_byte:.4f}",
        f"tokens          {scores.tokens:,} in {scores.documents:,} documents",
        "",
        "length          documents      loss   bits/byte",
    ]
    lengths = {}
    for edge in sorted(scores.by_length):
        part = scores.by_length[edge]
        lengths[length_label(edge)] = part.figures()
        lines.append(f"{length_label(edge):<15} {part.documents:>9,} {part.loss:>9.4f} {part.bits_per_byte:>11.4f}")
    metrics = {**scores.figures(), "kind": kind, "by_length": lengths}
    return Result("\n".join(lines), {"model": str(model.path), "metrics": metrics})


def answered(cfg: Config, context: Context, model: Model) -> Result:
    """How many questions are answered rightly, by kind, and the first wrong answers."""
    from minigpt.core.eval.answers import ask, kinds
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.sampling import SamplingParams

    if not model.is_chat:
        raise UsageError(f"--answers asks a chat model, and {model.path} is a base model", fix="fine-tune it with sft")
    rows = questions(cfg.data, cfg.rows)
    engine = Engine(model, rows=cfg.batch_size or 64, compile=cfg.load.compile)
    found = ask(engine, rows, SamplingParams(max_tokens=cfg.max_tokens, temperature=0), context.report)
    asked = [
        {"question": row["messages"][-2]["content"], "answer": row["answer"], "said": c.text, "right": right}
        for row, c, right in zip(rows, found.said, found.correct, strict=True)
    ]
    lines = kinds([*found.by_kind.items(), ("all", found)])
    lines.append(f"{'ended itself':<15} {found.stopped:>5,} of {found.asked:>5,}   {found.stops:6.1%}")
    wrong = [a for a in asked if not a["right"]]
    lines += ["", "wrong answers, the first ones:"] * bool(wrong)
    lines += [f"  {a['question']} → {a['said']}   (not {a['answer']})" for a in wrong[:WRONG]]
    metrics = {**found.figures(), "by_kind": {kind: count.figures() for kind, count in found.by_kind.items()}}
    return Result("\n".join(lines), {"model": str(model.path), "metrics": metrics, "asked": asked})


def questions(specs: list[str], most: int) -> list[dict[str, Any]]:
    """Conversations with a known answer. DataError names the first row that has none."""
    from minigpt.core.data import reader

    found: list[dict[str, Any]] = []
    for source in reader.expand(specs):
        for row in reader.rows(source):
            value = row.value
            messages = value.get("messages") if isinstance(value, dict) else None
            if not isinstance(messages, list) or len(messages) < 2 or not isinstance(value.get("answer"), str):
                raise DataError(
                    f"{row.where}: no question with a known answer",
                    found=str(value)[:200],
                    fix='--answers reads rows such as {"messages": [question, answer], "answer": "Paris"}',
                )
            found.append({**value, "where": row.where})
            if len(found) == most:
                return found
    if not found:
        raise DataError("there is no question in the data", fix="name other --data")
    return found
