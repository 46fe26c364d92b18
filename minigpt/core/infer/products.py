"""Matrix products for sampling on a CPU: several at once, weights in the library's own layout, in 16 and in 8 bits.

Of 8 bits a row's bits never depend on how many rows there are: integers add up exactly in any order, and each of the
kernels that take turns rounds the same numbers the same way. Of the others `batch_invariance` measures it.

Shapes: N outputs · K inputs.
"""

from __future__ import annotations

import functools
import itertools
import platform
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.errors import DataError

LARGEST = torch.finfo(torch.float32).max  # steps a unit: a token of zeros stays one
CALL_OUT = 10e-6  # seconds that a call out of a compiled program costs
ROWS = (8, 16, 24, 32, 64, 128)  # from one of which another kernel of integers is the faster one
SHAPE = 704, 512  # of the matrix that they are timed with

X86 = platform.machine() in ("x86_64", "AMD64")
FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
FEW_INT8: Any = getattr(torch, "fbgemm_linear_int8_weight_fp32_activation", None) if FBGEMM else None
MANY_INT8: Any = torch.ops.onednn.qlinear_pointwise.default if FBGEMM and torch.backends.mkldnn.is_available() else None
ONEDNN: Any = torch.ops.mkldnn._linear_pointwise.default if X86 and torch.backends.mkldnn.is_available() else None
FP16: Any = torch.ops.quantized.linear_dynamic_fp16.default if FBGEMM else None  # None = not in this build of torch


class Joined:
    """x @ W.T for the rows of several matrices. No module: its weight is theirs, which have names in files."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Packed:
    """Weights in a layout that a compiler cannot look into: a compiled program can only call their product."""

    def __init__(self, weight: Tensor):
        self.outputs, self.inputs = weight.shape
        self.number = next(_numbers)
        _packed[self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's type."""
        return self.called(x) if torch.compiler.is_compiling() else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The work itself, in the types that the kernel takes."""
        raise NotImplementedError

    def called(self, x: Tensor) -> Tensor:
        """The same, out of a compiled program."""
        out: Tensor = torch.ops.minigpt.packed_product(x, self.number, self.outputs)
        return out


_numbers = itertools.count()
_packed: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_library = torch.library.Library("minigpt", "DEF")
_library.define("packed_product(Tensor x, int number, int outputs) -> Tensor")


@torch.library.impl(_library, "packed_product", "CPU")
def _packed_product(x: Tensor, number: int, outputs: int) -> Tensor:
    return _packed[number].product(x)


@torch.library.register_fake("minigpt::packed_product")
def _packed_product_shape(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


class BlockedLinear(Packed):
    """x @ W.T with W in oneDNN's own blocked layout, in W's type: the same numbers, read in the order of the product.

    weight: (N, K) float32 or bfloat16.
    """

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def product(self, x: Tensor) -> Tensor:
        """x: (..., K) in W's type. Returns (..., N) in that."""
        out: Tensor = ONEDNN(x, self.weight, None, "none", [], "")
        return out


class Int8Linear(Packed):
    """x @ W.T with both sides in 8 bits: a scale a row of W, and a scale a token found anew in every call.

    LLM.int8() without its outliers (Dettmers et al., 2022, arXiv:2208.07339).

    weight: (N, K) of any float type. packed: lay W out for FBGEMM and oneDNN; None = where this build of torch has
    them. Otherwise `torch._int_mm` multiplies, and it does so in a compiled program.
    """

    def __init__(self, weight: Tensor, packed: bool | None = None, compile: bool = False):
        super().__init__(weight)
        wide = weight.detach().float()
        size = wide.abs().amax(1) / weight_steps()  # (N,)
        steps = (wide / size[:, None]).nan_to_num_().round_().to(torch.int8)  # a row of zeros stays zeros
        self.scale = size / 127  # with that of x
        self.steps_a_side = torch.tensor(127.0)
        self.compile = compile
        few = packed or (packed is None and FEW_INT8 is not None)
        self.few = _FewRows(steps) if few else None
        self.many = _ManyRows(steps, self.scale) if few and MANY_INT8 is not None else None
        self.steps = None if few and not compile else steps
        self.fewest_compiled = fewest_for_int_mm() if few and compile else 0

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's type."""
        wide = x if x.dtype == torch.float32 else x.float()
        size = wide.abs().amax(-1, True)
        steps = (wide * (self.steps_a_side / size).clamp_max_(LARGEST)).round_()
        out = self.compiled(steps) if self.compile and torch.compiler.is_compiling() else self.product(steps)
        out = out.mul_(size)
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x: (..., K) whole numbers from -127 to 127 in float32. Returns (..., N) float32, with W's scales."""
        if self.few is None:
            return self._plain(x)
        if self.many is not None and x.shape[:-1].numel() >= fewest_for_onednn():
            return self.many(x)
        return self.few(x).mul_(self.scale)

    def compiled(self, x: Tensor) -> Tensor:
        """The same, in a compiled program."""
        if self.few is not None and x.shape[:-1].numel() < self.fewest_compiled:
            return self.called(x)
        return self._plain(x)

    def _plain(self, x: Tensor) -> Tensor:
        assert self.steps is not None, "laid out for FBGEMM alone"
        flat = x.to(torch.int8).view(-1, x.shape[-1])
        return (torch._int_mm(flat, self.steps.t()) * self.scale).view(*x.shape[:-1], -1)


