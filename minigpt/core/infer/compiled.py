"""One decoding step through torch.compile, in few shapes: each of them takes a compiler some seconds, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt.core.errors import MissingError
from minigpt.core.infer.cache import Pool, Slots, stepped
from minigpt.core.models.decoder import Decoder

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
FEWEST_KEYS = 256  # of pages
SHAPES = 64  # that are kept; torch's own limit is for programs that compile by mistake


def rounded(count: int) -> int:
    """The number of rows of which so many are computed: few numbers, since each is a program of its own."""
    return next((n for n in ROWS if n >= count), count)


class CompiledStep:
    """The logits of the next token, (B, V), for rows 0 … B of a cache.

    Rows are rounded up to steps of about two; in slots one program serves any number of keys. Operations between
    products become one, so a row's bits may depend on how many there are: the same text at any load holds to rounding
    only.

    MissingError where there is nothing to compile with.
    """

    def __init__(self, model: Decoder, pool: Pool):
        _need_compiler(model.head_weight.device)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)

        def step(ids: Tensor, position_ids: Tensor, seen: Tensor, places: Tensor | None) -> Tensor:
            window = pool.window(0, position_ids, len(seen), places)
            return model.head(model.hidden(ids, position_ids, window)[:, 0])

        step.__code__ = step.__code__.replace()  # programs belong to a code object: another model's has its own
        self._model, self._pool, self._dtype = model, pool, model.head_weight.dtype
        options: dict[str, Any] = {
            "cpp_wrapper": model.head_weight.device.type == "cpu",
            "guard_filter_fn": _but_of_the_model,
        }
        self._step = torch.compile(step, dynamic=False, options=options)

    def __call__(self, ids: Tensor, position_ids: Tensor, seen: int) -> Tensor:
        """ids, position_ids: (B, 1), B `rounded`. seen: a bound of the positions, exclusive."""
        keys = stepped(seen)
        if not isinstance(self._pool, Slots):  # a program for each number of pages: few of them
            keys = max(FEWEST_KEYS, 1 << (keys - 1).bit_length())
        self._pool.prepare(ids.shape[0], keys)
        self._model.rotary.table(ids.device, self._dtype, keys)  # it grows outside of the program
        length = torch.empty(keys, device="meta")
        torch._dynamo.maybe_mark_dynamic(length, 0)
        return self._step(ids, position_ids, length, self._pool.places(0, ids.shape[0], keys))


def _but_of_the_model(guards: Sequence[Any]) -> list[bool]:
    """Which of the things that a program was compiled for are looked at in every call. No modules and none of a model's
    layers: they stay as they are, and looking takes a tenth of a step. Its table of rotary angles grows.
    """
    fixed = (guard.name.startswith("G[") or "model" in guard.name.split(".")[0] for guard in guards)
    return [not (settled and "rotary" not in guard.name) for settled, guard in zip(fixed, guards, strict=True)]


def _need_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise MissingError("--compile needs a C++ compiler", fix="install g++ or clang, or leave it out") from None
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise MissingError("--compile needs Triton on a GPU", fix="pip install triton, or leave it out")
