"""Whether what was written is the model it was made from: reload it, and compare logits and tokens.

What rounding to fewer bits changes is no fault of the conversion. It is reported, but held apart: the source is rounded
as the file is, and must then give the file's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt.core.convert import weights
from minigpt.core.data.batch import Batch
from minigpt.core.data.chat import render
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import CheckFailed, DataError
from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder

TOLERANCE = 1e-4  # of logits, as a share of the largest one, at least absolute: float32 in another order of operations
LONGEST = 256  # tokens a row of the probe
# Largest share of a tensor's norm that rounding takes away. Measured on normal numbers, times about three.
ROUNDING = {"float32": 1e-6, "f32": 1e-6, "float16": 1e-3, "f16": 1e-3, "bfloat16": 5e-3, "bf16": 5e-3, "q8_0": 2e-2,
            "q4_0": 0.25}  # fmt: skip

TEXTS = (
    "Hello, world! It's 3:45 pm; isn't it?",
    "The quick brown fox\n\n\tjumps over 13 lazy dogs.   Twice.",
    "春風又綠江南岸，明月何時照我還？",
    "今天天气很好。我们去公园散步吧！1234567 元",
    'def f(x: int) -> str:\n    return f"{x:>8.3f}" * 2  # done\n',
    "Grüße, naïve café — “quoted” … Ω≈ç√∫ 🙂👩‍👩‍👧‍👦 ½",
    "  two spaces, trailing too  ",
    "اللغة العربية हिन्दी 한국어 русский ไทย",
    "",
)
Messages = list[dict[str, Any]]
_TOOL = {"type": "function", "function": {"name": "add", "description": "加法", "parameters": {"type": "object"}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CHATS: tuple[
    tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool | None], ...
] = (  # messages, tools, thinking
    ([_user("你好！")], None, None),
    ([_user("Hi there.")], None, True),
    ([_user("Hi there.")], None, False),
    (
        [
            {"role": "system", "content": "Be brief."},
            _user("What is 1 + 2?"),
            {"role": "assistant", "content": "It is 3."},
            _user("再说一遍\n\n谢谢 🙂"),
        ],
        None,
        None,
    ),
    (
        [
            _user("1 + 2?"),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "3"},
        ],
        [_TOOL],
        None,
    ),
)


class Difference(NamedTuple):
    """logits: the largest change of a logit. fault: of it, what rounding does not explain. allowed: of the fault.

    texts, chats: how many were tokenised alike. (A template may refuse a conversation; that is then not counted.)
    """

    logits: float
    fault: float
    allowed: float
    texts: int
    chats: int


def against_transformers(source: Path, written: Path, dtype: str) -> Difference:
    """Open the exported folder `written` in transformers and compare it with `source`, both computed in float32.

    dtype: that of the export. CheckFailed says what differs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours, _ = folder.load(source)
    ids = _probe(ours, source)
    exact = _logits(ours, ids)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(weights.DTYPES[dtype]))
    rounded = _logits(ours, ids)
    del ours
    loaded: Any = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, output_loading_info=True)
    theirs, found = loaded
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise CheckFailed("transformers does not find the model whole in what was written", found=str(wrong)[:300])
    with torch.no_grad():
        logits = theirs(ids).logits.float()
    del loaded, theirs
    reader: Any = AutoTokenizer.from_pretrained(written)

    def their_chat(messages: Messages, tools: Messages | None, thinking: bool | None) -> list[int]:
        extra = {} if thinking is None else {"enable_thinking": thinking}
        found = reader.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True, **extra)
        return list(found["input_ids"])

    def their_ids(text: str) -> list[int]:
        return list(reader(text, add_special_tokens=False)["input_ids"])

    texts, chats = _compare_tokens(Tokenizer.load(source), their_ids, their_ids, their_chat)
    return _judge(exact, rounded, logits, texts, chats)


