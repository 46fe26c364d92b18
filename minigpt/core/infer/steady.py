"""Within which sizes of products a row's bits do not depend on what else is computed.

Matrix libraries choose their kernel by the sizes, and another kernel adds in another order. Up to some number of rows
it is the same one, and from some number of keys on; both are measured, since they differ between processors, types,
shapes and builds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.infer.cache import STEP
from minigpt.core.infer.products import Joined
from minigpt.core.models.decoder import Decoder
from minigpt.core.nn.attend import attend
from minigpt.core.nn.attention import Attention
from minigpt.core.nn.layers import MLP
from minigpt.core.nn.seqinfo import SeqInfo

FEWEST_ROWS = 4  # products of fewer rows often have kernels of their own
COUNTS = (5, 6, 7, 8, 9, 12, 15, 16, 20, 24, 31, 32, 33, 36, 48, 63, 64)  # on either side of where kernels change
MANY_KEYS = 512  # of which attention surely has the kernel that it has for more


@torch.inference_mode()
def steady_rows(model: Decoder) -> int:
    """The most rows of a forward at which every weight gives the bits of FEWEST_ROWS rows; without a limit on a GPU,
    whose kernels change with the number of rows in ways that smaller groups would not cure.
    """
    if model.head_weight.device.type != "cpu":
        return sys.maxsize
    found: list[Tensor] = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    fused = (getattr(m, "fused", None) for m in model.modules())
    found += [joined.weight for joined in fused if isinstance(joined, Joined)]
    if model.quantised_head is None:
        found.append(model.head_weight)
    rows = COUNTS[-1] if found else sys.maxsize
    for weight in {tuple(w.shape): w for w in found}.values():
        rows = _steady(functools.partial(F.linear, weight=weight), weight.shape[1], weight.dtype, rows)
    for width in {m.gate_proj.out_features for m in model.modules() if isinstance(m, MLP) and m.fused is None}:
        # Numbers that fill no vector are computed one by one; of a fused product every row has its own.
        rows = _steady(F.silu, width, model.head_weight.dtype, rows)
    return rows


def _steady(compute: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, most: int) -> int:
    """The largest of COUNTS up to `most` before the bits change. compute: of (rows, width)."""
    x = torch.randn(most, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = torch.cat([compute(part) for part in x.split(FEWEST_ROWS)])
    counts = (n for n in COUNTS if n <= most)
    same = takewhile(lambda n: torch.equal(compute(x[:n]), few[:n]), counts)
    return max(same, default=FEWEST_ROWS)


def steady_keys(model: Decoder) -> int:
    """The fewest keys that a step must read, so that reading more changes no bit; see `steady_rows` for GPUs."""
    if model.head_weight.device.type != "cpu":
        return STEP
    mixers = (m for m in model.modules() if isinstance(m, Attention))
    return max(_steady_keys(m.heads, m.kv_heads, m.head_dim) for m in mixers)


@functools.cache
@torch.inference_mode()
def _steady_keys(heads: int, kv_heads: int, dim: int) -> int:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(FEWEST_ROWS, heads, 1, dim, generator=generator)
    k, v = torch.randn(2, FEWEST_ROWS, kv_heads, MANY_KEYS, dim, generator=generator)
    last = torch.full((FEWEST_ROWS, 1), STEP - 1)  # so many keys are there: they are read at any size

    def read(keys: int) -> Tensor:
        return attend(q, k[:, :, :keys], v[:, :, :keys], SeqInfo(last, q, q, cached=True))

    many = read(MANY_KEYS)
    same = takewhile(lambda keys: torch.equal(read(keys), many), range(MANY_KEYS - STEP, 0, -STEP))
    return min(same, default=MANY_KEYS)
