"""Several processes that train one model: who they are, and what they agree on.

Rank 0 leads: it decides, writes and speaks. Short messages go through the rendezvous' key-value store, where waiting
has no time limit (tokenising takes as long as it takes); numbers go through the process group, whose limit catches a
process that hangs. One process alone is a World too, and for it nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from minigpt.core.errors import Aborted, Elsewhere, Exit, MinigptError, RankLost, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
POLL = 0.02  # seconds between two looks at the store
AGREED = (Exit.STOPPED, Exit.DIVERGED)  # every process comes to these ends by itself
STARTED_BY = os.getppid()  # read before it can have died: by then this process has another parent
FAREWELL = 120.0  # seconds that a finished process waits for the others before it leaves


@dataclass
class World:
    """This process among the others. rank: 0 … size - 1, over all machines; local_rank: on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    neighbours: int = 1  # processes on this machine, this one among them
    timeout: float = 300.0  # seconds a collective may take
    _store: Any = None
    _rounds: int = 0
    _parted: bool = False  # all know that the work has failed, and why
    _told: bool = False  # whoever failed has said so itself, on this machine

    @classmethod
    def open(cls, device: str = "auto", timeout: float = 300.0) -> World:
        """Join the others, as torchrun's environment variables describe them. Alone when there are none."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        import torch.distributed as dist

        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
        if gpu and local < torch.cuda.device_count():  # else the device is refused later, in words
            torch.cuda.set_device(local)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        lasting = store if neighbours < size else _file_store(store, rank, size)
        return cls(rank, size, local, neighbours, timeout, dist.PrefixStore("minigpt", lasting))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------------------------------ work and its outcome

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` in every process and wait for all. When it fails in one, it fails in all: rank 0 tells why."""
        return self._round(work, ())

    def first(self, work: Callable[[], T]) -> T:
        """Like `together`, but rank 0 does it first, then one process a machine, then the others: what the first
        leaves on disk serves the rest.
        """
        if self.leads:
            return self._round(work, ())
        mine = self.rank - self.local_rank  # torchrun numbers the processes machine by machine
        return self._round(work, (0,) if mine in (0, self.rank) else (0, mine))

    def share(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, as plain JSON, in every process."""
        if self.size == 1:
            return decide()
        key = f"share/{self._rounds}"

        def tell() -> T:
            value = decide()
            self._store.set(key, json.dumps(value))
            return value

        self.together(tell if self.leads else lambda: None)
        return json.loads(self._store.get(key))

    def _round(self, work: Callable[[], T], after: tuple[int, ...]) -> T:
        if self.size == 1:
            return work()
        name, self._rounds = f"round/{self._rounds}", self._rounds + 1
        for rank in after:
            if self._outcome(name, rank) is not None:
                self._tell(name, Elsewhere(""))
                return self._failed(name)
        try:
            value = work()
        except BaseException as e:
            self._tell(name, e)
            if isinstance(e, MinigptError):
                return self._failed(name, e)
            _finish_speaking()
            raise
        self._store.set(f"{name}/{self.rank}", "null")
        if any(self._outcome(name, rank) is not None for rank in range(self.size)):
            return self._failed(name)
        return value

    def _tell(self, name: str, e: BaseException) -> None:
        self._store.set(f"{name}/{self.rank}", json.dumps(_facts(e)))

    def _outcome(self, name: str, rank: int) -> dict[str, Any] | None:
        """What became of a round in another process: None = it went well."""
        key = f"{name}/{rank}"
        while not self._store.check([key]):
            time.sleep(POLL)
        return json.loads(self._store.get(key))

    def _failed(self, name: str, own: MinigptError | None = None) -> Any:
        """Raise the fault of the first process that has one."""
        _finish_speaking()
        for rank in range(self.size):
            told = self._outcome(name, rank)
            if told is not None and told["message"]:
                self._parted = not told["told"] and told["code"] != Exit.ABORTED  # else that one is leaving already
                if rank == self.rank and own is not None and self.leads:
                    raise own
                raise self._theirs(rank, told)
        raise RankLost("another process of this run failed")

    # ------------------------------------------------------------------------------------------ numbers

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes, in float64 and the same bits everywhere."""
        if self.size == 1:
            return values
        import torch

        box = torch.tensor(values, dtype=torch.float64)
        self.reduce(box)
        return box.tolist()

    def reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        import torch.distributed as dist

        try:
            dist.all_reduce(tensor)
        except RuntimeError as e:
            raise self.explain(e) or e from None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank. They have one shape and lie in main memory."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    # ------------------------------------------------------------------------------------------ the end

    def explain(self, e: BaseException) -> MinigptError | None:
        """A fault of the connection in words: who has gone, and why if it could still say so. None for other faults."""
        if self.size == 1 or isinstance(e, MinigptError) or not _is_connection(e):
            return None
        _finish_speaking()
        deadline = time.monotonic() + 1.0  # whoever failed first has told already, or never will
        while time.monotonic() < deadline:
            for rank in range(self.size):
                if rank != self.rank and (told := self._fault(rank)):
                    return self._theirs(rank, told)
            time.sleep(POLL)
        return RankLost(
            "another process of this run has gone or does not answer",
            found=_first_sentence(str(e)),
            fix="the newest saved step stands: go on with --resume",
        )

    def _fault(self, rank: int) -> dict[str, Any] | None:
        """What another process has left word of; nothing when the machine that held the store is gone."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([f"fault/{rank}"]):
                return json.loads(self._store.get(f"fault/{rank}"))
        return None

    def _theirs(self, rank: int, told: dict[str, Any]) -> Elsewhere:
        """Another process's fault as one of this process."""
        self._told = told["told"] and rank < self.neighbours and self.leads
        message = told["message"] if rank == 0 else f"rank {rank}: {told['message']}"
        return Elsewhere(message, found=told["found"], fix=told["fix"], code=Exit(told["code"]))

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: object) -> None:
        """Leave together when all know the outcome; else leave word for those that will miss this process.

        A fault is told once: by rank 0 when all share it, else by the process that has it. Then rank 0, if it is on the
        same machine, ends by SystemExit with the same code and without words.
        """
        if self.size == 1:
            return
        fault = e
        if e is None or self._agreed(e):
            self._leave(ending=e is not None)
        else:
            _finish_speaking()
            fault = self.explain(e) or e
            self._leave_word(fault)
        if self._told and isinstance(fault, Elsewhere):
            raise SystemExit(int(fault.code)) from e
        if fault is not None and fault is not e:
            raise fault from e

    def _agreed(self, e: BaseException) -> bool:
        """Whether the others know of this end, so that it can wait for them; a wish to end at once cannot."""
        if isinstance(e, (Aborted, KeyboardInterrupt)):
            return False
        return self._parted or (isinstance(e, MinigptError) and e.code in AGREED)

    def _leave_word(self, fault: BaseException) -> None:
        """For those that will miss this process; and tell the fault with this process's number."""
        if isinstance(fault, (Elsewhere, RankLost)):  # of others, who leave word themselves
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"fault/{self.rank}", json.dumps(_facts(fault, told=_tells(fault))))
        if isinstance(fault, MinigptError) and _tells(fault) and not self.leads:
            fault.message, fault.local = f"rank {self.rank}: {fault.message}", True

    def _leave(self, ending: bool) -> None:
        """torchrun ends the others as soon as one process ends with a code of its own: so all wait for all.

        ending: this process has nothing left to do but to tell the outcome.
        """
        import torch.distributed as dist

        try:
            self._store.set(f"bye/{self.rank}", "")
            deadline = time.monotonic() + FAREWELL
            names = [f"bye/{rank}" for rank in range(self.size)]
            while not self._store.check(names) and time.monotonic() < deadline:
                time.sleep(POLL)
            if ending:
                _finish_speaking()
            dist.destroy_process_group()
        except RuntimeError:  # the machine that held the store is gone already
            return


