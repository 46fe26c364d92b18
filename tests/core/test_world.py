"""What processes agree on, with threads for processes: they share a real key-value store, and real gloo for numbers."""

import json
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from minigpt.core.errors import Aborted, DataError, Diverged, Elsewhere, Exit, RankLost, UsageError
from minigpt.core.world import World, is_follower


def worlds(size, timeout=20.0, per_machine=None):
    """One World a rank; per_machine: ranks on each machine, in torchrun's numbering."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    here = per_machine or size
    return [World(r, size, r % here, neighbours=here, timeout=timeout, _store=store) for r in range(size)]


def at_once(members, work):
    """Do work(world) in a thread for each member. The values, or what was raised, by rank."""
    found = [None] * len(members)

    def run(world):
        try:
            found[world.rank] = work(world)
        except BaseException as e:
            found[world.rank] = e

    threads = [threading.Thread(target=run, args=(w,), daemon=True) for w in members]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
        assert not t.is_alive(), "a process waits for ever"
    return found


def fails(ranks, error):
    """Work that raises error(rank) in these ranks and is the rank in the others."""

    def work(world):
        if world.rank in ranks:
            raise error(world.rank)
        return world.rank

    return work


def data_error(rank):
    return DataError(f"a.jsonl:{rank} is odd", found="{}", fix="mend it", data={"rows": [rank]})


# ---------------------------------------------------------------------------------------------- one process


def test_alone_needs_no_store_and_keeps_every_error_as_it_is():
    world = World()
    assert world.leads and world.together(lambda: 1) == 1 and world.first(lambda: 2) == 2
    assert world.share(lambda: (3, None)) == (3, None) and world.sum([0.1, 2.0]) == [0.1, 2.0]
    with pytest.raises(ZeroDivisionError), world:
        world.together(lambda: 1 / 0)


def test_open_is_alone_without_torchruns_variables(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.open() == World()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.open() == World()


@pytest.mark.parametrize(("rank", "follows"), [(None, False), ("0", False), ("1", True), ("12", True)])
def test_all_but_rank_0_follow(rank, follows):
    assert is_follower({} if rank is None else {"RANK": rank}) is follows


# ---------------------------------------------------------------------------------------------- work and its outcome


def test_together_gives_each_its_own_value_after_the_slowest():
    ended = []

    def work(world):
        time.sleep(0.1 * world.rank)
        ended.append(world.rank)
        return world.rank * 10

    def both(world):
        value = world.together(lambda: work(world))
        return value, len(ended)

    assert at_once(worlds(3), both) == [(0, 3), (10, 3), (20, 3)]


def test_share_gives_rank_0s_value_as_json_in_every_process_and_asks_it_once():
    asked = []

    def decide(world):
        asked.append(world.rank)
        return {"step": 4, "path": ["花", None], "share": 0.1}

    def work(world):
        return [world.share(lambda: decide(world)), world.share(lambda: 2), world.share(lambda: None)]

    found = at_once(worlds(3), work)
    assert found == [[{"step": 4, "path": ["花", None], "share": 0.1}, 2, None]] * 3 and asked == [0]


def test_a_bug_in_common_work_is_told_where_it_is_and_nobody_waits(monkeypatch):
    """Rank 1's bug, or its want of memory: it says so itself, rank 0 ends with its code and without words."""
    for error, code in ((ZeroDivisionError, 1), (MemoryError, 5)):

        def work(world, error=error):
            with world:
                world.together(lambda: fails({1}, error)(world))

        zero, one = at_once(worlds(2), work)
        assert type(one) is error and type(zero) is SystemExit and zero.code == code


def test_many_rounds_in_a_row_do_not_mix():
    def work(world):
        return [(world.share(lambda i=i: i), world.together(lambda i=i: (world.rank, i))) for i in range(20)]

    found = at_once(worlds(2), work)
    assert found == [[(i, (rank, i)) for i in range(20)] for rank in range(2)]


@pytest.mark.parametrize("way", ["together", "first"])
def test_a_fault_of_rank_0_is_its_own_and_everybodys(way):
    """Rank 0 keeps the whole error, which it tells; the others end with its words and its code."""
    zero, *others = at_once(worlds(3), lambda w: getattr(w, way)(lambda: fails({0}, data_error)(w)))
    assert type(zero) is DataError and zero.data == {"rows": [0]}
    for e in others:
        assert type(e) is Elsewhere and (e.message, e.found, e.fix, e.code) == ("a.jsonl:0 is odd", "{}", "mend it", 3)


@pytest.mark.parametrize("way", ["together", "first"])
def test_a_fault_of_rank_1_is_told_by_rank_0_with_its_number(way):
    for e in at_once(worlds(3), lambda w: getattr(w, way)(lambda: fails({1}, data_error)(w))):
        assert type(e) is Elsewhere and not e.local
        assert (e.message, e.found, e.fix, e.code) == ("rank 1: a.jsonl:1 is odd", "{}", "mend it", Exit.DATA)


