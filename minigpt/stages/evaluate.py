"""Measure loss, perplexity and bits per byte."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt.core.config import group, opt
from minigpt.core.errors import UsageError
from minigpt.core.groups import CommonConfig, DeviceConfig
from minigpt.core.report import Context, Result

EXAMPLES = (
    "minigpt eval -m runs/poems -d held-out.jsonl",
    "minigpt eval -m runs/chat -d alpaca.json --json | jq .metrics.loss",
    "minigpt eval -m runs/poems -d book.txt --max-len 2048",
)


@dataclass
class Config:
    model: str | None = opt(None, "run, step or Hugging Face directory", short="-m", panel="Model", metavar="PATH")
    data: list[str] = opt([], "file, directory, glob or -", short="-d", panel="Data", metavar="PATH")
    kind: str = opt(
        "auto",
        "text scores every token, chat the answers only; auto = chat for a chat model",
        panel="Data",
        choices=("auto", "text", "chat"),
    )
    max_len: int | None = opt(None, "tokens a row", panel="Data", low=2, shown="the model's context, up to 2,048")
    max_bad: str = opt("0", "bad rows to skip and count before giving up, as a number or 1%", panel="Data")
    rows: int = opt(1000, "most rows to read", panel="Data", low=1)
    batch_size: int = opt(8, "rows computed at once", panel="Run", low=1, advanced=True)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Score a model on documents it has not seen. The table goes to stdout."""
    if cfg.model is None or not cfg.data:
        raise UsageError("eval needs a model and data", fix="minigpt eval -m runs/poems -d held-out.jsonl")
    from minigpt.core.data import store
    from minigpt.core.data.source import eval_batches
    from minigpt.core.eval.harness import evaluate, length_label
    from minigpt.core.infer.model import load

    model = load(cfg.model, cfg.device.device, cfg.device.dtype)
    kind = cfg.kind if cfg.kind != "auto" else ("chat" if model.is_chat else "text")
    data = store.build(cfg.data, model.tokenizer, kind=kind, val_share=0.0, max_bad=cfg.max_bad, report=context.report)
    max_len = cfg.max_len or min(model.decoder.config.max_position_embeddings, 2048)
    batches = eval_batches(
        data,
        max_len=max_len,
        max_rows=cfg.rows,
        micro_rows=cfg.batch_size,
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
