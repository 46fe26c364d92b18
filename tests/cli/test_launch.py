"""cli.launch: when several processes are started, with which words of torchrun's, and what their ends mean."""

from __future__ import annotations

import os
import signal

import pytest

from minigpt.cli import launch
from minigpt.core.errors import Aborted, Exit, RankLost, UsageError

ONE = {"nproc": 1, "nnodes": 1, "rdzv": None, "device": "cpu"}


@pytest.mark.parametrize(
    ("asked", "environ", "wanted"),
    [
        ({"nproc": 1, "nnodes": 1}, {}, False),
        ({"nproc": 2, "nnodes": 1}, {}, True),
        ({"nproc": 0, "nnodes": 1}, {}, True),
        ({"nproc": 1, "nnodes": 2}, {}, True),
        ({"nproc": 2, "nnodes": 2}, {"RANK": "0"}, False),
        ({}, {}, False),  # a command without these options
    ],
)
def test_several_processes_are_started_once(asked, environ, wanted):
    """By --nproc or --nnodes, and not again by the processes that were started."""
    assert launch.wanted(asked, environ) is wanted


def test_one_machine_meets_on_loopback_alone():
    words = launch.options(4, 1, None)
    assert words == ["--standalone", "--local-addr=localhost", "--nproc-per-node=4", "-m", "minigpt"]


def test_several_machines_meet_where_they_were_told_to():
    words = launch.options(8, 2, "node0:29400")
    assert {"--nnodes=2", "--rdzv-endpoint=node0:29400", "--nproc-per-node=8"} <= set(words)
    assert "--standalone" not in words and words[-2:] == ["-m", "minigpt"]
    with pytest.raises(UsageError, match="--rdzv") as e:
        launch.options(8, 2, None)
    assert e.value.code == Exit.USAGE and e.value.fix


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_understands_the_options_and_leaves_the_rest_to_the_program(nodes):
    from torch.distributed import run as torchrun

    parsed = torchrun.parse_args(launch.options(2, nodes, "node0:29400"))
    assert (parsed.nproc_per_node, parsed.module, parsed.training_script) == ("2", True, "minigpt")
    assert parsed.training_script_args == []


KILL, TERM = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "answer"),
    [
        ({0: 75, 1: 75}, 75),
        ({0: 2}, 2),
        ({1: 1, 0: TERM}, 1),  # torchrun ended rank 0 by a signal after rank 1's bug
        ({0: 4, 1: 5}, 5),  # rank 0 only missed rank 1
        ({1: KILL, 0: 4}, 4),  # rank 0 has told that rank 1 is gone
        ({0: TERM, 1: 6}, 6),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_knows_why(codes, answer):
    assert launch._outcome(codes) == answer


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ({1: KILL}, "rank 1 was killed by SIGKILL"),
        ({1: KILL, 0: TERM}, "rank 1 was killed by SIGKILL"),  # in that order: torchrun ended the other one
        ({0: KILL, 1: 4}, "rank 0 was killed by SIGKILL"),  # rank 1 knows that much, but only rank 0 speaks
        ({2: 4, 3: 4}, "rank 0 has gone"),  # on another machine
        ({1: 4, 0: KILL}, "rank 0 has gone or does not answer"),  # rank 1 gave up waiting, then torchrun gave up rank 0
    ],
)
def test_nobody_left_to_tell_means_the_launcher_does(codes, words):
    with pytest.raises(RankLost, match=words) as e:
        launch._outcome(codes)
    assert e.value.code == Exit.MISSING and "--resume" in e.value.fix


def test_processes_that_die_of_the_signals_they_were_given_were_stopped():
    """A signal before the first step, or a second one: nobody is lost."""
    with pytest.raises(Aborted, match="SIGTERM") as e:
        launch._outcome({0: TERM, 1: TERM}, {signal.SIGTERM})
    assert e.value.code == Exit.ABORTED
    with pytest.raises(RankLost):
        launch._outcome({0: KILL, 1: TERM}, {signal.SIGTERM})
    assert launch._outcome({1: 75, 0: TERM}, {signal.SIGTERM}) == 75


def test_machines_that_cannot_meet_are_no_bug(monkeypatch):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

    def unreachable(arguments):
        raise RendezvousConnectionError("inner") from TimeoutError("timed out after 60 s")

    monkeypatch.setattr(torchrun, "run", unreachable)
    with pytest.raises(RankLost, match="node0:29400 does not answer") as e:
        launch.supervise(["pretrain"], {**ONE, "nnodes": 2, "rdzv": "node0:29400"})
    assert e.value.code == Exit.MISSING and "60 s" in e.value.found and "port" in e.value.fix


@pytest.mark.parametrize("asked", [ONE, {**ONE, "nproc": 0}])
def test_one_process_is_no_launch(asked):
    """--nproc auto on a machine without GPUs is one process, which uses all cores by threads."""
    assert launch.supervise(["pretrain"], asked) is None


def test_auto_is_a_process_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [launch._gpus(d) for d in ("auto", "cuda", "cpu", "mps")] == [8, 8, 1, 1]


def test_processes_register_and_signals_reach_them_all(tmp_path, monkeypatch):
    """Each leaves its number; a signal to the launcher is handed on to all, and what was there before comes back."""
    sent: list[tuple[int, int]] = []
    before = signal.getsignal(signal.SIGTERM)
    with launch._registry() as folder:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            launch.register()
        assert sorted(p.name for p in folder.iterdir()) == ["0", "1"]
        (folder / "torchrun").mkdir()  # its own files lie beside
        with monkeypatch.context() as patch, launch._handing_on(folder) as handed_on:
            patch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    assert sorted(sent) == sorted([(os.getpid(), signal.SIGTERM)] * 2 + [(os.getpid(), signal.SIGINT)] * 2)
    assert handed_on == {signal.SIGTERM, signal.SIGINT} and signal.getsignal(signal.SIGTERM) is before
    assert not folder.exists() and launch.REGISTER not in os.environ


def test_a_signal_before_any_process_runs_ends_the_launch():
    with launch._registry() as folder, launch._handing_on(folder), pytest.raises(Aborted):
        signal.raise_signal(signal.SIGINT)


def test_processes_that_have_ended_get_no_signal(tmp_path):
    with launch._registry() as folder, launch._handing_on(folder):
        (folder / "0").write_text(str(2**22 + 1))  # above the highest number Linux gives
        signal.raise_signal(signal.SIGTERM)