def test_of_several_faults_all_tell_the_first_ranks():
    found = at_once(worlds(4), lambda w: w.together(lambda: fails({1, 2, 3}, data_error)(w)))
    assert {e.message for e in found} == {"rank 1: a.jsonl:1 is odd"}
    found = at_once(worlds(3), lambda w: w.share(lambda: fails({0}, data_error)(w)))
    assert [e.message for e in found] == ["a.jsonl:0 is odd"] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bug_stays_a_bug_where_it_is_and_ends_the_others(rank):
    """The process with the bug keeps its trace; the others end with exit code 1 and name the rank."""
    found = at_once(worlds(2), lambda w: w.together(lambda: fails({rank}, ZeroDivisionError)(w)))
    assert type(found[rank]) is ZeroDivisionError
    other = found[1 - rank]
    assert type(other) is Elsewhere and other.code == Exit.BUG
    assert other.message == ("rank 1: " if rank else "") + f"ZeroDivisionError: {rank}"


def test_an_interrupt_in_one_process_ends_all_with_130():

    def work(world):
        with world:
            world.together(lambda: fails({1}, KeyboardInterrupt)(world))

    zero, one = at_once(worlds(2), work)
    assert type(one) is KeyboardInterrupt
    assert type(zero) is Elsewhere and (zero.message, zero.code) == ("rank 1: interrupted", Exit.ABORTED)


def test_first_is_rank_0_then_one_a_machine_then_the_rest():
    """Six processes on three machines of two: nobody begins before those whose files it reads have ended."""
    log, lock = [], threading.Lock()

    def work(world):
        with lock:
            log.append(("begins", world.rank))
        time.sleep(0.05)
        with lock:
            log.append(("ends", world.rank))
        return world.rank

    assert at_once(worlds(6, per_machine=2), lambda w: w.first(lambda: work(w))) == list(range(6))
    for later, earlier in ((1, 0), (2, 0), (3, 0), (3, 2), (4, 0), (5, 0), (5, 4)):
        assert log.index(("ends", earlier)) < log.index(("begins", later)), log


def test_first_is_not_begun_by_those_whose_forerunner_failed():
    """Two machines of two: rank 2 fails, so rank 3 does not try; rank 0 fails, so nobody else tries."""
    for failing, tried in ((2, {0, 1, 2}), (0, {0})):
        begun = set()

        def work(world, failing=failing, begun=begun):
            begun.add(world.rank)
            return fails({failing}, data_error)(world)

        found = at_once(worlds(4, per_machine=2), lambda w, work=work: w.first(lambda: work(w)))
        assert begun == tried and {e.code for e in found} == {Exit.DATA}


def test_after_a_common_fault_all_leave_together(monkeypatch):
    """torchrun ends the others with the first that ends with a code of its own: so all wait for the slowest."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    ready = threading.Event()

    def work(world):
        with world:
            try:
                world.together(lambda: fails({1}, data_error)(world))
            finally:
                if world.rank == 1:  # busy until the others have been waiting at the door for a while
                    time.sleep(0.3)
                    ready.set()

    def entered(world):
        try:
            work(world)
        except Elsewhere:
            return ready.is_set()

    assert at_once(worlds(3), entered) == [True] * 3


# ---------------------------------------------------------------------------------------------- the end


def test_rank_0_tells_its_own_fault_without_its_number():
    e = leave_with(worlds(2)[0], DataError("tokens.bin is cut short"))
    assert e.message == "tokens.bin is cut short"


def leave_with(world, e):
    try:
        with world:
            raise e
    except BaseException as raised:
        return raised


def test_a_fault_of_one_process_alone_is_told_by_it_with_its_number():
    world = worlds(2)[1]
    e = leave_with(world, UsageError("--device has no GPU", fix="take another"))
    assert (e.message, e.local) == ("rank 1: --device has no GPU", True)
    told = json.loads(world._store.get("fault/1"))
    assert told == {"code": 2, "message": "--device has no GPU", "found": None, "fix": "take another", "told": True}


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x"),
        (MemoryError(), 5, "out of memory"),
        (data_error(1), 3, "odd"),
    ],
)
def test_who_misses_another_on_its_machine_ends_with_its_code_and_without_words(fault, code, words):
    """Rank 1 fails alone and says so itself; rank 0's next reduction breaks: it knows why, and is silent."""
    zero, one = worlds(2)
    assert leave_with(one, fault) is fault
    known = zero.explain(LOST)
    assert type(known) is Elsewhere and known.code == code
    assert known.message.startswith("rank 1: ") and known.message.endswith(words)
    e = leave_with(zero, LOST)
    assert type(e) is SystemExit and e.code == code and e.__cause__ is LOST


def test_who_misses_another_on_another_machine_says_why():
    """Nobody reads the words of two machines at once."""
    members = worlds(4, per_machine=2)
    leave_with(members[3], ZeroDivisionError("x"))
    e = leave_with(members[0], LOST)
    assert type(e) is Elsewhere and e.message == "rank 3: ZeroDivisionError: x"


