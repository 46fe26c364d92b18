"""The registry: one line a command. A stage module holds a `Config` dataclass, `run(cfg, context) -> Result`,
`EXAMPLES`, and as its docstring's first line the help text shown here; one with verbs holds `VERBS` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minigpt.core.report import Context, Result

STAGES: dict[str, tuple[str, str]] = {
    # command: (module, one-line help, equal to the module's docstring)
    "quickstart": ("quickstart", "Train a small model that answers, from nothing, within five minutes."),
    "tokenize": ("tokenize", "Train a tokenizer, pack data with it, or look at what it does."),
    "pretrain": ("pretrain", "Train a language model from scratch on text."),
    "sft": ("sft", "Fine-tune a model on conversations."),
    "generate": ("generate", "Complete prompts from the command line, a file or a pipe."),
    "chat": ("chat", "Talk with a model."),
    "convert": ("convert", "Write a model for other programs: Hugging Face, llama.cpp, MiniMind."),
    "eval": ("evaluate", "Measure loss and bits per byte, or how many answers are right."),
    "data": ("data", "Look at data and check it before training."),
    "plot": ("plot", "Draw the curves of one run or several."),
    "doctor": ("doctor", "Look at this machine and say what to run on it."),
    "info": ("info", "Describe a model, run, tokenizer or data store; list runs."),
}


class Verb(NamedTuple):
    """One verb of a command that has several, such as `tokenize train`. A stage's `VERBS` maps names to these."""

    config: type  # the dataclass of its options
    run: Callable[[Any, Context], Result]  # takes an object of that class
    help: str
    examples: tuple[str, ...]
