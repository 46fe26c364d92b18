"""What to train on this machine: each size with its speed, measured where that takes a moment, and the one to try.

Sizes are looked at from the smallest on. What one reaches of operations a second tells about how fast the next will be:
whether it is worth measuring, and, when there is no time for that, its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minigpt.core.models.config import ModelConfig
from minigpt.core.models.flops import train_flops
from minigpt.core.models.folder import create
from minigpt.core.models.presets import PRESETS
from minigpt.core.train.defaults import suggested_batch, suggested_rows
from minigpt.core.train.memory import estimate, parameters

# Of the speed of a large matrix product, the part that a training step reaches: what there is to go by before the first
# step is measured. 0.21 for 3m and 0.12 for 1m on the processor of docs/benchmarks.md; not measured on a GPU.
SHARE = 0.2
PATIENCE = 3 * 3600  # seconds that the suggested run may take
TOKENS_A_PARAMETER = 20  # Hoffmann et al., 2022, arXiv:2203.15556
VOCABULARY = 6400  # of a preset that leaves it to the data
MEMORY_SHARE = 0.8  # of what is free: the estimate is rough
GROWTH = 2  # a larger model reaches up to so many times the operations a second of a smaller one
TIME, ATTEMPT, STEP = 6.0, 2.0, 0.5  # seconds: of all measurements, of one after its first step, of a step at most
MEASURED = "measured"


@dataclass(frozen=True)
class Room:
    """Where the training is to fit. flops: of a large matrix product, a second. free: bytes, None = unknown."""

    device: str
    dtype: str
    flops: float
    free: int | None


@dataclass(frozen=True)
class Plan:
    """One preset on this machine. speed: `measured`, or what its tokens a second are estimated from."""

    size: str
    parameters: int
    device: str
    dtype: str
    batch_size: int  # rows computed at once
    max_len: int
    memory_bytes: int
    tokens: int  # 20 a parameter
    tokens_per_second: int
    seconds: int
    speed: str
    command: str


@dataclass(frozen=True)
class Fit:
    """How a preset is trained here. rows: computed at once; usual: as many as a run takes where memory is no matter."""

    name: str
    config: ModelConfig
    count: int  # parameters
    length: int  # tokens of a row
    rows_per_step: int
    rows: int
    usual: int
    memory_bytes: int

    @property
    def operations(self) -> float:
        """Of one token, forward and backward."""
        return train_flops(self.config, self.length / 2)


Measure = Callable[[Fit, float], float | None]  # (size, operations a second to expect) → tokens a second, if known


def plans(room: Room, measure: Measure) -> Iterator[Plan]:
    """The presets that fit, the smallest first, up to the first that takes too long."""
    reached, source = SHARE * room.flops, "a matrix product"
    for fit in sorted(filter(None, (fitting(name, room) for name in PRESETS)), key=lambda fit: fit.count):
        tokens = TOKENS_A_PARAMETER * fit.count
        speed, how = reached / fit.operations, f"estimated from {source}"
        if tokens / speed <= GROWTH * PATIENCE or source not in PRESETS:
            measured = measure(fit, reached)
            if measured is not None:
                speed, how, reached, source = measured, MEASURED, measured * fit.operations, fit.name
        smaller = f" --batch-size {fit.rows}" if fit.rows < fit.usual else ""
        command = f"minigpt pretrain -d FILE --size {fit.name}{smaller}"
        yield Plan(
            fit.name, fit.count, room.device, room.dtype, fit.rows, fit.length, fit.memory_bytes, tokens, round(speed),
            round(tokens / speed), how, command,
        )  # fmt: skip
        if tokens / speed > PATIENCE:
            return


def best(found: Sequence[Plan]) -> Plan | None:
    """The largest preset that sees 20 tokens a parameter within three hours; else the smallest."""
    quick = [plan for plan in found if plan.seconds <= PATIENCE]
    return quick[-1] if quick else next(iter(found), None)


def fitting(name: str, room: Room) -> Fit | None:
    """One preset in this room; None when it does not fit.

    Fits: needs at most 80 % of what is free with the rows a run computes at once by itself, halved as often as
    necessary.
    """
    config = create(name, PRESETS[name].get("vocab_size", VOCABULARY))
    count, length = parameters(config), PRESETS[name]["max_len"]
    step = suggested_batch(count, 10**9, length, "pretrain") // length  # rows, of a corpus without end
    usual = rows = min(suggested_rows(length, room.device), step)

    def needed() -> int:
        return estimate(config, rows, length, room.dtype, "adamw", room.device, context=length).total

    while room.free is not None and needed() > MEMORY_SHARE * room.free:
        if rows == 1:
            return None
        rows //= 2
    return Fit(name, config, count, length, step, rows, usual, needed())


def measuring(seconds: float = TIME) -> Measure:
    """Three training steps of each size that is asked for, until `seconds` have passed; then nothing more is known."""
    end = time.perf_counter() + seconds

    def measure(fit: Fit, reached: float) -> float | None:
        from minigpt.core.errors import is_out_of_memory
        from minigpt.core.runtime import Runtime, free_after_failure
        from minigpt.core.train.step_speed import step_speed

        left = end - time.perf_counter()
        if left <= 0:
            return None
        affordable = int(STEP * reached / (fit.operations * fit.length))
        rows = max(1, min(fit.rows, affordable))
        try:
            return step_speed(
                fit.config,
                Runtime.open(),
                rows=rows,
                max_len=fit.length,
                micro_batches=fit.rows_per_step / rows,
                seconds=min(left, ATTEMPT),
            )
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            e.__traceback__ = None  # its frames hold what did not fit
            free_after_failure()
            return None

    return measure