def test_a_wish_to_end_at_once_waits_for_nobody():
    """A second signal while rank 0 saves, which is shared work: rank 0 does not wait for the other to leave."""
    began = time.monotonic()
    zero, one = worlds(2)
    one._store.set("round/0/1", "null")  # rank 1 has done its part and waits
    with pytest.raises(Aborted), zero:
        zero.together(lambda: fails({0}, lambda rank: Aborted("stopped at once"))(zero))
    assert time.monotonic() - began < 5


def test_a_wish_to_end_is_told_by_rank_0_alone():
    zero, one = worlds(2)
    e = leave_with(one, Aborted("stopped at once by a second SIGTERM"))
    assert not e.local
    e = leave_with(zero, LOST)
    assert (e.message, e.code) == ("rank 1: stopped at once by a second SIGTERM", Exit.ABORTED)


def test_what_others_have_told_is_not_passed_on():
    """Three processes: rank 2 fails, rank 1 misses it, and rank 0 hears of rank 2's fault, not of rank 1's loss."""
    zero, one, two = worlds(3)
    leave_with(two, ZeroDivisionError("x"))
    leave_with(one, LOST)
    assert zero.explain(LOST).message == "rank 2: ZeroDivisionError: x"


@pytest.mark.parametrize(
    ("text", "found"),
    [("[/p/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. This is typically caused by …",
      "Connection closed by peer [127.0.0.1]:1"),
     ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete",
      "Timed out waiting 5000ms for recv operation to complete"),
     ("Connection reset by peer", "Connection reset by peer")],
)  # fmt: skip
def test_a_process_that_has_gone_without_a_word(text, found, monkeypatch):
    ticks = iter(range(10))
    monkeypatch.setattr("minigpt.core.world.time", SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda s: None))
    e = worlds(2)[0].explain(RuntimeError(text))
    assert type(e) is RankLost and e.code == Exit.MISSING and e.found == found and "--resume" in e.fix


def test_a_store_that_has_gone_is_no_second_fault(monkeypatch):
    """The store may have died with what hosted it: then nothing is known, and that is said."""
    world = worlds(2)[1]

    def gone(*args):
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(world, "_store", SimpleNamespace(check=gone, get=gone, set=gone))
    assert type(leave_with(world, dist.DistNetworkError("Broken pipe"))) is RankLost


@pytest.mark.parametrize(
    "e", [RuntimeError("expected scalar type Float but found Half"), ValueError("Connection"), Diverged("it is over")]
)
def test_other_faults_are_not_taken_for_a_lost_process(e):
    assert worlds(2)[0].explain(e) is None
    assert World().explain(RuntimeError("Connection closed by peer")) is None


def test_ends_that_all_agreed_on_leave_no_word_of_a_fault(monkeypatch):
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    members = worlds(2)
    found = at_once(members, lambda w: leave_with(w, Diverged("three in a row")))
    assert [(e.message, e.local) for e in found] == [("three in a row", False)] * 2
    assert not members[0]._store.check(["fault/0"]) and not members[0]._store.check(["fault/1"])


# ---------------------------------------------------------------------------------------------- numbers


@pytest.fixture
def gloo(monkeypatch):
    """A gloo group a thread in place of the one group a process has."""
    own = threading.local()

    def join(world):
        own.group = dist.ProcessGroupGloo(world._store, world.rank, world.size, timedelta(seconds=world.timeout))

    monkeypatch.setattr(dist, "all_reduce", lambda t: own.group.allreduce([t]).wait())
    monkeypatch.setattr(dist, "all_gather", lambda out, t: own.group.allgather([out], [t]).wait())
    return join


@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_in_double_precision_and_the_same_bits_everywhere(gloo, size):
    def work(world):
        gloo(world)
        return world.sum([2.0**40 + world.rank, 1e-9 * (world.rank + 1), float(world.rank)])

    found = at_once(worlds(size), work)
    assert all(f == found[0] for f in found)
    ranks = size * (size - 1) / 2
    assert found[0] == [size * 2.0**40 + ranks, pytest.approx(1e-9 * (ranks + size), rel=1e-12), ranks]


def test_gathered_tensors_are_in_the_order_of_ranks(gloo):
    def work(world):
        gloo(world)
        return [t.item() for t in world.gather(dist_tensor(world.rank))]

    assert at_once(worlds(3), work) == [[0, 1, 2]] * 3


def dist_tensor(value):
    import torch

    return torch.tensor(value)


def test_a_process_that_hangs_is_noticed_within_the_timeout(gloo):
    """Rank 1 never comes to the reduction: rank 0 says so after --rank-timeout and a second for an explanation."""
    done = threading.Event()

    def work(world):
        gloo(world)
        world.sum([1.0])
        if world.rank == 1:
            done.wait(20)
            return None
        began = time.monotonic()
        try:
            world.sum([1.0])
        except RankLost as e:
            return e, time.monotonic() - began
        finally:
            done.set()

    e, seconds = at_once(worlds(2, timeout=1.0), work)[0]
    assert "does not answer" in e.message and "Timed out" in e.found and 0.9 < seconds < 4
