"""A command of the tests' own: every kind of option, and a `run` that each test may replace."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from minigpt.core.config import duration, group, opt
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Result
from minigpt.stages import STAGES, Verb


@dataclass
class Inner:
    lr: float | None = opt(None, "peak rate", panel="Optimisation", low=0.0, shown="auto")
    batch_size: int = opt(8, "rows at once", panel="Optimisation", low=1)


@dataclass
class DemoConfig:
    words: list[str] = opt([], "words to say", argument=True, metavar="WORD")
    size: str = opt("1m", "model size", panel="Model", choices=("1m", "3m"))
    max_len: int | None = opt(None, "tokens a row", panel="Data", shown="by size")
    data: list[str] = opt([], "files", short="-d", panel="Data", metavar="PATH")
    shape: str = opt("cosine", "how it falls", panel="Optimisation", choices=("cosine", "linear"))
    think: bool | None = opt(None, "think first", panel="Sampling")
    pause: float | None = opt(None, "seconds to wait", parse=duration, advanced=True)
    out: str | None = opt(None, "run directory", short="-o", save=False)
    inner: Inner = group(Inner)
    common: CommonConfig = group(CommonConfig)


@dataclass
class VerbConfig:
    path: str = opt(None, "what to look at", argument=True, metavar="PATH")
    common: CommonConfig = group(CommonConfig)


@dataclass
class Demo:
    """run: what `minigpt demo` does. seen: the config and context it was last given."""

    run: Callable[[Any, Context], Result]
    seen: tuple[Any, Context] | None = None


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Demo]:
    """Registers `minigpt demo` and `minigpt pair one|two`."""
    state = Demo(lambda cfg, context: Result("done", {"answer": 42}))

    def run(cfg: Any, context: Context) -> Result:
        state.seen = (cfg, context)
        return state.run(cfg, context)

    module: Any = types.ModuleType("minigpt.stages.demo")
    module.Config, module.run, module.EXAMPLES = DemoConfig, run, ("minigpt demo a", "minigpt demo b", "minigpt demo c")
    pair: Any = types.ModuleType("minigpt.stages.pair")
    pair.VERBS = {v: Verb(VerbConfig, run, f"Look {v}.", (f"minigpt pair {v} x",)) for v in ("one", "two")}
    for name, made in (("demo", module), ("pair", pair)):
        monkeypatch.setitem(sys.modules, f"minigpt.stages.{name}", made)
        monkeypatch.setitem(STAGES, name, (name, f"A {name} for tests."))
    yield state
