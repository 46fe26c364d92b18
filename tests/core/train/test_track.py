"""Trackers: what they are told, what they are not, and that none of them ever holds up a run."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minigpt.core.errors import Exit, MissingError, UsageError
from minigpt.core.report import Report
from minigpt.core.train import track

SAMPLE = {"prompt": "你好", "text": "a | b\n\nc", "tokens": 3, "finish_reason": "stop"}
INFO = {"stage": "sft", "parameters": 7, "host": "secret-host", "argv": ["minigpt", "sft"]}


class Ear(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.details: list[str] = []

    def warn(self, text: str, *, fix: str | None = None) -> None:
        self.warnings.append(f"{text} ({fix})")

    def note(self, label: str, text: str) -> None:
        self.notes.append(f"{label} {text}")

    def detail(self, text: str) -> None:
        self.details.append(text)


class Calls:
    """A stand-in for a package's functions and objects: writes down each call."""

    def __init__(self, log: list[tuple[Any, ...]], name: str, **attributes: Any):
        self._log, self._name = log, name
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._log.append((f"{self._name}.{name}", *args, *([kwargs] if kwargs else [])))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a module made of `attributes` under a package's name."""

    def install(name: str, **attributes: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="fake")
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return install


class Plain:
    """An adapter that keeps its rows; `broken` raises where it says."""

    fix = "do this"
    rewinds = False

    def __init__(self, start: track.Start, broken: str = ""):
        self.start, self.broken = start, broken
        self.id = start.id or "new"
        self.where = "here"
        self.rows: list[Any] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.broken == "log":
            raise ConnectionError("the network is gone\nwith details")
        self.rows.append((step, numbers))

    def samples(self, rows: list[Any], step: int) -> None:
        self.rows.append((step, rows))

    def finish(self, status: str) -> None:
        self.rows.append(status)
        if self.broken == "finish":
            raise OSError("disk full")


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, fake: Any) -> Any:
    """Put classes in the place of wandb's and trackio's adapters."""

    def install(**classes: Any) -> None:
        for name, made in classes.items():
            fake(name)
            monkeypatch.setitem(track.ADAPTERS, name, made)

    return install


# ---------------------------------------------------------------------------------------------- before the run


@pytest.mark.parametrize("name", track.TRACKERS)
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 4, and the command that installs it."""
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as e:
        track.check([name])
    assert e.value.code == Exit.MISSING
    assert e.value.fix == f"pip install 'minigpt-lm[{name}]'"


def test_a_directory_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves a directory `wandb` where it ran, which Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingError):
        track.check(["wandb"])


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as e:
        track.check(["tensorbord"])
    assert e.value.fix == "did you mean tensorboard? choose tensorboard, wandb, swanlab, trackio"


def test_swanlab_local_needs_its_dashboard(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """Without it SwanLab goes on and writes nothing."""
    fake("swanlab")
    monkeypatch.setattr(track, "find_spec", lambda name: None if name == "swanboard" else SimpleNamespace(origin="x"))
    track.check(["swanlab"])
    monkeypatch.setenv("SWANLAB_MODE", "local")
    with pytest.raises(MissingError, match="swanboard"):
        track.check(["swanlab"])


def test_the_check_is_free_of_torch_and_of_the_packages() -> None:
    """A refusal comes at once."""
    code = """
import sys
from minigpt.core.train import track
track.check([])
try:
    track.check(["tensorboard"])
except track.MissingError:
    pass
