"""Batch invariance: with how many rows in a forward a row has the bits that it has with any other number.

Matrix libraries choose their kernel by the sizes, and another kernel adds in another order. Which numbers of rows and
of keys share their bits differs between processors, types, shapes and builds, so it is measured here, for every kind of
product that the model at hand uses, and nothing is assumed.

Shapes: B rows · K inputs of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.infer.cache import STEP
from minigpt.core.infer.products import Int8Linear, Joined, Packed
from minigpt.core.models.decoder import Decoder
from minigpt.core.nn.attend import attend
from minigpt.core.nn.attention import Attention
from minigpt.core.nn.layers import MLP
from minigpt.core.nn.seqinfo import SeqInfo

REFERENCE_ROWS = 4  # whose bits all others are compared with: every library has a kernel for so many
BATCH_SIZES = (*range(1, 17), 18, 20, 24, 28, 32, 36, 40, 48, 56, 64)
MANY_KEYS = 512  # of which attention surely has the kernel that it has for more
Product = Callable[[Tensor], Tensor]


class BatchInvariance:
    """The batch sizes at which every row of a forward of this model has the bits of REFERENCE_ROWS rows.

    Only what is asked about is measured, once: each answer costs about the products of one forward of that size. A GPU
    is not measured: its kernels change with the number of rows in ways that smaller batches would not cure.
    """

    def __init__(self, model: Decoder):
        self._model = model
        self._same: dict[int, bool] = {}

    @property
    def exact(self) -> bool:
        """Whether anything holds to the bit here; False = to rounding, and batches are what they are."""
        return self._model.head_weight.device.type == "cpu" and self.holds(REFERENCE_ROWS)

    def padded(self, count: int) -> int:
        """The smallest padded batch for so many rows; `count` may be at most what `largest` says."""
        if not self.exact:
            return count
        return next((n for n in BATCH_SIZES if n >= count and self.holds(n)), count)

    def largest(self, count: int) -> int:
        """How many of `count` rows can be in one forward."""
        if not self.exact or any(self.holds(n) for n in BATCH_SIZES if n >= count):
            return count
        return max(n for n in BATCH_SIZES if n <= count and self.holds(n))

    def holds(self, rows: int) -> bool:
        """Whether a row has the same bits among so many as among REFERENCE_ROWS."""
        if rows not in self._same:
            self._same[rows] = self._measure(rows)
        return self._same[rows]

    @torch.inference_mode()
    def _measure(self, rows: int) -> bool:
        weight = self._model.head_weight
        same = all(_same_rows(compute, width, weight.dtype, rows) for compute, width in products(self._model))
        return same and all(
            _same_attention(m.heads, m.kv_heads, m.head_dim, weight.dtype, rows) for m in mixers(self._model)
        )


def products(model: Decoder) -> Iterator[tuple[Product, int]]:
    """One product of each kind and shape in a model, and what it takes: the width of its input."""
    kinds: dict[object, tuple[Product, int]] = {}
    fused = [getattr(m, name, None) for m in model.modules() for name in ("fused", "o_proj", "down_proj")]
    for made in [*fused, model.packed_head]:
        if isinstance(made, Packed) and not isinstance(made, Int8Linear):  # which adds whole numbers, exactly
            kinds[type(made), made.inputs, made.outputs] = made, made.inputs
        elif isinstance(made, Joined):
            kinds[tuple(made.weight.shape)] = made, made.weight.shape[1]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kinds[tuple(module.weight.shape)] = module, module.in_features
        if isinstance(module, MLP) and module.fused is None:
            # Numbers that fill no vector are computed one by one; of a fused product every row has its own.
            kinds["silu", module.gate_proj.out_features] = F.silu, module.gate_proj.out_features
    if model.packed_head is None:
        head = model.head_weight
        kinds[tuple(head.shape)] = functools.partial(F.linear, weight=head), head.shape[1]
    yield from kinds.values()


def mixers(model: Decoder) -> Iterator[Attention]:
    """One attention of each shape."""
    yield from {(m.heads, m.kv_heads, m.head_dim): m for m in model.modules() if isinstance(m, Attention)}.values()


def _same_rows(compute: Product, width: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether `rows` rows come out as they do by REFERENCE_ROWS, wherever among those they stand."""
    count = -(-rows // REFERENCE_ROWS) * REFERENCE_ROWS
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = torch.cat([compute(part) for part in x.split(REFERENCE_ROWS)])
    turned = torch.cat([compute(part.roll(1, 0)).roll(-1, 0) for part in x.split(REFERENCE_ROWS)])
    return torch.equal(compute(x[:rows]), few[:rows]) and torch.equal(turned, few)


@functools.cache
@torch.inference_mode()
def _same_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rows: int) -> bool:
    """The same of attention, which multiplies each row by keys of its own, at few keys and at many."""
    count = -(-rows // REFERENCE_ROWS) * REFERENCE_ROWS
    q, k, v, last = _attention_inputs(count, heads, kv_heads, dim, dtype)

    def read(begin: int, end: int, keys: int) -> Tensor:
        part = q[begin:end]
        return attend(
            part, k[begin:end, :, :keys], v[begin:end, :, :keys], SeqInfo(last[begin:end], part, part, cached=True)
        )

    fewest = _fewest_keys(heads, kv_heads, dim)
    few = torch.cat([read(i, i + REFERENCE_ROWS, fewest) for i in range(0, count, REFERENCE_ROWS)])[:rows]
    return all(torch.equal(read(0, rows, keys), few) for keys in (fewest, MANY_KEYS))


def fewest_keys(model: Decoder) -> int:
    """The fewest keys that a step must read, so that reading more changes no bit; a GPU is not measured."""
    if model.head_weight.device.type != "cpu":
        return STEP
    return max(_fewest_keys(m.heads, m.kv_heads, m.head_dim) for m in mixers(model))


@functools.cache
@torch.inference_mode()
def _fewest_keys(heads: int, kv_heads: int, dim: int) -> int:
    q, k, v, last = _attention_inputs(REFERENCE_ROWS, heads, kv_heads, dim, torch.float32)

    def read(keys: int) -> Tensor:
        return attend(q, k[:, :, :keys], v[:, :, :keys], SeqInfo(last, q, q, cached=True))

    many = read(MANY_KEYS)
    same = takewhile(lambda keys: torch.equal(read(keys), many), range(MANY_KEYS - STEP, 0, -STEP))
    return min(same, default=MANY_KEYS)


def _attention_inputs(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, heads, 1, dim), k and v (B, kv_heads, MANY_KEYS, dim), position (B, 1): so early that any read sees it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, 1, dim, generator=generator)
    k, v = torch.randn(2, rows, kv_heads, MANY_KEYS, dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.full((rows, 1), STEP - 1)