def against_folder(source: Path, opened: Path, precision: str) -> Difference:
    """Compare `source` with what was written and opened again as the model folder `opened`.

    precision: a key of ROUNDING. CheckFailed says what differs: a tensor by more than rounding, the maths, tokens.
    """
    before, _ = folder.load(source)
    after, _ = folder.load(opened)
    state, other = before.state_dict(), after.state_dict()
    if state.keys() != other.keys():
        raise CheckFailed(
            "other tensors came back than were written", found=str(sorted(state.keys() ^ other.keys()))[:300]
        )
    for name, tensor in state.items():
        if tensor.shape != other[name].shape:
            raise CheckFailed(f"`{name}` came back in another shape", found=str(tuple(other[name].shape)))
        change = float((other[name] - tensor).norm() / tensor.norm().clamp(min=1e-30))
        if not change <= ROUNDING[precision]:
            raise CheckFailed(
                f"`{name}` is not what was written",
                found=f"it differs by {change:.2g} of its norm, {precision} may take {ROUNDING[precision]:g}",
            )
    ids = _probe(before, source)
    exact, logits = _logits(before, ids), _logits(after, ids)
    before.load_state_dict(other)
    rounded = _logits(before, ids)
    theirs = Tokenizer.load(opened)
    texts, chats = _compare_tokens(
        Tokenizer.load(source),
        theirs.encode,
        theirs.encode_template,
        lambda messages, tools, thinking: (
            render(theirs, messages, tools, generation_prompt=True, thinking=thinking).ids
        ),
    )
    return _judge(exact, rounded, logits, texts, chats)


def _probe(model: Decoder, source: Path) -> Tensor:
    """(2, T) tokens: running text of several scripts, and any tokens at all."""
    length = min(model.config.max_position_embeddings, LONGEST)
    text = [i for row in Tokenizer.load(source).encode_batch(TEXTS) for i in row] or [0]
    generator = torch.Generator().manual_seed(0)
    written = torch.tensor((text * length)[:length])
    return torch.stack((written, torch.randint(0, model.config.vocab_size, (length,), generator=generator)))


@torch.no_grad()
def _logits(model: Decoder, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = Batch(ids, torch.full_like(ids, -100), positions, torch.zeros_like(ids), units=1.0)
    logits = model(batch, {"logits"}).logits
    assert logits is not None
    return logits


def _judge(exact: Tensor, rounded: Tensor, logits: Tensor, texts: int, chats: int) -> Difference:
    """rounded: the source's logits with the weights as they are in the file. logits: the file's."""
    fault = float((logits - rounded).abs().max())
    allowed = TOLERANCE * max(1.0, float(rounded.abs().max()))
    result = Difference(float((logits - exact).abs().max()), fault, allowed, texts, chats)
    if not fault <= allowed:  # also when it is no number
        raise CheckFailed(
            "what was written computes something else",
            found=f"logits differ by {fault:.3g} where {allowed:.3g} is allowed",
            data=result._asdict(),
        )
    return result


def _compare_tokens(
    ours: Tokenizer,
    encode: Callable[[str], list[int]],
    encode_template: Callable[[str], list[int]],
    chat: Callable[[Messages, Messages | None, bool | None], list[int]],
) -> tuple[int, int]:
    """How many texts and conversations have the same tokens there and here: all of them, or CheckFailed.

    Texts with each added token are among them: with a word as content, with control as a template's own text.
    """
    added = [(token["content"], f"1,{token['content']},2") for token in ours.raw["added_tokens"]]
    contents = [*TEXTS, *(text for token, text in added if token not in ours.added)]
    controls = [text for token, text in added if token in ours.added]
    for texts, here, there in ((contents, ours.encode, encode), (controls, ours.encode_template, encode_template)):
        for text in texts:
            if (mine := here(text)) != (other := there(text)):
                raise CheckFailed(f"the tokens of {text!r} differ", found=f"{mine[:20]} became {other[:20]}")
    compared = 0
    for messages, tools, thinking in CHATS if ours.chat_template is not None else ():
        try:
            mine = render(ours, messages, tools, generation_prompt=True, thinking=thinking).ids
        except DataError:
            continue  # the template has no place for tools, or for a system message
        if mine != (other := chat(messages, tools, thinking)):
            raise CheckFailed("the tokens of a conversation differ", found=f"{mine[:20]} became {other[:20]}")
        compared += 1
    return len(contents) + len(controls), compared