def is_follower(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process is one of several and not the one that speaks."""
    return (os.environ if environ is None else environ).get("RANK", "0") != "0"


def _file_store(store: Any, rank: int, size: int) -> Any:
    """A store in a file, for processes of one machine: the given one lies in torchrun's agent, and ends with it, while
    those that it leaves behind still have to agree and to save. The last one to let go of the file removes it.
    """
    import torch.distributed as dist

    if rank == 0:
        handle, path = tempfile.mkstemp(prefix="minigpt-")
        os.close(handle)
        store.set("minigpt", path)
    return dist.FileStore(store.get("minigpt").decode(), size)


def _finish_speaking() -> None:
    """From here on torchrun's SIGTERM, by which it answers the end of another process, does not cut this one short."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _tells(e: BaseException) -> bool:
    """Whether a fault that is not shared is told by the process that has it; a wish to end is not."""
    return not isinstance(e, (Aborted, KeyboardInterrupt))


def _facts(e: BaseException, told: bool = False) -> dict[str, Any]:
    """A fault for the other processes, as JSON. told: by this process."""
    if isinstance(e, MinigptError):
        return {"code": int(e.code), "message": e.message, "found": e.found, "fix": e.fix, "told": told}
    if isinstance(e, KeyboardInterrupt):
        code, message = Exit.ABORTED, "interrupted"
    elif is_out_of_memory(e):
        code, message = Exit.OUT_OF_MEMORY, "out of memory"
    else:
        code, message = Exit.BUG, f"{type(e).__name__}: {e}"
    return {"code": int(code), "message": message, "found": None, "fix": None, "told": _tells(e)}


def _first_sentence(text: str) -> str:
    """What torch says of a connection, without the place in its source and without its advice."""
    return re.sub(r"^\[\S*/\S*:\d+\]\s*", "", " ".join(text.split())).split(". ")[0][:120]


def _is_connection(e: BaseException) -> bool:
    """torch has classes for NCCL's and the store's faults; gloo's are bare and known by their words."""
    import torch.distributed as dist

    known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    words = ("gloo", "onnection", "Timed out")
    return isinstance(e, known) or (isinstance(e, RuntimeError) and any(w in str(e) for w in words))
