"""Trackers: the rows of metrics.jsonl and samples.jsonl, shown by a program of the user's choice while a run goes.

A tracker never holds up a run. Each one works in a thread of its own, behind a queue; one that fails, or falls too far
behind, is told once and gets no more rows. metrics.jsonl has them all in any case.

Its id is kept in run.json, so that a resumed run goes on in the same place. Rows that were sent before a kill and are
trained again do not come twice: tensorboard purges its numbers after the resumed step; the others, and samples, are not
sent again up to the last step that metrics.jsonl had. So a run that goes back on purpose keeps the old ones there.

Sent are numbers under their names in metrics.jsonl, sample texts, and the options. Not sent: options that name a
secret, absolute paths, the host, the command line, the packages, the code.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import os
import queue
import secrets
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minigpt.core.errors import MissingError, UsageError
from minigpt.core.report import Report

Row = dict[str, Any]

PROJECT = "minigpt"
FACTS = ("stage", "parameters", "model_type", "device")  # of run.json, shown beside the options
SECRET = {"key", "password", "secret", "token"}  # words of an option's name
WAITING = 1000  # rows a tracker may be behind
OPEN_SECONDS = 120.0  # more than the 90 after which wandb gives up by itself
CLOSE_SECONDS = 60.0  # to send what is left when the run has ended


@dataclass(frozen=True)
class Start:
    """What a tracker begins with. id: of the earlier session, None in a new run. step: the step that it resumes."""

    run_dir: Path
    config: dict[str, Any]
    id: str | None = None
    step: int = 0


class Adapter(Protocol):
    """One tracker's package. Made and called in one thread, so it may block."""

    id: str  # finds this run again
    where: str  # address or directory, for the user
    rewinds: bool  # takes back numbers after the resumed step

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def samples(self, rows: list[Row], step: int) -> None: ...

    def finish(self, status: str) -> None: ...


# ---------------------------------------------------------------------------------------------- adapters


class TensorBoard:
    """Event files in RUN/tensorboard, written by torch's SummaryWriter: it needs tensorboard and no TensorFlow.

    A resumed run adds a file to the same directory. Its purge_step makes readers drop older numbers from that step on;
    texts they may keep.
    """

    fix = "pip install 'minigpt-lm[tensorboard]'"
    rewinds = True

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self.id = self.where = str(start.run_dir / "tensorboard")
        purge = None if start.id is None else start.step + 1
        self.writer = SummaryWriter(self.where, purge_step=purge, flush_secs=10)
        if start.id is None:
            self.writer.add_text("config", _block(json.dumps(start.config, indent=2, ensure_ascii=False)), 0)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, rows: list[Row], step: int) -> None:
        text = "\n\n---\n\n".join(f"{_block(r['prompt'])}\n\n→\n\n{_block(r['text'])}" for r in rows)
        self.writer.add_text("samples", text, step)

    def finish(self, status: str) -> None:
        self.writer.close()


def _block(text: str) -> str:
    """As Markdown that is shown letter by letter."""
    return textwrap.indent(text, "    ", lambda line: True)


def _tabled(table: Any, rows: list[Row]) -> Any:
    """The samples as a table of wandb's or trackio's, which are made alike."""
    columns = list(rows[0])
    return table(columns=columns, data=[[r[c] for c in columns] for r in rows])


class Wandb:
    """Weights & Biases, by WANDB_MODE online (the default), offline or disabled; files in RUN/wandb.

    A resumed run has the same id with resume="allow", which goes on or, where the server has never seen it, begins.
    Offline each session is a directory of its own; `wandb sync` puts them together by the id.
    """

    fix = "set WANDB_API_KEY, or WANDB_MODE=offline to keep the run on this machine"
    rewinds = False

    def __init__(self, start: Start):
        import wandb

        self.table = wandb.Table
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.run_dir.name,
            id=start.id,
            resume="allow" if start.id else None,
            dir=str(start.run_dir),
            config=start.config,
            allow_val_change=True,  # a longer run has more steps than its first session said
            reinit="create_new",  # leave a run of the calling program alone
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                host="",
                finish_timeout=CLOSE_SECONDS,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self.id = self.run.id
        self.where = (not self.run.offline and self.run.url) or str(Path(self.run.dir).parent)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def samples(self, rows: list[Row], step: int) -> None:
        self.run.log({"samples": _tabled(self.table, rows)}, step=step)

    def finish(self, status: str) -> None:
        self.run.finish(exit_code=int(status == "failed"))


