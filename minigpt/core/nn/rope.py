"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and its context extensions.

Linear scaling divides every frequency; YaRN (Peng et al., 2023, arXiv:2309.00071) divides the slow ones and leaves the
fast ones; `llama3` is the variant of Llama 3.1 (Dubey et al., 2024, arXiv:2407.21783). The formulas and the order of
their float32 operations are those of transformers' `ROPE_INIT_FUNCTIONS`, so frequencies agree to the last bits.

Shapes: B rows · T tokens · H heads · D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TABLE = 1024  # positions by which the table of cosines grows

RopeParameters = Mapping[str, Any]


def _default(rope: RopeParameters, dim: int) -> tuple[Tensor, float]:
    return 1.0 / _wave(rope, dim), 1.0


def _linear(rope: RopeParameters, dim: int) -> tuple[Tensor, float]:
    return 1.0 / _wave(rope, dim) / rope["factor"], 1.0


def _llama3(rope: RopeParameters, dim: int) -> tuple[Tensor, float]:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend between the two wavelengths."""
    inv_freq = 1.0 / _wave(rope, dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blend = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < context / high) * ~(wavelength > context / low)
    return torch.where(medium, blend, scaled), 1.0


def _yarn(rope: RopeParameters, dim: int) -> tuple[Tensor, float]:
    """A ramp over the dimensions, from extrapolation (fast) to interpolation (slow), and a factor on cos and sin."""
    factor, context, base = rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times over the original context."""
        return (dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    keep = 1 - ramp
    wave = _wave(rope, dim)
    return (1.0 / (factor * wave)) * (1 - keep) + (1.0 / wave) * keep, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def _wave(rope: RopeParameters, dim: int) -> Tensor:
    """theta^(2i/D): wavelength over 2 pi of each pair of dimensions, (D/2,) float32."""
    return rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


ROPE: dict[str, Callable[[RopeParameters, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """inv_freq (D/2,) float32 on the CPU, and the factor on cos and sin, of normalised `rope_parameters`."""
    return ROPE[rope["rope_type"]](rope, head_dim)


class RotaryEmbedding:
    """Turns positions into cos and sin. No module: casting a model to bfloat16 must not touch its frequencies."""

    def __init__(self, rope: RopeParameters, head_dim: int):
        self.inv_freq, self.attention_factor = frequencies(rope, head_dim)
        self._tables: dict[torch.dtype, Tensor] = {}

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids: (B, T). Returns cos, sin (B, T, 1, D) in `dtype`, half of sin negated as `rotate` wants it."""
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angle = position_ids[..., None, None].float() * self.inv_freq  # (B, T, 1, D/2)
        cos, sin = angle.cos() * self.attention_factor, angle.sin() * self.attention_factor
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    def looked_up(self, position_ids: Tensor, dtype: torch.dtype, end: int) -> tuple[Tensor, Tensor]:
        """The same from a table, for positions below `end`: one operation, and the same bits for a position wherever it
        stands. (A CPU computes the last cosines of a tensor one by one, and rounds them differently.)
        """
        cos, sin = self.table(position_ids.device, dtype, end)[position_ids].chunk(2, dim=-1)
        return cos, sin

    def table(self, device: torch.device, dtype: torch.dtype, end: int) -> Tensor:
        """cos and sin of every position below `end` and some more, (P, 1, 2D). It is kept, and grows."""
        table = self._tables.get(dtype)
        have = 0 if table is None or table.device != device else table.shape[0]
        if table is None or have < end:
            blocks = [] if table is None or not have else [table]
            for begin in range(have, end, TABLE):
                positions = torch.arange(begin, begin + TABLE, device=device)[None]
                blocks.append(torch.cat(self(positions, dtype), dim=-1)[0])
            table = self._tables[dtype] = torch.cat(blocks)
        return table


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle. x: (B, T, H, D). cos, sin: (B, T, 1, D) of RotaryEmbedding."""
    return _Rotate.apply(x, cos, sin) if x.requires_grad else _turn(x, cos, sin, 1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x cos ± swap(x) sin, in three passes over memory."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=sign)


class _Rotate(torch.autograd.Function):
    """Backward turns by the negated angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None
