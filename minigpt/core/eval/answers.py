"""Whether a model answers questions rightly: it is asked, and its answer is searched for the one that is known.

A row is a conversation whose last message is the model answer, with more keys: `answer`, the text to look for, and
optionally `kind`, under which it is counted, and `where`, the row's place, for errors. `minigpt data demo` writes such
rows (`eval.jsonl`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt.core.data.chat import render
from minigpt.core.errors import DataError
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.request import Completion
from minigpt.core.infer.sampling import SamplingParams
from minigpt.core.report import Report

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass
class Count:
    """Answers of one kind."""

    asked: int = 0
    right: int = 0
    stopped: int = 0  # ended by themselves, not by the limit of tokens

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    @property
    def stops(self) -> float:
        return self.stopped / self.asked if self.asked else 0.0

    def figures(self) -> dict[str, Any]:
        return {"asked": self.asked, "right": self.right, "accuracy": self.accuracy, "stops": self.stops}


@dataclass
class Answers(Count):
    """The whole, its parts by kind, and what was said to each question in the order of the rows."""

    by_kind: dict[str, Count] = field(default_factory=dict)
    said: list[Completion] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def ask(
    engine: Engine, rows: Sequence[dict[str, Any]], params: SamplingParams, report: Report | None = None
) -> Answers:
    """Put every row's conversation, without its last message, to the model and count what comes back.

    Raises the errors of rendering and generating.
    """
    found = Answers()
    prompts = [_prompt(engine, row) for row in rows]
    with (report or Report()).progress(len(rows), label="asked") as bar:
        said = engine.generate(prompts, params, progress=bar.update)
    for row, completion in zip(rows, said, strict=True):
        _count(found, row, completion)
    return found


def _prompt(engine: Engine, row: dict[str, Any]) -> list[int]:
    try:
        return render(engine.tokenizer, row["messages"][:-1], tools=row.get("tools"), generation_prompt=True).ids
    except DataError as e:
        where = f"{row['where']}: " if "where" in row else ""
        raise DataError(f"{where}{e.message}", found=e.found, fix=e.fix) from None


def _count(found: Answers, row: dict[str, Any], completion: Completion) -> None:
    right = is_right(row["answer"], completion.text)
    stopped = completion.finish_reason == "stop"
    for count in (found, found.by_kind.setdefault(row.get("kind", "all"), Count())):
        count.asked += 1
        count.right += right
        count.stopped += stopped
    found.said.append(completion)
    found.correct.append(right)


def is_right(answer: str, said: str) -> bool:
    """Whether `said` gives `answer`: as its last number if the answer is one, else as words somewhere in it.

    Letter case does not matter. Words are whole where the script has borders: `rome` is not in `chrome`.
    """
    if NUMBER.fullmatch(answer):
        return NUMBER.findall(said)[-1:] == [answer]
    words = re.escape(answer.casefold())
    left, right = (r"\b" if answer[i : i + 1].isascii() and answer[i].isalnum() else "" for i in (0, len(answer) - 1))
    return re.search(left + words + right, said.casefold()) is not None


def kinds(counts: Iterable[tuple[str, Count]]) -> list[str]:
    """A line a kind: how many were right."""
    return [f"{kind:<15} {c.right:>5,} of {c.asked:>5,}   {c.accuracy:6.1%}" for kind, c in counts]
