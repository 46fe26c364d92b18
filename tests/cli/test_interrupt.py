"""Ctrl-C from a program's first moment on: 130 and one line, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minigpt import __main__ as program
from minigpt.core.errors import Exit
from tests.stages import killing

TOLD = "stopped: interrupted\n"


def interrupted_at(module: str, args: list[str], cache, delay: float = 0.0) -> tuple[int, str, str]:
    """SIGINT `delay` seconds after a child process has imported `module`.

    Returns exit code, stdout, and stderr without the list of imports.
    """
    environment = {**killing.environment(cache), "PYTHONPROFILEIMPORTTIME": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-m", "minigpt", *args], env=environment, **pipes)
    said = []
    for line in child.stderr:
        if line.startswith("import time:"):
            if line.split("|")[-1].strip() == module:
                time.sleep(delay)
                child.send_signal(signal.SIGINT)
        else:
            said.append(line)
    return child.wait(timeout=60), child.stdout.read(), "".join(said)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("minigpt.core.errors", "doctor"),  # the program itself is being imported
        ("minigpt.core.train.memory", "doctor"),  # a command is, within typer
        ("typer.core", "pretrain"),
        ("numpy._core._multiarray_umath", "pretrain"),  # compiled code that answers an exception by aborting
        ("torch._utils", "pretrain"),
    ],
)
def test_an_interrupt_while_modules_are_imported(module, command, tmp_path):
    """No traceback, no abort, and a run that can be begun by the same command."""
    out = tmp_path / "run"
    args = ["-d", "sample:text", "--size", "1m", "-o", str(out)] if command == "pretrain" else []
    code, stdout, said = interrupted_at(module, [command, *args], tmp_path / "cache")
    assert code == Exit.ABORTED and said.endswith(TOLD) and "Traceback" not in said, (code, said)
    assert stdout == "" or command == "doctor"  # which prints what it knows already
    assert not out.exists() or [p.name for p in out.iterdir() if p.name != ".lock"] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "pretrain"])
def test_an_interrupt_at_any_moment(command, tmp_path):
    """From the first twentieth of a second on, in steps of one: nothing but the one line, and 130."""
    for i in range(1, 11):
        out = tmp_path / f"run-{i}"
        args = ["-d", "sample:text", "--size", "1m", "-o", str(out)] if command == "pretrain" else []
        code, _, said = interrupted_at("minigpt", [command, *args], tmp_path / "cache", delay=i / 20)
        assert code == Exit.ABORTED and said.endswith(TOLD) and "Traceback" not in said, (i, said)


def test_a_second_interrupt_does_not_wait(monkeypatch):
    """While an import is under way the first one waits for its end; ours that looks again is no second one."""
    monkeypatch.setattr(program, "importing", lambda frame: True)
    monkeypatch.delenv("RANK", raising=False)
    looks = []
    monkeypatch.setattr(program._thread, "start_new_thread", lambda look, given: looks.append(given))
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    answer = program.Interrupts()
    answer.begun = True
    answer(signal.SIGINT, None)
    answer.own = True
    answer(signal.SIGINT, None)
    assert len(looks) == 2 and answer.waiting
    with pytest.raises(SystemExit) as e:
        answer(signal.SIGINT, None)
    assert e.value.code == program.ABORTED == Exit.ABORTED
    monkeypatch.setattr(program, "importing", lambda frame: False)
    with pytest.raises(KeyboardInterrupt):
        answer(signal.SIGINT, None)