class SwanLab:
    """SwanLab, by SWANLAB_MODE online (the default), offline, local or disabled; files in RUN/swanlog.

    A resumed run has the same id with resume="allow". Offline each session is a directory of its own for `swanlab
    sync`. Made outside the main thread, it leaves the handling of Ctrl-C to us.
    """

    fix = "set SWANLAB_API_KEY, or SWANLAB_MODE=offline to keep the run on this machine"
    rewinds = False

    def __init__(self, start: Start):
        import swanlab

        self.text = swanlab.Text
        unseen = dict.fromkeys(("hardware", "runtime", "requirements", "git", "swanlab", "monitor"), False)
        self.run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=start.run_dir.name,
            id=start.id,
            resume="allow" if start.id else "never",
            log_dir=str(start.run_dir / "swanlog"),
            config=start.config,
            settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}, probe=unseen),
        )
        self.id = self.run.id
        self.where = self.run.url if self.run.mode == "online" else str(self.run.dir)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def samples(self, rows: list[Row], step: int) -> None:
        self.run.log({"samples": [self.text(r["text"], caption=r["prompt"]) for r in rows]}, step=step)

    def finish(self, status: str) -> None:
        if status == "failed":
            self.run.finish(state="crashed", error="run.json says why")
        else:
            self.run.finish(state="success" if status == "done" else "aborted")


class Trackio:
    """trackio, in its own SQLite file below TRACKIO_DIR, or sent to TRACKIO_SPACE_ID or TRACKIO_SERVER_URL.

    A run is found again by its name with resume="allow"; the name ends in a few random letters, for trackio resumes the
    newest run of that name.
    """

    fix = "see what TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say"
    rewinds = False

    def __init__(self, start: Start):
        import trackio

        self.table = trackio.Table
        self.id = start.id or f"{start.run_dir.name}-{secrets.token_hex(3)}"
        self.where = f"trackio show --project {PROJECT}"
        self.run = trackio.init(
            project=PROJECT,
            name=self.id,
            resume="allow" if start.id else "never",
            config=start.config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def samples(self, rows: list[Row], step: int) -> None:
        self.run.log({"samples": _tabled(self.table, rows)}, step=step)

    def finish(self, status: str) -> None:
        self.run.finish()


ADAPTERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab, "trackio": Trackio}
TRACKERS = tuple(ADAPTERS)  # each is also its package and its extra


# ---------------------------------------------------------------------------------------------- for the run


def check(names: Sequence[str]) -> None:
    """Refuse what cannot be tracked, before torch is imported.

    UsageError for an unknown tracker, MissingError (exit 4) for one whose package is not installed.
    """
    for name in names:
        if name not in ADAPTERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--track {name} is not known", fix=f"{hint}choose {', '.join(TRACKERS)}")
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere directory of that name, as wandb leaves one
            raise MissingError(f"--track {name} needs the package {name}", fix=f"pip install 'minigpt-lm[{name}]'")
    local = "swanlab" in names and os.environ.get("SWANLAB_MODE") == "local"
    if local and find_spec("swanboard") is None:  # swanlab itself would go on and write nothing
        raise MissingError("SWANLAB_MODE=local needs the package swanboard", fix="pip install 'swanlab[dashboard]'")


class Tracker:
    """The trackers of one run, or none. Every method returns at once but `finish`."""

    def __init__(self, lanes: Sequence[_Lane] = (), report: Report | None = None):
        self.lanes = list(lanes)
        self.report = report or Report()
        self.ids = {lane.name: lane.adapter.id for lane in lanes}
        self.sent = {lane.name: lane.there for lane in lanes}  # last steps of earlier sessions

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of run.json, by which a resumed run finds its trackers again."""
        return {"trackers": self.ids, "tracked": self.sent} if self.ids else {}

    def log(self, row: Row, step: int) -> None:
        """A row of metrics.jsonl. What is no finite number is left out."""
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)}
        for lane in self.lanes:
            if step > lane.there or lane.adapter.rewinds:
                lane.put(lambda adapter: adapter.log(numbers, step))
        self._tell()

    def samples(self, rows: list[Row], step: int) -> None:
        """Rows of samples.jsonl, as a table or as text."""
        for lane in self.lanes:
            if rows and step > lane.there:
                lane.put(lambda adapter: adapter.samples(rows, step))
        self._tell()

    def finish(self, status: str, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left, for at most `seconds`. status: done, stopped or failed."""
        deadline = time.monotonic() + seconds
        with _talk_aside(self.report):
            for lane in self.lanes:
                lane.close(status)
            for lane in self.lanes:
                lane.thread.join(max(0.0, deadline - time.monotonic()))
        for lane in self.lanes:
            if lane.thread.is_alive():
                lane.fault = lane.fault or f"not everything was sent within {seconds:g} s"
        self._tell()
        self.lanes = []

    def _tell(self) -> None:
        """Say each fault once, in the main thread, where the report lives."""
        for lane in self.lanes:
            if lane.fault and not lane.told:
                lane.told = True
                self.report.warn(f"{lane.name} gets no more rows: {lane.fault}", fix="metrics.jsonl has them all")


