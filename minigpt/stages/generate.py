"""Complete prompts from the command line, a file or a pipe."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, MinigptError, UsageError
from minigpt.core.groups import CommonConfig, DeviceConfig, LoadConfig, SampleConfig
from minigpt.core.report import Context, Report, Result
from minigpt.stages import prompts
from minigpt.stages.loading import load_model, model_option, sample_as_its_makers

if TYPE_CHECKING:
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import Model
    from minigpt.core.infer.request import Request
    from minigpt.core.infer.sampling import SamplingParams

EXAMPLES = (
    "minigpt generate -m runs/poems -p 春風 --max-tokens 60",
    "minigpt generate -m runs/chat < questions.txt > answers.jsonl",
    "minigpt generate -m runs/chat -p 'Name three colours.' --n 3 | jq -r .text",
)


@dataclass
class Config:
    model: str | None = model_option()
    prompt: list[str] = opt(
        [],
        "prompt; - reads lines or JSONL ({prompt} or {messages}) from stdin, which is also the default in a pipe",
        short="-p",
        panel="Data",
        metavar="TEXT",
    )
    raw: bool = opt(False, "complete the text as it is, even with a chat model", panel="Data")
    control: bool = opt(False, "read special tokens in the text as such; else they are ordinary text", panel="Data")
    n: int = opt(1, "answers a prompt", panel="Sampling", low=1)
    batch_size: int = opt(32, "answers made at once", panel="Run", low=1, advanced=True)
    load: LoadConfig = group(LoadConfig)
    sample: SampleConfig = group(SampleConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """One JSON line an answer on stdout, in the order of the prompts: prompt, text, tokens, finish_reason.

    A prompt without an answer has an `error` instead; the others are answered, and the exit code is the first one's.
    """
    if cfg.model is None:
        raise UsageError("generate needs a model", fix="name one with --model, such as -m runs/poems")
    from_stdin = "-" in cfg.prompt or (not cfg.prompt and sys.stdin is not None and not sys.stdin.isatty())
    if not cfg.prompt and not from_stdin:
        raise UsageError("generate needs a prompt", fix="give --prompt TEXT, or pipe lines into it")

    from minigpt.core.convert.open import open_model
    from minigpt.core.infer.engine import Engine

    report = context.report
    path = open_model(cfg.model, report).path
    sample_as_its_makers(cfg.sample, context.origins, path, report)
    model = load_model(path, cfg.load, cfg.device, report)
    engine = Engine(model, rows=cfg.batch_size, compile=cfg.load.compile)
    asked = _Asked(engine, model, cfg, sys.stdin if from_stdin else None, report)
    count, tokens, kept = 0, 0, []
    with report.progress(None if from_stdin else len(cfg.prompt) * cfg.n, label="answers") as bar:
        for request in engine.ended(asked):
            row = asked.answered(request)
            count, tokens = count + 1, tokens + row.get("tokens", 0)
            if cfg.common.json:
                kept.append(row)
            else:
                report.out(json.dumps(row, ensure_ascii=False))
            bar.update(count, f"{tokens:,} tokens")
    if count == 0:
        raise UsageError("stdin is empty, so there is no prompt", fix="give --prompt TEXT, or pipe lines into it")
    data = {"model": str(model.path), "count": count, "completions": kept}
    if asked.faults:
        first, failed = asked.faults[0], len(asked.faults)
        if count > 1:
            first.message += f" ({failed:,} of {count:,} answers failed; the others are there)"
        first.data = {**first.data, **data}
        raise first
    return Result(data=data)


class _Asked:
    """Prompt rows as requests, in order. faults: of those that got no answer, in the order of the answers."""

    def __init__(self, engine: Engine, model: Model, cfg: Config, stream: Any, report: Report):
        self.engine, self.model, self.cfg, self.stream, self.report = engine, model, cfg, stream, report
        self.params = sampling(cfg.sample, cfg.device.seed)
        self.rows: deque[prompts.Row] = deque()  # one for each request that has not been handed over
        self.faults: list[MinigptError] = []
        self._spelled = False  # somebody was told that markers are letters

    def __iter__(self) -> Iterator[Request | None]:
        given = [p for p in self.cfg.prompt if p != "-"]
        for row in prompts.rows(given, self.stream, lambda: not self.engine.busy):
            if row is None:
                yield None
                continue
            for request in self._requests(row):
                self.rows.append(row)
                yield request

    def _requests(self, row: prompts.Row) -> list[Request]:
        """As many as answers are asked for; a single one, which has failed, for a row that cannot be asked."""
        cfg = self.cfg
        try:
            ids = prompts.ids(self.model, row, raw=cfg.raw, control=cfg.control, think=cfg.sample.thinks)
            made = [self.engine.request(ids, self.params, number=number) for number in range(cfg.n)]
        except DataError as fault:
            from minigpt.core.infer.request import Request
            from minigpt.core.infer.text import Detokenizer

            return [Request.failed(fault, self.params, Detokenizer(self.model.tokenizer))]
        if not self._spelled and cfg.raw and (marker := prompts.spelled_marker(self.model, row, cfg.control)):
            self._spelled = True
            self.report.warn(
                f"{row['where']} holds {marker}, which is read as letters", fix="add --control to read it as the token"
            )
        return made

    def answered(self, request: Request) -> dict[str, Any]:
        """The next request that has ended as an output row."""
        row = self.rows.popleft()
        shown = {"messages": row["messages"]} if "messages" in row else {"prompt": row["prompt"]}
        try:
            completion = request.completion()
        except MinigptError as fault:
            self.faults.append(fault)
            return {**shown, "error": fault.message}
        return {
            **shown,
            "text": completion.text,
            "tokens": len(completion.ids),
            "finish_reason": completion.finish_reason,
        }


def sampling(cfg: SampleConfig, seed: int) -> SamplingParams:
    """The sampling flags as the engine's parameters."""
    from minigpt.core.infer.sampling import SamplingParams

    form = None
    if cfg.form is not None:
        from minigpt.core.infer.constraint import parse_form

        if cfg.think:
            raise UsageError("--form and --think do not go together: a form holds from the first token")
        form = parse_form(cfg.form)
    return SamplingParams(
        max_tokens=cfg.max_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        presence_penalty=cfg.presence_penalty,
        frequency_penalty=cfg.frequency_penalty,
        stop=tuple(cfg.stop),
        form=form,
        seed=seed,
    )
