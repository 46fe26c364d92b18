"""The run directory of a process that does not lead: it is read, and never written."""

from __future__ import annotations

from typing import Any

from minigpt.core.train.run import Run


class Onlooker(Run):
    """Everything that a Run writes, rank 0 writes."""

    def start(self, config: str, info: dict[str, Any]) -> None: ...

    def finish(self, status: str, **facts: Any) -> None: ...

    def abandon(self) -> None: ...

    def event(self, kind: str, text: str, step: int | None = None) -> None: ...

    def log(self, row: dict[str, Any], name: str = "metrics") -> None: ...

    def sync_logs(self) -> None: ...

    def cut_logs(self, step: int) -> None: ...
