"""Complete prompts from the command line, a file or a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, UsageError
from minigpt.core.groups import CommonConfig, DeviceConfig, SampleConfig
from minigpt.core.report import Context, Result

if TYPE_CHECKING:
    from minigpt.core.infer.engine import Completion, Engine
    from minigpt.core.infer.model import Model

EXAMPLES = (
    "minigpt generate -m runs/poems -p 春風 --max-tokens 60",
    "minigpt generate -m runs/chat < questions.txt > answers.jsonl",
    "minigpt generate -m runs/chat -p 'Name three colours.' --n 3 | jq -r .text",
)


@dataclass
class Config:
    model: str | None = opt(None, "run, step or Hugging Face directory", short="-m", panel="Model", metavar="PATH")
    prompt: list[str] = opt(
        [],
        "prompt; - reads lines or JSONL ({prompt} or {messages}) from stdin, which is also the default in a pipe",
        short="-p",
        panel="Data",
        metavar="TEXT",
    )
    raw: bool = opt(False, "complete the text as it is, even with a chat model", panel="Data")
    n: int = opt(1, "answers a prompt", panel="Sampling", low=1)
    batch_size: int = opt(8, "prompts answered at once", panel="Run", low=1, advanced=True)
    sample: SampleConfig = group(SampleConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """One JSON line a completion on stdout, in the order of the prompts: prompt, text, tokens, finish_reason."""
    if cfg.model is None:
        raise UsageError("generate needs a model", fix="name one with --model, such as -m runs/poems")
    from_stdin = "-" in cfg.prompt or (not cfg.prompt and sys.stdin is not None and not sys.stdin.isatty())
    if not cfg.prompt and not from_stdin:
        raise UsageError("generate needs a prompt", fix="give --prompt TEXT, or pipe lines into it")

    from minigpt.core.convert.open import open_model
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import load

    model = load(open_model(cfg.model, context.report).path, cfg.device.device, cfg.device.dtype)
    engine = Engine(model.decoder, model.tokenizer)
    count, kept = 0, []
    for batch in batches(cfg, from_stdin):
        for row in answers(engine, model, batch, cfg):
            count += 1
            if cfg.common.json:
                kept.append(row)
            else:
                context.report.out(json.dumps(row, ensure_ascii=False))
    return Result(data={"model": str(model.path), "count": count, "completions": kept})


def batches(cfg: Config, from_stdin: bool) -> Iterator[list[dict[str, Any]]]:
    """Prompt rows in groups: those of the command line first, then stdin's as they arrive."""
    given = [{"prompt": p, "where": "--prompt"} for p in cfg.prompt if p != "-"]
    for i in range(0, len(given), cfg.batch_size):
        yield given[i : i + cfg.batch_size]
    if not from_stdin:
        return
    number = 0
    for lines in arriving_lines(sys.stdin, cfg.batch_size):
        rows = []
        for line in lines:
            number += 1
            if line.strip():
                rows.append({**parse_line(line, number), "where": f"stdin:{number}"})
        if rows:
            yield rows


def parse_line(line: str, number: int) -> dict[str, Any]:
    """A JSON object with `prompt` or `messages`, a JSON string, or plain text."""
    text = line.rstrip("\r\n")
    if not text.lstrip().startswith(("{", '"')):
        return {"prompt": text}
    try:
        row = json.loads(text)
    except ValueError:
        return {"prompt": text}  # a prompt may begin with a brace or a quotation mark
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row.get("prompt"), str) or "messages" in row:
        return row
    raise DataError(
        f"stdin:{number} has neither a `prompt` text nor a `messages` list", found=text, fix='write {"prompt": "…"}'
    )


def arriving_lines(stream: IO[str], most: int) -> Iterator[list[str]]:
    """Lines of a pipe in groups of up to `most`, as they arrive: the first is answered before a second is awaited."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # not a real file: text given to us in process
        lines = list(stream)
        yield from (lines[i : i + most] for i in range(0, len(lines), most))
        return
    rest = b""
    while block := os.read(handle, 1 << 16):
        *complete, rest = (rest + block).split(b"\n")
        texts = [line.decode("utf-8", errors="replace") for line in complete]
        yield from (texts[i : i + most] for i in range(0, len(texts), most))
    if rest:
        yield [rest.decode("utf-8", errors="replace")]


def prompt_ids(model: Model, row: dict[str, Any], cfg: Config) -> list[int]:
    """Token ids of one prompt row: the chat template for a chat model, else a document's beginning."""
    from minigpt.core.data.chat import render
    from minigpt.core.data.formats import prompt_messages
    from minigpt.core.data.schema import BadRow

    tokenizer, where = model.tokenizer, row["where"]
    if "messages" in row or (model.is_chat and not cfg.raw):
        if not model.is_chat:
            raise UsageError(f"{model.path} has no chat template, so it cannot read messages", fix="give it prompts")
        asked = row if "messages" in row else {"messages": [{"role": "user", "content": row["prompt"]}]}
        try:
            record = prompt_messages(asked)
        except BadRow as fault:
            raise DataError(f"{where} has {fault.reason}{fault.detail}", found=str(asked), fix=fault.fix) from None
        ids = render(tokenizer, record.messages, record.tools, generation_prompt=True, thinking=cfg.sample.think).ids
    else:
        ids = [tokenizer.opening_id, *tokenizer.encode(row["prompt"])]
    context = model.decoder.config.max_position_embeddings
    if len(ids) >= context:
        raise DataError(
            f"{where} has {len(ids):,} tokens, and the model's context is {context:,}", fix="shorten this prompt"
        )
    return ids


def answers(engine: Engine, model: Model, rows: list[dict[str, Any]], cfg: Config) -> Iterator[dict[str, Any]]:
    """Completions of one group of prompt rows, as output rows. The rows before a faulty one are answered first."""
    ids, fault = [], None
    for row in rows:
        try:
            ids.append(prompt_ids(model, row, cfg))
        except DataError as e:
            fault = e
            break
    done: list[Completion] = engine.generate(ids, sampling(cfg.sample, cfg.device.seed), n=cfg.n)
    for completion in done:
        row = rows[completion.prompt_index]
        shown = {"messages": row["messages"]} if "messages" in row else {"prompt": row["prompt"]}
        yield {
            **shown,
            "text": completion.text,
            "tokens": len(completion.ids),
            "finish_reason": completion.finish_reason,
        }
    if fault is not None:
        raise fault


def sampling(cfg: SampleConfig, seed: int) -> Any:
    """The sampling flags as the engine's parameters."""
    from minigpt.core.infer.sampling import SamplingParams

    return SamplingParams(
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        stop=tuple(cfg.stop),
        seed=seed,
    )
