"""Talk with a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt.core.config import group, opt
from minigpt.core.errors import UsageError
from minigpt.core.groups import CommonConfig, DeviceConfig, SampleConfig
from minigpt.core.report import Context, Report, Result

if TYPE_CHECKING:
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import Model

EXAMPLES = (
    "minigpt chat -m runs/chat",
    "minigpt chat -m runs/chat -p 'What is the capital of France?'",
    "echo 你好 | minigpt chat -m runs/chat --temperature 0",
)


@dataclass
class Config:
    model: str | None = opt(None, "run, step or Hugging Face directory", short="-m", panel="Model", metavar="PATH")
    prompt: str | None = opt(None, "ask this once and end", short="-p", panel="Data", metavar="TEXT")
    system: str | None = opt(None, "system message", panel="Data", metavar="TEXT")
    sample: SampleConfig = group(SampleConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Read messages from the terminal or a pipe; answers stream to stdout. /reset forgets, /exit or Ctrl-D ends."""
    if cfg.model is None:
        raise UsageError("chat needs a model", fix="name one with --model, such as -m runs/chat")
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import load

    model = load(cfg.model, cfg.device.device, cfg.device.dtype)
    report = context.report
    if not model.is_chat:
        report.warn(
            f"{model.path} is a base model: it continues your text instead of answering",
            fix=f"to make it answer: minigpt sft -m {model.path} -d conversations.jsonl",
        )
    chat = Conversation(Engine(model.decoder, model.tokenizer), model, cfg)
    if cfg.prompt is not None:
        chat.ask(cfg.prompt, report)
    else:
        converse(chat, report)
    return Result(data={"model": str(model.path), "messages": chat.messages})


def converse(chat: Conversation, report: Report) -> None:
    person = sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is not None and not person:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    if person:
        report.note("chat", "/reset forgets, /exit or Ctrl-D ends")
    while True:
        try:
            if person:
                print("you › ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except KeyboardInterrupt:
            break
        if not line or line.strip() == "/exit":
            break
        text = line.strip()
        if text == "/reset":
            chat.reset()
        elif text:
            chat.ask(text, report)


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(self, engine: Engine, model: Model, cfg: Config):
        self.engine = engine
        self.model = model
        self.cfg = cfg
        self.turns = 0
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        if self.cfg.system:
            self.messages.append({"role": "system", "content": self.cfg.system})

    def ask(self, text: str, report: Report) -> None:
        """Stream the answer to `text` to stdout and remember both. Ctrl-C ends the answer, not the program."""
        from minigpt.stages.generate import sampling

        self.messages.append({"role": "user", "content": text})
        ids = self._fitting(text, report)
        if ids is None:
            return
        answer = []
        quiet = report.json
        try:
            for piece in self.engine.stream(ids, sampling(self.cfg.sample, self.cfg.device.seed + self.turns)):
                answer.append(piece)
                if not quiet:
                    report.out(piece, end="")
        except KeyboardInterrupt:
            pass
        if not quiet:
            report.out("")
        self.turns += 1
        self.messages.append(remembered("".join(answer)))

    def _fitting(self, text: str, report: Report) -> list[int] | None:
        """The prompt; of a conversation that has outgrown the context the oldest turns are forgotten, aloud."""
        context = self.model.decoder.config.max_position_embeddings
        dropped = 0
        while len(ids := self._prompt(text)) >= context:
            first = next((i for i, m in enumerate(self.messages[:-1]) if m["role"] != "system"), None)
            if first is None or not self.model.is_chat:
                report.warn(f"this message has {len(ids):,} tokens, more than the context of {context:,}: left out")
                self.messages.pop()
                return None
            del self.messages[first]
            dropped += 1
        if dropped:
            report.warn(f"the conversation has outgrown the context: the oldest {dropped} messages are forgotten")
        return ids

    def _prompt(self, text: str) -> list[int]:
        """The whole conversation for a chat model, the text alone for a base model."""
        from minigpt.core.data.chat import render

        tokenizer = self.model.tokenizer
        if not self.model.is_chat:
            return [tokenizer.document_id, *tokenizer.encode(text)]
        return render(tokenizer, self.messages, generation_prompt=True, thinking=self.cfg.sample.think).ids


def remembered(answer: str) -> dict[str, Any]:
    """An answer as the chat template knows it: what was thought apart from what was said."""
    thought, mark, said = answer.partition("</think>")
    if not mark:
        return {"role": "assistant", "content": answer}
    reasoning = thought.removeprefix("<think>").strip("\n")
    return {"role": "assistant", "content": said.lstrip("\n"), "reasoning_content": reasoning}
