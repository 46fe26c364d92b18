"""One answer in the making."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minigpt.core.errors import Diverged, MinigptError
from minigpt.core.infer.text import Detokenizer, StopText

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt.core.infer.cache import Piece
    from minigpt.core.infer.constraint import Constraint
    from minigpt.core.infer.sampling import SamplingParams

TopLogprobs = list[tuple[int, float]]  # token and nats, the likeliest first


def not_numbers() -> Diverged:
    """What ends an answer, and only this one, whose next token has no distribution."""
    return Diverged(
        "the model's logits are not numbers, so no token is likelier than another",
        fix="the weights are damaged, or 16 bits are too few for them: try --dtype float32, or an earlier step",
    )


@dataclass
class Completion:
    """One answer.

    ids: sampled tokens, without the one that ended it. text: without stop strings and special tokens.
    finish_reason: `stop`, or `length` when cut off by max_tokens or the end of the context.
    end_id: the token that ended it; None after a stop string or `length`.
    logprobs: nats, in the distribution that was sampled, of each of `ids` and then of `end_id`; empty unless asked for.
    top_logprobs: for the same tokens the likeliest ones of that distribution, as many as were asked for.
    """

    prompt_index: int
    ids: list[int]
    text: str
    finish_reason: str
    end_id: int | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """A sequence being made.

    prompt_index: for the caller. limit: of new tokens. key: of its random draws. ends: tokens that end it.
    streams: whether somebody reads its text as it comes. keys: names of the prompt's chunks. filled: prompt tokens
    computed. swapped: its past while it waits outside of the cache. fault: why it ended without being done; a request
    takes no other with it.
    """

    prompt_index: int
    prompt: Sequence[int]
    params: SamplingParams
    limit: int
    key: int
    ends: frozenset[int]
    detokenizer: Detokenizer
    stop: StopText
    constraint: Constraint | None = None
    streams: bool = True
    keys: list[bytes] = field(default_factory=list)
    filled: int = 0
    fault: MinigptError | None = None
    swapped: Piece | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    end_id: int | None = None

    @classmethod
    def failed(cls, fault: MinigptError, params: SamplingParams, detokenizer: Detokenizer) -> Request:
        """One that could not be made, so that its fault is handed over in turn."""
        return cls(0, (), params, 0, 0, frozenset(), detokenizer, StopText(()), fault=fault, finish_reason="error")

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def most(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.prompt) + self.limit

    def constrain(self, logits: Tensor) -> None:
        """Exclude what the form does not allow, in place. logits: (V,)."""
        if self.constraint is not None:
            self._follow(lambda constraint: constraint.mask(logits))

    def _follow(self, act: Callable[[Constraint], None]) -> None:
        try:
            if self.constraint is not None:
                act(self.constraint)
        except MinigptError as fault:
            self.fault, self.constraint = fault, None

    def accept(self, id: int) -> str:
        """Take one sampled id; a negative one says that the logits are not numbers. Returns the text it makes final."""
        out = ""
        if id < 0 and self.fault is None:
            self.fault, self.constraint = not_numbers(), None
        self._follow(lambda constraint: constraint.accept(id))
        if self.fault is not None:
            self.finish_reason = "error"
        elif id in self.ends:
            self.end_id, self.finish_reason = id, "stop"
        else:
            self.ids.append(id)
            if self.streams or self.params.stop:
                out = self.stop.add(self.detokenizer.add(id))
            else:  # decoding each token takes time, all at once next to none
                self.detokenizer.hold(id)
            if len(self.ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            out += self.stop.add(self.detokenizer.finish())
            out += self.stop.finish()
        if self.stop.hit:
            self.finish_reason = "stop"
        self.text.append(out)
        return out

    def completion(self) -> Completion:
        """The finished answer. Raises the request's fault."""
        if self.fault is not None:
            raise self.fault
        text, reason = "".join(self.text), self.finish_reason or "length"
        return Completion(
            self.prompt_index, self.ids, text, reason, self.end_id, self.logprobs, self.top_logprobs
        )  # fmt: skip
