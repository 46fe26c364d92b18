"""Tensors that lie in parts in several processes (torch's DTensor), and those that do not, by the same words.

DTensor is known by its method: importing its module takes half a second, which only sharded runs should pay.
"""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process. A collective when it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes have, cut as `like` is. Nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