def open(
    names: Sequence[str],
    run_dir: Path,
    info: dict[str, Any],
    config: dict[str, Any],
    *,
    report: Report | None = None,
    step: int = 0,
    logged: int = 0,
) -> Tracker:
    """Start the trackers of a run. UsageError, with what to set, for one that does not start.

    info: what run.json is to say, and of an earlier session the `facts` of its Tracker.
    config: options by name, as config.yaml has them.
    step: the step that the run resumes. logged: the last step in metrics.jsonl before its rows after `step` were cut.
    """
    check(names)
    report = report or Report()
    shown = {**public(config), **{k: info[k] for k in FACTS if k in info}}
    ids = info.get("trackers", {})
    # A run that is killed twice may have sent more the first time than its metrics.jsonl still has.
    sent = {name: max(info.get("tracked", {}).get(name, 0), logged) for name in ids}
    tracker = Tracker((), report)
    try:
        for name in dict.fromkeys(names):
            lane = _Lane(name, Start(run_dir, shown, ids.get(name), step), there=sent.get(name, 0))
            with _talk_aside(report):
                lane.open()
            tracker = Tracker([*tracker.lanes, lane], report)
            report.note("track", f"{name}: {lane.adapter.where}")
    except BaseException:
        tracker.finish("failed")
        raise
    # A tracker that rests in this session may come back in a later one.
    tracker.ids, tracker.sent = {**ids, **tracker.ids}, {**sent, **tracker.sent}
    return tracker


def public(config: dict[str, Any]) -> dict[str, Any]:
    """Options as others may see them: no secrets, and of an absolute path only what lies below this directory."""
    return {k: _public_value(v) for k, v in config.items() if not SECRET & set(k.lower().split("_"))}


def _public_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_public_value(v) for v in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    inside = os.path.relpath(value)
    return os.path.basename(value) if inside.startswith(os.pardir) else inside


# ---------------------------------------------------------------------------------------------- one thread each


class _Lane:
    """One tracker at work in its own thread, which no fault leaves and which the end of the process does not await."""

    adapter: Adapter

    def __init__(self, name: str, start: Start, there: int):
        self.name = name
        self.start = start
        self.there = there  # last step that an earlier session sent
        self.fault: str | None = None  # set here or by the thread
        self.told = False
        self._status = "stopped"
        self._opened: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Callable[[Adapter], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)

    def open(self) -> None:
        self.thread.start()
        try:
            error = self._opened.get(timeout=OPEN_SECONDS)
        except queue.Empty:
            error = TimeoutError(f"no answer within {OPEN_SECONDS:g} s")
        if error is not None:
            fix = ADAPTERS[self.name].fix
            raise UsageError(f"--track {self.name} could not start", found=_line(error), fix=fix) from error

    def put(self, job: Callable[[Adapter], None]) -> None:
        """Queue a job for the thread, unless the tracker has failed."""
        if self._jobs.qsize() >= WAITING:
            self.fault = self.fault or f"it is {WAITING:,} rows behind"
        if self.fault is None:
            self._jobs.put(job)

    def close(self, status: str) -> None:
        self._status = status
        self._jobs.put(None)

    def _work(self) -> None:
        try:
            self.adapter = ADAPTERS[self.name](self.start)
        except BaseException as e:  # a package may leave by SystemExit
            self._opened.put(e)
            return
        self._opened.put(None)
        while (job := self._jobs.get()) is not None:
            if self.fault is None:
                self._try(job)
        self._try(lambda adapter: adapter.finish(self._status))  # at the end, where what it prints is held back

    def _try(self, job: Callable[[Adapter], None]) -> None:
        try:
            job(self.adapter)
        except Exception as e:
            self.fault = self.fault or _line(e)


def _line(error: BaseException) -> str:
    """An exception's first line, or its name where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _talk_aside(report: Report) -> Iterator[None]:
    """Keep packages from our user: what they print goes to --verbose, nobody answers them, our faults stay ours."""
    talk, keyboard, hook = io.StringIO(), sys.stdin, sys.excepthook
    try:
        with Path(os.devnull).open() as sys.stdin, contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            yield
    finally:
        sys.stdin, sys.excepthook = keyboard, hook
        for line in talk.getvalue().splitlines():
            if line.strip():
                report.detail(f"track  {line}")
