"""How fast a machine trains a model: real steps of a fresh one, on rows of made-up tokens."""

from __future__ import annotations

import statistics
import time

import torch

from minigpt.core.data.batch import Batch
from minigpt.core.groups import OptimConfig
from minigpt.core.models.config import ModelConfig
from minigpt.core.models.decoder import Decoder
from minigpt.core.runtime import Runtime, synchronise
from minigpt.core.train.losses import next_token
from minigpt.core.train.optim import Masters, Optimizer

STEPS = 3  # timed, after a first one that is not: it compiles and allocates
DOCUMENTS = 2  # in a row: attention does not cross their border


def step_speed(
    config: ModelConfig, runtime: Runtime, *, rows: int, max_len: int, micro_batches: float, seconds: float
) -> float:
    """Tokens a second of an optimizer step with the default optimizer. What it takes of memory is free again after.

    rows: computed at once, of `max_len` tokens. micro_batches: of so many rows a step, for each of which gradients are
    computed, and the weights moved once: one of them is timed, and the update.
    seconds: after so many no further step begins; one is timed in any case.
    """
    model = Decoder(config).to(runtime.device)
    masters = Masters(model, runtime.dtype)
    optimizer = Optimizer(masters.named, OptimConfig())
    batch = made_up(config.vocab_size, rows, max_len).to(runtime.device)
    began, timed = time.perf_counter(), list[float]()
    for step in range(STEPS + 1):
        computing, updating = _step(model, masters, optimizer, batch, runtime)
        if step:
            timed.append(computing * micro_batches + updating)
            if time.perf_counter() - began > seconds:
                break
    return rows * max_len * micro_batches / statistics.median(timed)


def _step(
    model: Decoder, masters: Masters, optimizer: Optimizer, batch: Batch, runtime: Runtime
) -> tuple[float, float]:
    """Seconds of a micro-batch's forward and backward, and of what follows once a step, as the trainer does it."""
    began = time.perf_counter()
    (next_token(model, batch).sum_loss / batch.units).backward()
    synchronise(runtime.device)
    computed = time.perf_counter()
    torch.nn.utils.get_total_norm(masters.gradients()).item()
    optimizer.step(1e-4)
    masters.publish()
    masters.zero_grad()
    synchronise(runtime.device)
    return computed - began, time.perf_counter() - computed


def made_up(vocab_size: int, rows: int, max_len: int) -> Batch:
    """Full rows of two documents each, every token of them learnt."""
    ids = torch.randint(vocab_size, (rows, max_len + 1), generator=torch.Generator().manual_seed(0))
    length = -(-max_len // DOCUMENTS)
    place = torch.arange(max_len).expand(rows, max_len)
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=(place % length).contiguous(),
        segments=place // length + DOCUMENTS * torch.arange(rows)[:, None],
        units=float(rows * max_len),
    )
