"""How processes share the work on one model, seen from one of them: what it sends, and when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minigpt.core.data.source import PackedSource, eval_batches, plan_rows
from minigpt.core.groups import OptimConfig
from minigpt.core.report import Report
from minigpt.core.runtime import Runtime, seed_all
from minigpt.core.train.losses import next_token
from minigpt.core.train.optim import Masters, Optimizer
from minigpt.core.train.parallel import Alone, Copies, Shards, choose
from minigpt.core.train.run import Run
from minigpt.core.train.schedule import Schedule
from minigpt.core.train.sharded import is_sharded, part, whole
from minigpt.core.train.trainer import Hooks, Pace, Trainer
from minigpt.core.world import World
from tests.conftest import tiny
from tests.core.train.test_accumulation import Documents

CPU = Runtime(torch.device("cpu"), torch.float32)


class Mirror(World):
    """One of two processes; the other one computes exactly the same. Counts what would be sent, by dtype."""

    def __init__(self):
        super().__init__(rank=0, size=2)
        self.sent: list[torch.Tensor] = []

    def reduce(self, tensor):
        self.sent.append(tensor.clone())
        tensor.mul_(2)

    def gradients(self):
        """Sums of numbers, which are float64, left out."""
        return [t for t in self.sent if t.dtype != torch.float64]


def trainer(path, world, *, micro, parallel, dtype=torch.float32, clip=1.0):
    """A trainer on 8 rows a step of ragged documents; world 2 computes 4 of them."""
    seed_all(0)
    model = tiny("llama")
    runtime = Runtime(torch.device("cpu"), dtype)
    way = parallel(world, runtime)
    masters = way.masters(model)
    store = Documents()
    rows = plan_rows(store, "train", 48)
    return Trainer(
        model=model,
        masters=masters,
        optimizer=Optimizer(masters.named, OptimConfig()),
        schedule=Schedule(1e-3, 3, "constant", warmup=0),
        source=PackedSource(store, rows, rows_per_step=8, micro_rows=micro, seed=1, pad_id=0, world=world.size),
        step=next_token,
        run=Run(path),
        runtime=runtime,
        parallel=way,
        pace=Pace(total=3, log=1, eval=3, save=3, clip=clip),
        hooks=Hooks(lambda folder, weights: None),
        report=Report(),
    )


# ---------------------------------------------------------------------------------------------- choice


def test_one_process_takes_no_way_and_several_the_one_asked_for():
    assert type(choose("ddp", World(), CPU)) is Alone and type(choose("fsdp", World(), CPU)) is Alone
    assert type(choose("ddp", World(size=2), CPU)) is Copies and type(choose("fsdp", World(size=2), CPU)) is Shards


# ---------------------------------------------------------------------------------------------- ddp


@pytest.mark.parametrize(
    ("micro", "dtype"), [(4, torch.float32), (2, torch.float32), (1, torch.float32), (2, torch.bfloat16)]
)
def test_ddp_reduces_once_a_step_whatever_the_accumulation(micro, dtype, tmp_path):
    """All gradients in one float32 buffer, after the last of 1, 2 or 4 backwards; beside it only three numbers."""
    world = Mirror()
    t = trainer(tmp_path, world, micro=micro, parallel=Copies, dtype=dtype)
    for step in range(2):
        t.advance()
        (gradient,) = world.gradients()[step:]
        assert gradient.dtype == torch.float32 and gradient.numel() == sum(p.numel() for p in t.masters.named.values())
        assert gradient.norm() > 0
    assert [t.numel() for t in world.sent if t.dtype == torch.float64] == [1, 2] * 2  # units; loss and wish to stop


def test_what_is_reduced_is_the_whole_gradient_in_the_order_of_names(tmp_path):
    """Before the reduction the buffer holds this process's sum; after it the gradients are the sum over both."""
    world = Mirror()
    t = trainer(tmp_path, world, micro=2, parallel=Copies, clip=0.0)
    seen = {}
    t.optimizer.step = lambda lr: seen.update({n: p.grad.clone() for n, p in t.masters.named.items()})
    t.advance()
    (mine,) = world.gradients()
    both = torch.cat([g.flatten() for g in seen.values()])
    assert list(seen) == [n for n, _ in t.model.named_parameters()] and torch.equal(both, 2 * mine)


def test_two_processes_with_half_the_rows_are_one_with_all(tmp_path):
    """The two of them in turn, each with its own rows: their gradients add up to those of one process."""
    sums = []
    for rank in range(2):
        world = Mirror()
        t = trainer(tmp_path, world, micro=2, parallel=Copies)
        t.source.rank = rank
        world.sum = lambda values: [1.0] if len(values) == 1 else values  # loss units: divide by one
        t.advance()
        sums.append(world.gradients()[0])
    alone = trainer(tmp_path, World(), micro=8, parallel=Alone)
    (batch,) = alone.source.next_step()
    next_token(alone.model, batch).sum_loss.backward()
    for gradient, piece in zip(alone.masters.gradients(), (sums[0] + sums[1]).split(sizes(alone)), strict=True):
        assert (piece.view_as(gradient) - gradient).norm() <= 1e-5 * gradient.norm()