assert not {"torch", "tensorboard"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_sent_without_secrets_and_absolute_paths() -> None:
    here = str(Path.cwd() / "data" / "a.jsonl")
    config = {
        "lr": 0.1,
        "tokens": 5,
        "hf_token": "x",
        "API_KEY": "x",
        "data": [here, "/home/ann/b.jsonl:0.3"],
        "m": None,
    }
    assert track.public(config) == {
        "lr": 0.1,
        "tokens": 5,
        "data": [str(Path("data/a.jsonl")), "b.jsonl:0.3"],
        "m": None,
    }


# ---------------------------------------------------------------------------------------------- exact calls


def session(name: str, path: Path, ids: dict[str, str], status: str, step: int = 0, logged: int = 0) -> track.Tracker:
    """Log steps 10 and 20, and a sample at 20."""
    info = {**INFO, "trackers": ids}
    tracker = track.open([name], path, info, {"lr": 0.1}, step=step, logged=logged)
    for at in (10, 20):
        tracker.log({"step": at, "loss": 1.5, "grad_norm": None, "val_ppl": math.inf}, at)
    tracker.samples([SAMPLE], 20)
    tracker.samples([], 20)
    tracker.finish(status)
    return tracker


SENT = {"lr": 0.1, "stage": "sft", "parameters": 7}


def test_tensorboard_calls(tmp_path: Path, fake: Any) -> None:
    """New: options and rows. Resumed: older numbers are purged and sent again, samples are not."""
    calls: list[tuple[Any, ...]] = []

    def writer(*args: Any, **kwargs: Any) -> Calls:
        calls.append(("SummaryWriter", *args, kwargs))
        return Calls(calls, "writer")

    fake("tensorboard")
    fake("torch.utils.tensorboard", SummaryWriter=writer)
    where = str(tmp_path / "tensorboard")
    assert session("tensorboard", tmp_path, {}, "done").ids == {"tensorboard": where}
    rows = [("writer.add_scalar", "loss", 1.5, 10), ("writer.add_scalar", "loss", 1.5, 20)]
    assert calls == [
        ("SummaryWriter", where, {"purge_step": None, "flush_secs": 10}),
        (
            "writer.add_text",
            "config",
            '    {\n      "lr": 0.1,\n      "stage": "sft",\n      "parameters": 7\n    }',
            0,
        ),
        *rows,
        ("writer.add_text", "samples", "    你好\n\n→\n\n    a | b\n    \n    c", 20),
        ("writer.close",),
    ]
    calls.clear()
    session("tensorboard", tmp_path, {"tensorboard": where}, "done", step=5, logged=20)
    assert calls == [("SummaryWriter", where, {"purge_step": 6, "flush_secs": 10}), *rows, ("writer.close",)]


def test_wandb_calls(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New: no id. Resumed: the same id, and no row that it has already."""
    calls: list[tuple[Any, ...]] = []

    def init(**kwargs: Any) -> Calls:
        calls.append(("init", kwargs))
        return Calls(calls, "run", id=kwargs["id"] or "abc", url="https://w/abc", dir="x/files", offline=False)

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fake("wandb", init=init, Settings=lambda **k: k, Table=lambda **k: ("Table", k))
    assert session("wandb", tmp_path, {}, "done").ids == {"wandb": "abc"}
    assert calls[0][1].pop("settings") == {
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "host": "",
        "finish_timeout": 60.0,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
    }
    begun = {
        "project": "minigpt",
        "name": tmp_path.name,
        "id": None,
        "resume": None,
        "dir": str(tmp_path),
        "config": SENT,
        "allow_val_change": True,
        "reinit": "create_new",
    }
    table = ("Table", {"columns": list(SAMPLE), "data": [list(SAMPLE.values())]})
    assert calls == [
        ("init", begun),
        ("run.log", {"loss": 1.5}, {"step": 10}),
        ("run.log", {"loss": 1.5}, {"step": 20}),
        ("run.log", {"samples": table}, {"step": 20}),
        ("run.finish", {"exit_code": 0}),
    ]
    calls.clear()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    session("wandb", tmp_path, {"wandb": "abc"}, "failed", step=5, logged=10)
    del calls[0][1]["settings"]
    assert calls[:2] == [
        ("init", {**begun, "id": "abc", "resume": "allow", "project": "mine"}),
        ("run.log", {"loss": 1.5}, {"step": 20}),
    ]
    assert calls[-1] == ("run.finish", {"exit_code": 1})


def test_swanlab_calls(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New: SwanLab refuses an id with resume="never". Resumed: the same id."""
    calls: list[tuple[Any, ...]] = []

    def init(**kwargs: Any) -> Calls:
        calls.append(("init", kwargs))
        return Calls(calls, "run", id=kwargs["id"] or "abc", mode="offline", dir=Path("x"))

    monkeypatch.delenv("SWANLAB_PROJ_NAME", raising=False)
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    fake("swanlab", init=init, Settings=lambda **k: k, Text=lambda text, caption: (text, caption))
    assert session("swanlab", tmp_path, {}, "done").ids == {"swanlab": "abc"}
    assert calls[0][1].pop("settings") == {
        "interactive": False,
        "terminal": {"proxy_type": "none"},
        "probe": dict.fromkeys(("hardware", "runtime", "requirements", "git", "swanlab", "monitor"), False),
    }
    begun = {
        "project": "minigpt",
        "name": tmp_path.name,
        "id": None,
        "resume": "never",
        "log_dir": str(tmp_path / "swanlog"),
        "config": SENT,
    }
    assert calls == [
        ("init", begun),
        ("run.log", {"loss": 1.5}, {"step": 10}),
        ("run.log", {"loss": 1.5}, {"step": 20}),
        ("run.log", {"samples": [("a | b\n\nc", "你好")]}, {"step": 20}),
        ("run.finish", {"state": "success"}),
    ]
    for status, ended in (
        ("stopped", {"state": "aborted"}),
        ("failed", {"state": "crashed", "error": "run.json says why"}),
    ):
        calls.clear()
        session("swanlab", tmp_path, {"swanlab": "abc"}, status, step=5, logged=20)
        del calls[0][1]["settings"]
        assert calls == [("init", {**begun, "id": "abc", "resume": "allow"}), ("run.finish", ended)]


def test_trackio_calls(tmp_path: Path, fake: Any) -> None:
    """A run is found again by a name that no other run has."""
    calls: list[tuple[Any, ...]] = []

    def init(**kwargs: Any) -> Calls:
        calls.append(("init", kwargs))
        return Calls(calls, "run")

    fake("trackio", init=init, Table=lambda **k: ("Table", k))
    ids = session("trackio", tmp_path, {}, "done").ids
    assert ids["trackio"].startswith(f"{tmp_path.name}-")
    assert session("trackio", tmp_path, {}, "done").ids != ids
    begun = {
        "project": "minigpt",
        "name": ids["trackio"],
        "resume": "never",
        "config": SENT,
        "embed": False,
        "auto_log_gpu": False,
        "auto_log_cpu": False,
    }
    table = ("Table", {"columns": list(SAMPLE), "data": [list(SAMPLE.values())]})
    assert calls[:5] == [
        ("init", begun),
        ("run.log", {"loss": 1.5}, {"step": 10}),
        ("run.log", {"loss": 1.5}, {"step": 20}),
        ("run.log", {"samples": table}, {"step": 20}),
        ("run.finish",),
    ]
    calls.clear()
    assert session("trackio", tmp_path, ids, "done", step=5, logged=15).ids == ids
    assert calls[:2] == [("init", {**begun, "resume": "allow"}), ("run.log", {"loss": 1.5}, {"step": 20})]


# ---------------------------------------------------------------------------------------------- faults


def test_a_broken_tracker_is_told_once_and_the_other_goes_on(tmp_path: Path, adapters: Any) -> None:
    """One line of the fault; no row lost for the other; the broken one is closed all the same."""
    adapters(wandb=lambda start: Plain(start, "log"), trackio=Plain)
    ear = Ear()
    tracker = track.open(["wandb", "trackio"], tmp_path, INFO, {}, report=ear)
    broken, whole = (lane.adapter for lane in tracker.lanes)
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
        tracker.samples([SAMPLE], step)
    tracker.finish("done")
    assert ear.warnings == ["wandb gets no more rows: the network is gone (metrics.jsonl has them all)"]
    assert broken.rows == ["done"]  # type: ignore[attr-defined]
    expected = [row for step in (1, 2, 3) for row in ((step, {"loss": 1.0}), (step, [SAMPLE]))]
    assert whole.rows == [*expected, "done"]  # type: ignore[attr-defined]


def test_a_fault_at_the_end_is_told(tmp_path: Path, adapters: Any) -> None:
    adapters(wandb=lambda start: Plain(start, "finish"))
    ear = Ear()
    track.open(["wandb"], tmp_path, INFO, {}, report=ear).finish("done")
    assert ear.warnings == ["wandb gets no more rows: disk full (metrics.jsonl has them all)"]


def test_a_tracker_that_hangs_slows_nothing(tmp_path: Path, adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging returns at once, the backlog is bounded, and the end waits no longer than it says."""
    release = threading.Event()

    class Hanging(Plain):
        def log(self, numbers: dict[str, float], step: int) -> None:
            release.wait(60)

    monkeypatch.setattr(track, "WAITING", 5)
    adapters(wandb=Hanging)
    ear = Ear()
    tracker = track.open(["wandb"], tmp_path, INFO, {}, report=ear)
    (lane,) = tracker.lanes
    began = time.monotonic()
    for step in range(1, 101):
        tracker.log({"loss": 1.0}, step)
    assert lane._jobs.qsize() <= 5
    tracker.finish("done", seconds=0.1)
    assert time.monotonic() - began < 5
    assert ear.warnings == ["wandb gets no more rows: it is 5 rows behind (metrics.jsonl has them all)"]
    release.set()
    lane.thread.join(10)
    assert not lane.thread.is_alive()


def test_what_is_not_sent_in_time_is_told(tmp_path: Path, adapters: Any) -> None:
    release = threading.Event()

    class Slow(Plain):
        def finish(self, status: str) -> None:
            release.wait(60)

    adapters(wandb=Slow)
    ear = Ear()
    tracker = track.open(["wandb"], tmp_path, INFO, {}, report=ear)
    tracker.finish("done", seconds=0.05)
    release.set()
    assert ear.warnings == [
        "wandb gets no more rows: not everything was sent within 0.05 s (metrics.jsonl has them all)"
    ]


def test_one_that_cannot_start_ends_the_run_before_it_begins(tmp_path: Path, adapters: Any) -> None:
    """UsageError with what to set; those already open are closed; and nobody is asked for a key."""
    opened: list[Plain] = []

    def whole(start: track.Start) -> Plain:
        opened.append(Plain(start))
        return opened[-1]

    class Asking(Plain):
        def __init__(self, start: track.Start):
            super().__init__(start)
            assert not sys.stdin.isatty()
            input("API key: ")

    adapters(wandb=whole, trackio=Asking)
    track.ADAPTERS["trackio"].fix = "set TRACKIO_KEY"
    before = sys.stdin
    with pytest.raises(UsageError) as e:
        track.open(["wandb", "trackio"], tmp_path, INFO, {})
    assert (e.value.message, e.value.found) == ("--track trackio could not start", "EOF when reading a line")
    assert e.value.fix == "set TRACKIO_KEY"
    assert opened[0].rows == ["failed"]
    assert sys.stdin is before


def test_one_that_does_not_answer_is_given_up(tmp_path: Path, adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Silent(Plain):
        def __init__(self, start: track.Start):
            release.wait(60)

    adapters(wandb=Silent)
    monkeypatch.setattr(track, "OPEN_SECONDS", 0.05)
    with pytest.raises(UsageError) as e:
        track.open(["wandb"], tmp_path, INFO, {})
    release.set()
    assert e.value.found == "no answer within 0.05 s"


def test_what_a_package_prints_stays_out_of_the_result(
    tmp_path: Path, adapters: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout is the result of a command; packages say much. --verbose shows it. Uncaught faults stay ours, too."""

    class Loud(Plain):
        def __init__(self, start: track.Start):
            super().__init__(start)
            print("welcome\n")
            print("hello", file=sys.stderr)
            sys.excepthook = lambda *error: None

        def finish(self, status: str) -> None:
            print("goodbye")

    adapters(wandb=Loud)
    ear, hook = Ear(), sys.excepthook
    tracker = track.open(["wandb"], tmp_path, INFO, {}, report=ear)
    assert sys.excepthook is hook
    tracker.finish("done")
    assert capsys.readouterr() == ("", "")
    assert ear.details == ["track  welcome", "track  hello", "track  goodbye"]
    assert ear.notes == ["track wandb: here"]


# ---------------------------------------------------------------------------------------------- resume


def test_a_tracker_that_joins_at_resume_gets_every_row(tmp_path: Path, adapters: Any) -> None:
    """Only what an earlier session sent is held back; ids of trackers that rest are kept for a later session."""
    adapters(wandb=Plain, trackio=Plain)
    info = {**INFO, "trackers": {"wandb": "old", "swanlab": "resting"}}
    tracker = track.open(["wandb", "trackio", "wandb"], tmp_path, info, {}, step=2, logged=4)
    joined = [lane.adapter for lane in tracker.lanes]
    for step in (3, 4, 5):
        tracker.log({"loss": 1.0}, step)
    tracker.finish("stopped")
    assert tracker.facts == {
        "trackers": {"wandb": "old", "swanlab": "resting", "trackio": "new"},
        "tracked": {"wandb": 4, "swanlab": 4, "trackio": 0},
    }
    sent = [[row[0] for row in adapter.rows[:-1]] for adapter in joined]  # type: ignore[attr-defined]
    assert sent == [[5], [3, 4, 5]]


def test_a_run_killed_twice_sends_no_row_twice(tmp_path: Path, adapters: Any) -> None:
    """Killed at 6, resumed at 2 and killed at 4, resumed at 2: what run.json keeps says that 5 and 6 are there too."""
    adapters(wandb=Plain)
    first = track.open(["wandb"], tmp_path, INFO, {})
    second = track.open(["wandb"], tmp_path, {**INFO, **first.facts}, {}, step=2, logged=6)
    third = track.open(["wandb"], tmp_path, json.loads(json.dumps({**INFO, **second.facts})), {}, step=2, logged=4)
    (lane,) = third.lanes
    for step in range(3, 9):
        third.log({"loss": 1.0}, step)
    third.finish("done")
    assert [row[0] for row in lane.adapter.rows[:-1]] == [7, 8]  # type: ignore[attr-defined]


def test_no_tracker_is_a_tracker(tmp_path: Path) -> None:
    """A run without --track needs no special case."""
    tracker = track.open([], tmp_path, INFO, {})
    tracker.log({"loss": 1.0}, 1)
    tracker.samples([SAMPLE], 1)
    tracker.finish("done")
    assert tracker.facts == {}
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- the real packages


def killed_and_resumed(name: str, path: Path) -> dict[str, str]:
    """Steps 1 to 3, then a resume of step 2 that trains 3 and 4: every step should be there once."""
    ids: dict[str, str] = {}
    for steps, resumed, logged in (((1, 2, 3), 0, 0), ((3, 4), 2, 3)):
        ear = Ear()
        tracker = track.open(
            [name], path, {**INFO, "trackers": ids}, {"lr": 0.1}, report=ear, step=resumed, logged=logged
        )
        assert not ids or tracker.ids == ids
        ids = tracker.ids
        for step in steps:
            tracker.log({"step": step, "loss": 1 / step}, step)
            tracker.samples([SAMPLE], step)
        tracker.finish("done")
        assert ear.warnings == []
    return ids


def test_real_tensorboard(tmp_path: Path) -> None:
    """Its own reader finds each step once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killed_and_resumed("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(s, 1 / s) for s in (1, 2, 3, 4)]
    assert [e.step for e in events.Tensors("samples/text_summary")] == [1, 2, 3, 4]
    assert len(events.Tensors("config/text_summary")) == 1


def test_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: one directory a session, both of one id, in the run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    run = killed_and_resumed("wandb", tmp_path)["wandb"]
    written = list(tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"))
    assert written and all(b"loss" in path.read_bytes() for path in written)


def test_real_swanlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: one directory a session, both of one id, in the run; nothing of this machine."""
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    pytest.importorskip("swanlab")
    run = killed_and_resumed("swanlab", tmp_path)["swanlab"]
    written = list(tmp_path.glob(f"swanlog/run-*-{run}/run-{run}.swanlab"))
    assert written and all(b"loss" in path.read_bytes() for path in written)
    for path in tmp_path.glob("swanlog/*/files/swanlab-metadata.json"):
        assert not any(v for k, v in json.loads(path.read_text()).items() if k != "_version")


def test_real_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SQLite file holds each step once."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    run = killed_and_resumed("trackio", tmp_path)["trackio"]
    with sqlite3.connect(tmp_path / "trackio" / "minigpt.db") as db:
        rows = db.execute("select step, metrics from metrics where run_name = ? order by id", (run,)).fetchall()
    numbers = [(step, json.loads(text)["loss"]) for step, text in rows if "loss" in json.loads(text)]
    assert numbers == [(s, 1 / s) for s in (1, 2, 3, 4)]
    assert len(rows) == 8  # and as many tables of samples
