"""How a request becomes live: it gets a row of the cache, and its prompt is computed a chunk at a time.

Prompts are computed alone, or filled up to one of few sizes with others of that size where that changes no bit of
theirs; and whole chunks are taken from an earlier prompt that began alike.

Shapes: B rows · C hidden_size · V vocab_size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.core.infer.batch_invariance import REFERENCE_ROWS
from minigpt.core.infer.cache import PAGE, Pool
from minigpt.core.infer.prefix import Prefixes, keys
from minigpt.core.infer.products import Int8Linear
from minigpt.core.infer.request import Request
from minigpt.core.models.decoder import Decoder

CHUNK = 256  # prompt tokens computed at once: bounds the memory of attention, and is what prompts can share
GRAIN = 16, 64  # to a multiple of which prompts are filled up where several are computed at once: on a CPU, elsewhere
BUDGET = 2 * CHUNK, 64 * CHUNK  # prompt tokens computed between two tokens of the answers that are being made
FIRST = 8 * CHUNK  # and, where more, before the first answer is begun: nobody waits meanwhile for a next token
assert CHUNK % PAGE == 0


class Prefill:
    """The queue, and the prompt that is being computed.

    live: those that are being answered, in the first rows of the cache; requests whose prompt is done join them.
    rows: most that are let in.
    """

    def __init__(self, model: Decoder, pool: Pool, prefixes: Prefixes, live: list[Request], rows: int):
        self._model, self._pool, self._prefixes, self._live, self._rows = model, pool, prefixes, live, rows
        self.waiting: deque[Request] = deque()
        self.filling: Request | None = None  # whose row is the one behind the live ones
        weight = model.head_weight
        self._device = weight.device
        # On a CPU only where products are of whole numbers, exact however many rows there are; of a single head
        # attention's bits depend on that.
        exact = isinstance(model.packed_head, Int8Linear) and weight.dtype == torch.float32
        elsewhere = self._device.type != "cpu"
        self._together = elsewhere or (exact and all(spec.heads > 1 for spec in model.cache_specs()))
        self._grain, self._budget = (GRAIN[elsewhere] if self._together else 1), BUDGET[elsewhere]

    def __call__(self) -> list[Tensor]:
        """Let requests in while there is room, and compute as much of their prompts as is due, in turn. Returns logits
        (n, V) of the first token of each n that became live together.
        """
        fresh: list[Tensor] = []
        budget = self._budget if self._live else max(self._budget, FIRST)
        while budget > 0 and (self.filling or self._let_in(bool(fresh))):
            request, row = self.filling, len(self._live)
            if request is None:  # it had been set aside, and is live again
                continue
            group, hidden = [request], self._remembered(request, row)
            if hidden is None:
                group += self._beside(request, min(budget, self._budget))
                size = self._filled_up(min(CHUNK, len(request.prompt) - request.filled))
                hidden = self._next_chunk(group, row, size)
                budget -= len(group) * size
            if request.filled == len(request.prompt):
                if len(group) == 1:
                    hidden = hidden.expand(REFERENCE_ROWS, -1)
                fresh.append(self._model.head(hidden)[: len(group)])
                self._live += group
                self.filling = None
        return fresh

    def _let_in(self, fresh: bool) -> bool:
        """Give the next request a row. False = none waits, or there is no room now. fresh: whether rows without a token
        stand behind the others; one that goes on must come before them.
        """
        if not self.waiting or len(self._live) >= self._rows:
            return False
        request, row = self.waiting[0], len(self._live)
        if (request.swapped is not None and fresh) or not self._open(request, row):
            return False
        self.waiting.popleft()
        if request.swapped is None:
            self.filling = request
        else:
            self._pool.put(row, 0, request.swapped)
            request.swapped = None
            self._live.append(request)
        return True

    def _open(self, request: Request, row: int) -> bool:
        """Reserve a row for a request; False = there is no room even without the prompts that are remembered."""
        at_once = len(request.prompt) + 1 if request.swapped is None else request.swapped.length + PAGE
        while not self._pool.open(row, request.most, min(at_once, request.most)):
            if not self._prefixes.forget():
                return False
        return True

    def _remembered(self, request: Request, row: int) -> Tensor | None:
        """Put the next chunk of a prompt into its row if it is known. Returns hidden (1, C) behind it."""
        begin = request.filled
        if begin == 0:
            request.keys = list(keys(request.prompt, CHUNK))
        known = self._prefixes.find(request.keys[begin // CHUNK])
        if known is None:
            return None
        self._pool.put(row, begin, known.piece)
        request.filled += known.piece.length
        return known.hidden

    def _beside(self, request: Request, budget: int) -> list[Request]:
        """Let in those who wait next as long as the whole of their prompts can be computed with all of this one."""
        size, together = self._filled_up(len(request.prompt)), [request]
        if not self._together or len(request.prompt) > CHUNK:
            return []
        while self.waiting and len(self._live) + len(together) < self._rows and (len(together) + 1) * size <= budget:
            other = self.waiting[0]
            if other.swapped is not None or len(other.prompt) > CHUNK or self._filled_up(len(other.prompt)) != size:
                break
            other.keys = list(keys(other.prompt, CHUNK))
            known = any(other.keys == one.keys for one in together) or self._prefixes.find(other.keys[0]) is not None
            if known or not self._open(other, len(self._live) + len(together)):  # a known prompt costs nothing, in turn
                break
            together.append(self.waiting.popleft())
        return together[1:]

    def _filled_up(self, length: int) -> int:
        """How many tokens are computed for so many: always the same number, whatever stands beside them."""
        return max(REFERENCE_ROWS, -(-length // self._grain) * self._grain)

    def _next_chunk(self, group: Sequence[Request], row: int, size: int) -> Tensor:
        """Compute the next chunk of prompts in consecutive rows, filled up to `size`. Returns hidden (B, C) behind
        each.
        """
        begin, parts = group[0].filled, [r.prompt[r.filled : r.filled + CHUNK] for r in group]
        ids = torch.tensor([[*part, *[0] * (size - len(part))] for part in parts], device=self._device)
        positions = torch.arange(begin, begin + size, device=self._device).expand(len(group), -1)
        window = self._pool.window(row, positions, begin + size)  # what fillers write is overwritten before it is read
        hidden = self._model.hidden(ids, positions, window)
        hidden = torch.stack([each[len(part) - 1] for each, part in zip(hidden, parts, strict=True)])
        for i, (request, part) in enumerate(zip(group, parts, strict=True)):
            self._prefixes.add(request.keys[begin // CHUNK], row + i, begin, len(part), hidden[i : i + 1])
            request.filled += len(part)
        return hidden
