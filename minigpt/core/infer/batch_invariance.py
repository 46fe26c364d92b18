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
PROBED = 64  # rows of a measurement
DISTINCT = 64  # rows of its matrix; the others repeat them
LAST_SEEN = (15, 47, 63, 90, 127, 170, 191, 255, 340)  # of a text of so many tokens, beside longer ones
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
        dtype = self._model.head_weight.dtype
        return (
            all(_same_product(make, shape, dtype, rows) for make, shape in products(self._model))
            and all(_same_rows(gated, 2 * width, dtype, rows) for width in gated_widths(self._model, True))
            and all(_same_rows(F.silu, width, dtype, rows) for width in gated_widths(self._model, False))
            and all(
                _same_attention(m.heads, m.kv_heads, m.head_dim, kind, rows)
                for m in mixers(self._model)
                for kind in {dtype, torch.float32}  # which it computes in: results in 16 bits would hide its rounding
            )
        )


def plain(weight: Tensor) -> Product:
    """The product that a layer makes of a matrix which nobody laid out."""
    return functools.partial(F.linear, weight=weight)


def products(model: Decoder) -> Iterator[tuple[Callable[[Tensor], Product], tuple[int, int]]]:
    """Each kind and shape of product in a model: how one is made of a matrix (N, K), and (N, K)."""
    kinds: set[tuple[Callable[[Tensor], Product], tuple[int, int]]] = set()
    laid_out = [getattr(m, name, None) for m in model.modules() for name in ("fused", "o_proj", "down_proj")]
    for made in [*laid_out, model.packed_head]:
        if isinstance(made, Packed) and not isinstance(made, Int8Linear):  # which adds whole numbers, exactly
            kinds.add((type(made), (made.outputs, made.inputs)))
        elif isinstance(made, Joined):
            kinds.add((plain, (made.weight.shape[0], made.weight.shape[1])))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kinds.add((plain, (module.out_features, module.in_features)))
    if model.packed_head is None:
        kinds.add((plain, (model.head_weight.shape[0], model.head_weight.shape[1])))
    yield from kinds


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up, as of a fused product. Numbers that fill no vector are computed one by one, and otherwise."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gated_widths(model: Decoder, fused: bool) -> set[int]:
    """Intermediate sizes of the layers whose gate and up are one product, or are none."""
    layers = (m.down_proj for m in model.modules() if isinstance(m, MLP) and (m.fused is not None) is fused)
    return {down.inputs if isinstance(down, Packed) else down.in_features for down in layers}


def mixers(model: Decoder) -> Iterator[Attention]:
    """One attention of each shape."""
    yield from {(m.heads, m.kv_heads, m.head_dim): m for m in model.modules() if isinstance(m, Attention)}.values()


def _same_product(make: Callable[[Tensor], Product], shape: tuple[int, int], dtype: torch.dtype, rows: int) -> bool:
    """`_same_rows` of a product whose sums come out as nothing but their rounding, which another order changes.

    Of random numbers 16-bit results would hide it: they round most sums alike, whatever the order.
    """
    outputs, width = shape
    generator = torch.Generator().manual_seed(0)
    half, places = width // 2, torch.randperm(width, generator=generator)

    def cancelling(count: int, sign: float) -> Tensor:
        """(count, K): each number of one half stands in the other half as well, times `sign`."""
        size = torch.exp2(torch.randint(-6, 7, (count, half), generator=generator).float())
        numbers = torch.randn(count, half, generator=generator) * size
        out = torch.zeros(count, width)
        out[:, places[:half]], out[:, places[half : 2 * half]] = numbers, numbers * sign
        return out.to(dtype)

    weight = cancelling(DISTINCT, -1.0).repeat(-(-outputs // DISTINCT), 1)[:outputs]
    return _same(make(weight), cancelling(PROBED, 1.0), rows)


def _same_rows(compute: Product, width: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether `rows` rows come out as they do by REFERENCE_ROWS, wherever among those they stand."""
    return _same(compute, torch.randn(PROBED, width, generator=torch.Generator().manual_seed(0)).to(dtype), rows)


def _same(compute: Product, x: Tensor, rows: int) -> bool:
    few = torch.cat([compute(part) for part in x.split(REFERENCE_ROWS)])
    if rows == REFERENCE_ROWS:
        turned = torch.cat([compute(part.roll(1, 0)).roll(-1, 0) for part in x.split(REFERENCE_ROWS)])
        return torch.equal(turned, few)
    whole = len(x) // rows * rows
    return torch.equal(torch.cat([compute(part) for part in x[:whole].split(rows)]), few[:whole])


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

    fewest = _fewest_keys(heads, kv_heads, dim, dtype)
    few = torch.cat([read(i, i + REFERENCE_ROWS, fewest) for i in range(0, count, REFERENCE_ROWS)])[:rows]
    return all(torch.equal(read(0, rows, keys), few) for keys in (fewest, MANY_KEYS))


def fewest_keys(model: Decoder) -> int:
    """The fewest keys that a step must read, so that reading more changes no bit; a GPU is not measured."""
    if model.head_weight.device.type != "cpu":
        return STEP
    kinds = {model.head_weight.dtype, torch.float32}
    return max(_fewest_keys(m.heads, m.kv_heads, m.head_dim, kind) for m in mixers(model) for kind in kinds)


@functools.cache
@torch.inference_mode()
def _fewest_keys(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    q, k, v, _ = _attention_inputs(REFERENCE_ROWS, heads, kv_heads, dim, dtype)

    def read(last: int, keys: int) -> Tensor:
        seq = SeqInfo(torch.full((REFERENCE_ROWS, 1), last), q, q, cached=True)
        return attend(q, k[:, :, :keys], v[:, :, :keys], seq)

    many = {last: read(last, MANY_KEYS) for last in LAST_SEEN}

    def same(keys: int) -> bool:
        return all(torch.equal(read(last, keys), many[last]) for last in LAST_SEEN if last < keys)

    return min(takewhile(same, range(MANY_KEYS - STEP, 0, -STEP)), default=MANY_KEYS)


def _attention_inputs(
    rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, heads, 1, dim), k and v (B, kv_heads, MANY_KEYS, dim), position (B, 1): so early that any read sees it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, 1, dim, generator=generator)
    k, v = torch.randn(2, rows, kv_heads, MANY_KEYS, dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.full((rows, 1), STEP - 1)
