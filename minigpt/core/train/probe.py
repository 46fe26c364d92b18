"""How many rows to compute at once, found by trying: too few leave a device idle, too many do not fit."""

from __future__ import annotations

from collections.abc import Callable

from minigpt.core.errors import is_out_of_memory
from minigpt.core.runtime import free_after_failure

NEAR = 0.97  # of the best speed counts as the best: fewer rows take less memory


def fastest_rows(speed: Callable[[int], float], most: int, fits: Callable[[int], bool]) -> tuple[int, dict[int, float]]:
    """The fewest rows at once that are about as fast as any: 1, 2, 4, … are tried, up to `most`.

    speed: tokens a second of so many rows; may run out of memory, which ends the search. fits: whether it is worth a
    try; a processor that runs out of memory ends the program instead of the attempt.
    Returns the rows, and the speed of every number tried.
    """
    tried: dict[int, float] = {}
    rows = 1
    while rows <= most and (rows == 1 or fits(rows)):
        try:
            tried[rows] = speed(rows)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e) or not tried:
                raise
            e.__traceback__ = None  # its frames hold what did not fit
            free_after_failure()
            break
        if rows >= 4 and tried[rows] < NEAR * max(tried.values()):
            break  # slower again: caches are full
        rows *= 2
    best = max(tried.values())
    return next(n for n, found in tried.items() if found >= NEAR * best), tried
