"""What a run uses when its user names no number: learning rate, batch, rows at once. Recorded in config.yaml.

Rules of thumb, free of torch; the runs behind them are in docs/benchmarks.md.
"""

from __future__ import annotations

import math

from minigpt.core.report import Report

_STAGE_SHARE = {"pretrain": 1.0, "sft": 0.5}  # of the pretraining rate: fine-tuning starts from weights worth keeping
_FEWEST_STEPS = {
    "pretrain": 200,
    "sft": 50,
}  # an epoch: a small corpus gets a smaller batch rather than too few updates


def suggested_lr(parameters: int, stage: str) -> float:
    """A peak learning rate that trains well for a model of this size, two significant digits.

    Falls with size as N^-0.45 from 3e-3 at 3M parameters: near the published rates of 26M to 100M models.
    """
    peak = min(5e-3, 3e-3 * (3e6 / max(parameters, 1)) ** 0.45)
    return float(f"{peak * _STAGE_SHARE[stage]:.1e}")


def warn_lr(lr: float, parameters: int, stage: str, report: Report) -> None:
    """Say so when a learning rate is more than ten times off the stage's usual one."""
    usual = suggested_lr(parameters, stage)
    if lr > usual * 10:
        report.warn(
            f"--lr {lr:g} is far above the usual {usual:g} for {stage} at this size", fix="training may diverge"
        )
    elif 0 < lr < usual / 10:
        report.warn(
            f"--lr {lr:g} is far below the usual {usual:g} for {stage} at this size", fix="learning may be slow"
        )


def suggested_batch(parameters: int, rows: int, max_len: int, stage: str) -> int:
    """Tokens an optimizer step: 4k at 1M parameters growing as N^0.7 to 128k, in whole rows.

    Never so many that an epoch of `rows` rows has too few updates to learn from.
    """
    wanted = min(131_072.0, 4096 * (max(parameters, 1) / 1e6) ** 0.7)
    if stage == "sft":
        wanted /= 2
    most = max(1, rows // _FEWEST_STEPS[stage])
    return max_len * max(1, min(most, 2 ** round(math.log2(max(wanted / max_len, 1)))))


def suggested_rows(max_len: int, device: str) -> int:
    """Rows a device computes at once: enough tokens to keep it busy, few enough to fit."""
    return max(1, (32_768 if device == "cuda" else 4_096) // max_len)