def sizes(t):
    return [p.numel() for p in t.masters.named.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_gradients_have_the_bits_of_separate_ones(dtype):
    """Over three micro-batches, and again in the next step: where a gradient lies changes nothing about it."""
    store = Documents()
    rows = plan_rows(store, "train", 48)
    models, found = [tiny("llama") for _ in range(2)], []
    joined, separate = (Masters(m, dtype) for m in models)
    buffer = joined.join_gradients()
    for masters, model in ((joined, models[0]), (separate, models[1])):
        source = PackedSource(store, rows, rows_per_step=6, micro_rows=2, seed=1, pad_id=0)
        for _ in range(2):
            for batch in source.next_step():
                next_token(model, batch).sum_loss.backward()
            found.append([g.clone() for g in masters.gradients()])
            if masters is joined:
                assert torch.equal(buffer, torch.cat([g.flatten() for g in masters.gradients()]))
            masters.zero_grad()
    assert buffer.count_nonzero() == 0  # the first optimizer step's gradients do not linger
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert len(ours) == len(theirs) == len(joined.named)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------------------- fsdp


class Recorder(nn.Module):
    """In place of a sharded model: which backwards were to send their gradients."""

    def __init__(self):
        super().__init__()
        self.asked: list[bool] = []

    def set_requires_gradient_sync(self, on):
        self.asked.append(on)


def test_fsdp_sends_gradients_with_the_last_backward_of_a_step_alone():
    way = Shards(World(size=2), CPU)
    way.model = Recorder()
    for i in range(4):
        way.before_backward(last=i == 3)
    assert way.model.asked == [False, False, False, True]
    way.reduce()  # is done by then


@pytest.mark.parametrize("size", [2, 4])
def test_fsdps_mean_over_processes_becomes_a_sum(size):
    """reduce-scatter gives the mean of the gradients: of losses that were multiplied with the number of processes."""
    losses = [3.0 * (rank + 1) for rank in range(size)]
    factor = Shards(World(size=size), CPU).loss_factor
    assert sum(loss * factor for loss in losses) / size == sum(losses)
    assert Copies(World(size=size), CPU).loss_factor == Alone(World(), CPU).loss_factor == 1


def test_the_loss_factor_reaches_the_gradient_and_not_the_loss(tmp_path):
    plain, scaled = (trainer(tmp_path, World(), micro=4, parallel=Alone) for _ in range(2))
    scaled.parallel.loss_factor = 4.0
    losses = [t._backward(t.source.next_step(), 0.5) for t in (plain, scaled)]
    assert losses[0] == losses[1]
    for a, b in zip(plain.masters.gradients(), scaled.masters.gradients(), strict=True):
        assert torch.equal(4 * a, b)


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_see_the_rows_of_one_process_in_its_order(size):
    """Rank r's i-th row is row r + i * ranks of the step, label for label; 10 rows do not divide among 4."""
    store = Documents()
    rows = plan_rows(store, "train", 48)

    def source(rank, world):
        return PackedSource(store, rows, rows_per_step=10, micro_rows=1, seed=1, pad_id=0, rank=rank, world=world)

    alone, ranks = source(0, 1), [source(r, size) for r in range(size)]
    for _ in range(3):
        whole_step, parts = alone.next_step(), [s.next_step() for s in ranks]
        assert sum(b.units for b in whole_step) == sum(b.units for p in parts for b in p)
        for k, batch in enumerate(whole_step):
            other = parts[k % size][k // size]
            assert other.rows == batch.rows
            assert torch.equal(other.input_ids, batch.input_ids) and torch.equal(other.labels, batch.labels)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_validation_rows_and_make_equally_many_batches(size):
    store = Documents()
    shares = [
        list(eval_batches(store, max_len=48, max_rows=7, micro_rows=2, pad_id=0, rank=r, world=size))
        for r in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(k for share in shares for b in share for k in b.rows) == list(range(7))


# ---------------------------------------------------------------------------------------------- tensors


def test_a_tensor_in_one_process_is_whole_and_its_own_part():
    x = torch.randn(4, 3)
    assert not is_sharded(x) and whole(x) is x and part(x, torch.zeros(4, 3)) is x


@pytest.mark.parametrize("way", [Alone, Copies])
def test_state_of_unsharded_ways_is_saved_as_it_is(way):
    state = {"a": torch.randn(3)}
    assert way(World(), CPU).whole_state(state) is state
