"""When the loop is asked to stop, and what counts as asking twice."""

from __future__ import annotations

import signal

import pytest

from minigpt.core.errors import Aborted
from minigpt.core.train import signals
from minigpt.core.train.signals import StopRequest


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")


def test_nobody_asked():
    with StopRequest() as stop:
        assert not stop and stop.reason is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends_at_once(number):
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop and stop.reason == number.name
        with pytest.raises(Aborted, match=number.name):
            signal.raise_signal(number)


def test_a_closed_terminal_asks_once():
    """SIGHUP stops a run as SIGTERM does; that both shell and kernel send it is no second wish. Ctrl-C after it is."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop and stop.reason == "SIGHUP"
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Aborted):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_nohup_holds():
    """SIGHUP that is ignored when the run begins stays ignored, here and in the launcher of several processes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.SIGHUP not in signals.heeded(signals.STOPPING)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in signals.heeded(signals.STOPPING)


def test_any_second_signal_counts_where_nobody_echoes_it(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopRequest(), pytest.raises(Aborted):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_torchruns_echo_of_a_signal_is_no_second_one(torchrun):
    """Ctrl-C reaches the processes and torchrun, which sends them SIGTERM: asked once. Ctrl-C again is asked twice."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGINT"
        with pytest.raises(Aborted):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "stops"), [(None, True), ("0", True), ("1", False)])
def test_rank_0_looks_at_the_clock(rank, stops, monkeypatch):
    """The others hear of it from rank 0, so that nobody stops without knowing why."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    stop = StopRequest(max_seconds=0.0)
    assert bool(stop) is stops and stop.reason == ("--max-time 0s" if stops else None)


def test_the_end_of_torchrun_ends_its_processes(torchrun, monkeypatch):
    stop = StopRequest()
    assert not stop
    monkeypatch.setattr(signals, "STARTED_BY", -1)  # another one than the present parent
    assert stop and stop.reason == "the end of what started it"


def test_the_end_of_a_shell_ends_nothing(monkeypatch):
    """Under nohup a run outlives what started it."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(signals, "STARTED_BY", -1)
    assert not StopRequest()