@functools.cache
def weight_steps() -> int:
    """Steps of a weight on either side of zero, so many that the kernels of this CPU add up exactly.

    Without VNNI they add products of two bytes in pairs in 16 bits, where twice 255 * 127 does not fit, but 255 * 63.
    """
    most = torch.full((16, 64), 127, dtype=torch.int8)
    kernels: list[Callable[[Tensor], Tensor]] = [lambda x: torch._int_mm(x.to(torch.int8), most.t())]
    if FEW_INT8 is not None:
        kernels.append(_FewRows(most))
    if MANY_INT8 is not None:
        kernels.append(_ManyRows(most, torch.ones(len(most))))
    x = torch.full((32, 64), 127.0)
    return 127 if all((kernel(x) == 127 * 127 * 64).all() for kernel in kernels) else 63


@functools.cache
def fewest_for_onednn() -> int:
    """Rows from which oneDNN's product of integers is faster than FBGEMM's. Their bits are the same, so that a
    measurement that went wrong costs time alone.
    """
    scale = torch.ones(SHAPE[0])
    return _crossover(lambda steps: _ManyRows(steps, scale), 0.0) if MANY_INT8 is not None else sys.maxsize


@functools.cache
def fewest_for_int_mm() -> int:
    """Rows from which a compiled program's own product of integers is faster than a call out of it to FBGEMM."""
    return _crossover(lambda steps: lambda x: torch._int_mm(x.to(torch.int8), steps.t()), CALL_OUT)


def _crossover(make: Callable[[Tensor], Callable[[Tensor], Tensor]], advantage: float) -> int:
    """The first of ROWS at which that kernel takes less time than FBGEMM, and sys.maxsize where none does.

    advantage: seconds that it saves besides. Takes a few milliseconds.
    """
    steps = torch.randint(-63, 64, SHAPE, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    few, other = _FewRows(steps), make(steps)

    def faster(rows: int) -> bool:
        x = torch.ones(rows, SHAPE[1])
        return _seconds(other, x) < _seconds(few, x) + advantage

    return next((rows for rows in ROWS if faster(rows)), sys.maxsize)


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of the fastest of some calls, but for the first."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - began)
    return min(times[1:])


class _FewRows:
    """Products of whole numbers by FBGEMM. (Its newer operation takes 12 microseconds more to be called.)

    It rounds its input to 255 steps between the least and the largest number: two more inputs, which meet no weight,
    hold these at -128 and 127, so that a step is 1.
    """

    def __init__(self, steps: Tensor):
        padded = F.pad(steps, (0, 2))
        self.shape = padded[:1, :1].expand(padded.shape)  # of W; its numbers are in the packed one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both operations are deprecated, with nothing as fast in their place
            self.packed = torch.fbgemm_pack_quantized_matrix(padded)
            self.sums = steps.sum(1, dtype=torch.int32)
            self.bias = torch.zeros(len(steps))
            self(torch.zeros(1, steps.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., K) whole numbers from -127 to 127 in float32. Returns (..., N) float32."""
        x = torch.cat((x, _ends(x.shape[:-1])), -1)
        return FEW_INT8(x, self.shape, self.packed, self.sums, 1.0, 0, self.bias)


@functools.lru_cache(64)
def _ends(shape: tuple[int, ...]) -> Tensor:
    """The ends of FBGEMM's steps behind each of some tokens: (*shape, 2)."""
    return torch.tensor([-128.0, 127.0]).expand(*shape, 2)


class _ManyRows:
    """The same by oneDNN, scaled."""

    def __init__(self, steps: Tensor, scale: Tensor):
        self.packed = torch.ops.onednn.qlinear_prepack(steps, None)
        self.scale, self.zeros = scale, torch.zeros(len(scale), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        steps = x.to(torch.int8)
        return MANY_INT8(
            steps, 1.0, 0, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


class Fp16Linear(Packed):
    """x @ W.T with W in float16; x, sums and results are float32. Made for few rows, which wait for W to be read.

    weight: (N, K) of any float type. DataError where a number is too large for float16.
    """

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise DataError("a weight is too large for 16 bits", fix="leave --quant fp16 out")
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's type."""
        if torch.compiler.is_compiling():
            return self.called(x.float()).to(x.dtype)
        return self.product(x) if x.dtype == torch.float32 else self.product(x.float()).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        out: Tensor = FP16(x, self.weight)
        return out
