"""How the processes of a run share the work on one model. Which way was taken shows in no result and no file.

alone   one process.
ddp     every process has the whole model and computes some rows; gradients are summed (Li et al., 2020,
        arXiv:2006.15704). They lie in one buffer, in a fixed order, and are reduced once an optimizer step: torch's
        own DDP regroups them after the first step of a process, so that a resumed run would sum in another order.
fsdp    every process keeps a shard of each weight, gradient and moment, and a block's weights are whole only while it
        computes (Zhao et al., 2023, arXiv:2304.11277; torch's `fully_shard`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.core.runtime import Runtime
from minigpt.core.train.optim import Masters
from minigpt.core.train.sharded import whole
from minigpt.core.world import World


class Alone:
    """One process; and what all ways have in common."""

    loss_factor = 1.0  # what a summed loss is multiplied with, so that the reduced gradient is the sum

    def __init__(self, world: World, runtime: Runtime):
        self.world, self.runtime = world, runtime

    def masters(self, model: nn.Module) -> Masters:
        """The float32 weights behind a model; changes the model in place."""
        return Masters(model, self.runtime.dtype)

    def before_backward(self, last: bool) -> None:
        """last: this micro-batch is the step's last one."""

    def reduce(self) -> None:
        """Sum the gradients over all processes. Called once an optimizer step, after its last backward."""

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as if one process had them all. A collective; only rank 0's result is used."""
        return state

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Around calls of the model's methods other than forward. All processes must do the same in it."""
        yield


class Copies(Alone):
    """ddp"""

    def masters(self, model: nn.Module) -> Masters:
        masters = super().masters(model)
        self._gradients = masters.join_gradients()
        return masters

    def reduce(self) -> None:
        self.world.reduce(self._gradients)


class Shards(Alone):
    """fsdp. Blocks are gathered one at a time; embedding, last norm and head once a forward."""

    def __init__(self, world: World, runtime: Runtime):
        super().__init__(world, runtime)
        self.loss_factor = float(world.size)  # reduce-scatter takes the mean

    def masters(self, model: nn.Module) -> Masters:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        narrow = None if self.runtime.dtype == torch.float32 else self.runtime.dtype
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.runtime.device.type, (self.world.size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32),
        }
        # torch warns of results that are views, since changing them in place would break its backward; nobody does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        for block in model.model.layers:  # type: ignore[union-attr]
            fully_shard(block, **options)
        fully_shard(model, **options)
        self.model = model
        return Masters(model, torch.float32)  # the shards are the masters; torch casts what it gathers

    def before_backward(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in state.items():
            full = whole(tensor)
            if self.world.leads:  # the others let go of it at once
                found[name] = full.cpu()
        return found

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        self.model.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.reshard()  # type: ignore[operator]


def choose(name: str, world: World, runtime: Runtime) -> Alone:
    """name: `ddp` or `fsdp`; both mean nothing for one process."""
    if world.size == 1:
        return Alone(world, runtime)
    return {"ddp": Copies, "fsdp": Shards}[name](world, runtime)
