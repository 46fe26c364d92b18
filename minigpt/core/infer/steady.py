"""How many rows a product may have so that each row's bits do not depend on the others.

Matrix libraries choose their kernel by the number of rows, and another kernel adds in another order. Up to some number
of rows it is the same one; that number is measured, since it differs between processors, types, shapes and builds.
"""

from __future__ import annotations

import sys
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.infer.products import Joined
from minigpt.core.models.decoder import Decoder

FEWEST_ROWS = 4  # products of fewer rows often have kernels of their own
COUNTS = (5, 6, 7, 8, 9, 12, 15, 16, 20, 24, 31, 32, 33, 36, 48, 63, 64)  # on either side of where kernels change


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
        rows = _steady(weight, rows)
    return rows


def _steady(weight: Tensor, most: int) -> int:
    """The largest of COUNTS up to `most` before the bits change."""
    x = torch.randn(most, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    few = torch.cat([F.linear(part, weight) for part in x.split(FEWEST_ROWS)])
    counts = (n for n in COUNTS if n <= most)
    same = takewhile(lambda n: torch.equal(F.linear(x[:n], weight), few[:n]), counts)
    return max(same, default=FEWEST_ROWS)
