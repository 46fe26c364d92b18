"""Floating-point operations of a token, and what a GPU could do at best: the two sides of MFU.

Only matrix products count, and a multiply-add is two operations; norms, rotation, SiLU and softmax are left out, as in
PaLM's appendix B (Chowdhery et al., 2022, arXiv:2204.02311). Backward takes twice the operations of forward, since
every product needs the gradient of both its factors.

    MFU = tokens a second * train_flops(config, lengths) / peak_flops(device, dtype)

Model FLOPs utilisation leaves out what is computed a second time to save memory; with `grad_checkpoint=True` the count
has it, and the quotient is PaLM's hardware FLOPs utilisation.

No torch here. Shapes: C hidden_size · F intermediate_size · V vocab_size · H query heads · K key/value heads ·
D head_dim · l tokens of a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from minigpt.core.models.config import ModelConfig

# ---------------------------------------------------------------------------------------------- operations of a token


def mean_context(lengths: Iterable[int]) -> float:
    """Length of the document that the average token is in: sum of l^2 / sum of l, not the mean of l.

    lengths: tokens of every document of the packed rows; attention does not cross their borders.
    """
    import numpy as np

    known = np.asarray(lengths if hasattr(lengths, "__len__") else list(lengths), dtype=np.float64)  # may be millions
    return float(np.square(known).sum() / known.sum())


def forward_flops(config: ModelConfig, lengths: float | Iterable[int], *, labelled: float = 1.0) -> float:
    """Operations of one token in forward.

    lengths: of every document, or their `mean_context` if that is known.
    labelled: share of the tokens that have a label; no other goes through the head.
    """
    return config.num_hidden_layers * _layer(config, lengths) + labelled * _head(config)


def train_flops(
    config: ModelConfig, lengths: float | Iterable[int], *, labelled: float = 1.0, grad_checkpoint: bool = False
) -> float:
    """Operations of one token in forward and backward: three times those of forward.

    grad_checkpoint: backward computes the blocks again (not the head), which makes theirs four times.
    """
    layers = config.num_hidden_layers * _layer(config, lengths)
    return (4 if grad_checkpoint else 3) * layers + 3 * labelled * _head(config)


def _layer(config: ModelConfig, lengths: float | Iterable[int]) -> float:
    """One block: two operations a weight of its matrices, and attention.

    Queries times keys and weights times values are 2 D operations each, for every head and key that a query sees. Of
    its document's l keys that is half on average (the diagonal's 1 / 2 is left out, as FlashAttention counts, Dao,
    2023, arXiv:2307.08691, section 4.1): 2 * 2 D * H * l / 2.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_size
    attention = 2 * hidden * heads + 2 * hidden * config.kv_heads * config.head_size  # q, o · k, v
    context = lengths if isinstance(lengths, (int, float)) else mean_context(lengths)
    return 2 * (attention + 3 * hidden * config.intermediate_size) + 2 * heads * context


def _head(config: ModelConfig) -> float:
    """Logits: 2 C V, tied to the embedding or not; the embedding itself is a lookup."""
    return 2 * config.hidden_size * config.vocab_size


# ---------------------------------------------------------------------------------------------- peaks

# 1e12 operations a second: bfloat16, float16, float32.
PEAKS: dict[str, tuple[float | None, float | None, float | None]] = {
    "b200": (2250, 2250, 75),
    "gh200": (989.5, 989.5, 67),
    "h200": (989.5, 989.5, 67),
    "h200 nvl": (835.5, 835.5, 60),
    "h100": (989.5, 989.5, 67),  # SXM
    "h100 pcie": (756.5, 756.5, 51),
    "h100 nvl": (835.5, 835.5, 60),
    "h800": (989.5, 989.5, 67),
    "a100 sxm4": (312, 312, 19.5),
    "a100 pcie": (312, 312, 19.5),
    "a800 sxm4": (312, 312, 19.5),
    "a800 pcie": (312, 312, 19.5),
    "a40": (149.7, 149.7, 37.4),
    "a30": (165, 165, 10.3),
    "a10": (125, 125, 31.2),
    "a10g": (70, 70, 35),
    "l40s": (362, 362, 91.6),
    "l40": (181, 181, 90.5),
    "l4": (121, 121, 30.3),
    "t4": (None, 65, 8.1),
    "v100 sxm2": (None, 125, 15.7),
    "v100 pcie": (None, 112, 14),
    "v100s pcie": (None, 130, 16.4),
    "rtx 3080": (59.5, 59.5, 29.8),
    "rtx 3090": (71, 71, 35.6),
    "rtx 3090 ti": (80, 80, 40),
    "rtx 4080": (97.5, 97.5, 48.7),
    "rtx 4090": (165.2, 165.2, 82.6),
    "rtx 5080": (112.6, 112.6, 56.3),
    "rtx 5090": (209.5, 209.5, 104.8),
    "rtx a6000": (154.8, 154.8, 38.7),
    "rtx 6000 ada generation": (364.2, 364.2, 91.1),
    "mi300x": (1307.4, 1307.4, 163.4),
}
COLUMN = {"bfloat16": 0, "float16": 1, "float32": 2}
UNIMPORTANT = re.compile(r"nvidia|geforce|tesla|amd|instinct|\d+gb|hbm\d?e?")  # maker, line and memory


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations a second of dense matrix products at best; None for processors, unknown devices and parts of one.

    device_name: as `torch.cuda.get_device_name()` spells it. dtype: `bfloat16`, `torch.float16`, ...

    From NVIDIA's data sheets of B200 (HGX), GH200, H200, H100, A100, A800, A40, A30, A10, A10G, L40S, L40, L4, T4 and
    V100; the architecture white papers of GA102 (RTX 30, A6000), Ada (RTX 40) and RTX Blackwell (RTX 50); AMD's data
    sheet of MI300X. Where those print the figure for sparse matrices, half of it. Halves are multiplied with sums in
    float32, as torch does, which GeForce cards do at half the speed of float16 sums; float32 is without TF32, which
    torch leaves off. None where there is no hardware for the dtype.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    name = " ".join(word for word in words if not UNIMPORTANT.fullmatch(word))
    peak = PEAKS.get(name, (None, None, None))[COLUMN[dtype.removeprefix("torch.")]]
    return None if peak is None else peak * 1e12
