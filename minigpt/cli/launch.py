"""`--nproc N`: the same command as N processes. torchrun's elastic agent starts and watches them, in this process.

torchrun itself always answers 1, shows stack traces of its own, and kills what does not end within 30 seconds of a
signal. Here the exit code is that of the processes, faults are told by the one that has them, and a signal is handed
on once, so that they agree, save and end by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from minigpt.core.errors import Aborted, Exit, MissingError, RankLost, UsageError
from minigpt.core.machine import cores
from minigpt.core.train.signals import STOPPING, heeded

REGISTER = "MINIGPT_LAUNCH"  # directory in which every process leaves its number
MEETING = 600  # seconds that a machine waits for the others to come


def wanted(asked: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> bool:
    """Whether a command's options ask for several processes, and this is not one of them already."""
    environ = os.environ if environ is None else environ
    return "RANK" not in environ and (asked.get("nproc", 1) != 1 or asked.get("nnodes", 1) != 1)


def register() -> None:
    """Leave this process's number where the launcher finds it."""
    if REGISTER in os.environ:
        Path(os.environ[REGISTER], os.environ.get("RANK", "0")).write_text(str(os.getpid()), encoding="ascii")


def supervise(words: Sequence[str], asked: Mapping[str, Any]) -> int | None:
    """Run the command line `words` in several processes. Returns its exit code; None when one process is enough.

    asked: the resolved options nproc (0 = one for each GPU), nnodes, rdzv and device.
    RankLost (exit 4) when a process was killed and no other could say why, or the machines do not meet.
    """
    count = asked["nproc"] or _gpus(asked["device"])
    if count == 1 and asked["nnodes"] == 1:
        return None
    try:
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    except ImportError:
        raise MissingError("this build of torch has no torch.distributed", fix="leave --nproc away") from None
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores().usable // count)))
    arguments = torchrun.parse_args(options(count, asked["nnodes"], asked["rdzv"]))
    arguments.training_script_args = list(words)  # its parser would take --nproc for an option of its own
    if hasattr(arguments, "signals_to_handle"):  # since torch 2.9; an older agent handles them all by itself
        arguments.signals_to_handle = "SIGUSR2" if hasattr(signal, "SIGUSR2") else "SIGTERM"
    with _registry() as folder, _handing_on(folder) as handed_on:
        arguments.log_dir = str(folder / "torchrun")  # else its files stay behind
        try:
            torchrun.run(arguments)
        except ChildFailedError as e:
            return _outcome({rank: failure.exitcode for rank, failure in e.failures.items()}, handed_on)
        except RendezvousTimeoutError:
            raise RankLost(
                f"not all of {asked['nnodes']} machines came to {asked['rdzv']} within {MEETING} seconds",
                fix="look at what the others say, then start the same command on every machine",
            ) from None
        except RendezvousConnectionError as e:
            raise RankLost(
                f"{asked['rdzv']} does not answer",
                found=str(e.__cause__),
                fix="--rdzv names one of the machines, as all of them know it, and a port that is free and open there",
            ) from None
    return Exit.OK


def options(count: int, nodes: int, rdzv: str | None) -> list[str]:
    """torchrun's arguments, without those of the program."""
    if nodes == 1:
        where = ["--standalone", "--local-addr=localhost"]
    elif rdzv is None:
        raise UsageError("--nnodes needs --rdzv", fix="name one of the machines and a free port: --rdzv node0:29400")
    else:
        where = [
            f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}", "--rdzv-id=minigpt",
            f"--rdzv-conf=join_timeout={MEETING}",
        ]  # fmt: skip
    return [*where, f"--nproc-per-node={count}", "-m", "minigpt"]


def _gpus(device: str) -> int:
    """Processes for --nproc auto: one a GPU; one on a machine without, where its threads use all cores."""
    if device != "auto" and not device.startswith("cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _outcome(codes: Mapping[int, int], handed_on: Collection[int] = ()) -> int:
    """The exit code of a run from those of its processes, in the order in which they ended; negative ones are signals.

    handed_on: signals that the processes were given.
    Aborted when they died of those, RankLost when one was killed and rank 0 cannot have told it.
    """
    own = [code for code in codes.values() if code > 0]
    telling = [code for code in own if code != Exit.MISSING]  # the others only missed somebody
    if telling or codes.get(0) == Exit.MISSING:
        return (telling or own)[0]
    rank, code = next(iter(codes.items()))
    why = "rank 0 has gone or does not answer"
    if code < 0:
        name = signal.Signals(-code).name
        if all(-c in handed_on for c in codes.values()):
            raise Aborted(f"stopped at once by {name}", fix="if a step was saved, --resume goes on")
        why = f"rank {rank} was killed by {name}"
    raise RankLost(
        why, fix="the newest saved step stands: go on with --resume; if memory ran out, with a smaller --batch-size"
    )


@contextmanager
def _registry() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="minigpt-"))
    os.environ[REGISTER] = str(folder)
    try:
        yield folder
    finally:
        del os.environ[REGISTER]
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _handing_on(folder: Path) -> Iterator[set[int]]:
    """Give every signal to the processes, and go on waiting for them. Yields the signals that there were."""
    handed_on: set[int] = set()

    def hand_on(number: int, frame: FrameType | None) -> None:
        started = [int(p.read_text(encoding="ascii") or 0) for p in folder.iterdir() if p.is_file()]
        if not all(started) or not started:
            raise Aborted("interrupted")
        handed_on.add(number)
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {number: signal.signal(number, hand_on) for number in heeded(STOPPING)}
    try:
        yield handed_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
