"""Conversations as token ids: a jinja template, and which tokens the model is to learn.

Content never becomes control. Before rendering, every literal of an added token inside the messages is replaced by a
private-use sentinel; the rendered text is cut at the template's own markers, and the pieces between them are encoded
as plain content with the sentinels put back. Pieces also end where supervision begins or ends, so the ids of a
generation prompt are exactly the beginning of the ids trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minigpt.core.data.schema import BadRow
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError

# Plane 16 of the private use area; a message that holds one of these is escaped like any other literal.
_BEGIN, _END, _ESCAPE, _MASKED = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3"
_MARKS = (_BEGIN, _END, _ESCAPE, _MASKED)
_FIRST = 0xE000  # sentinel of table entry i: _ESCAPE + chr(_FIRST + i)
LONGEST = 4_000_000  # characters that a template may produce
_LONGEST_PRODUCT = 100_000  # of a string or list repeated inside a template
_STRETCHING = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")  # a short call, a huge text

_BODY = """\
{%- macro calls(message) -%}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function if call.function else call -%}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson -%}
{{- '\\n' if not loop.first or message.content -}}
{{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' + arguments + '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endmacro -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + '# Tools\\n\\n' -}}
{{- 'You may call one or more functions to assist with the user query.\\n\\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
{%- for tool in tools -%}
{{- '\\n' + (tool | tojson) -}}
{%- endfor -%}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
{{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif system -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if thinking -%}
{{- '<think>\\n' if message.reasoning_content else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- generation -%}
{{- message.reasoning_content + '\\n</think>\\n\\n' if thinking and message.reasoning_content -}}
{{- (message.content or '') + calls(message) + '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' -}}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' -}}
{%- elif not (loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if thinking -%}
{{- '<think>\\n' if enable_thinking or open_thinking else '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def template(thinking: bool = False) -> str:
    """Our ChatML template. thinking: every assistant turn has a think block, empty and not learnt without reasoning."""
    return f"{{%- set thinking = {'true' if thinking else 'false'} -%}}\n{_BODY}"


Parts = list[tuple[str, bool, bool]]  # text, whether it is a marker, whether it is learnt


class Unwritable(BadRow):
    """A conversation that the chat template cannot write. message: the same for one that is no row of data."""

    def __init__(self, reason: str, detail: str = "", *, message: str, fix: str):
        super().__init__(reason, detail, fix=fix)
        self.message = message


class Rendered(NamedTuple):
    """ids: the conversation. mask: True for what the model learns: the assistant's words, the end of its turn, but
    nothing of a message whose weight is 0.
    """

    ids: list[int]
    mask: list[bool]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    generation_prompt: bool = False,
    thinking: bool | None = None,
) -> Rendered:
    """A conversation in the tokenizer's chat template.

    messages: canonical ones, see schema.Conversation. thinking: passed on as enable_thinking.
    generation_prompt: end where the assistant begins to speak.
    DataError when the tokenizer has no template, or the template fails or produces too much.
    """
    try:
        parts = _prepare(tokenizer, messages, tools, generation_prompt, thinking)
    except Unwritable as fault:
        raise DataError(fault.message, found=fault.detail.removeprefix(": ") or None, fix=fault.fix) from None
    return next(_encode(tokenizer, [parts]))


def prepare(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> Parts:
    """The text of a whole conversation, cut for `encode`. The half of `render` that can fail, a row at a time.

    Unwritable when the template fails or produces too much for this conversation; DataError when there is no template.
    """
    return _prepare(tokenizer, messages, tools, False, None)


def written(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> str:
    """What the template makes of a conversation, for comparing with what it makes of another. Raises as `prepare`."""
    escape = _escaper(tuple(tokenizer.added))
    safe_tools = escape.value(list(tools)) if tools else None
    return _run(_compile(_source(tokenizer)), escape.value(list(messages)), safe_tools, False, tokenizer, None)


def encode(tokenizer: Tokenizer, conversations: Sequence[Parts]) -> list[Rendered]:
    """Many prepared conversations at once, on all cores."""
    return list(_encode(tokenizer, conversations)) if conversations else []


def _prepare(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    prompt: bool,
    thinking: bool | None,
) -> Parts:
    escape = _escaper(tuple(tokenizer.added))
    safe_messages, safe_tools = escape.value(list(messages)), escape.value(list(tools)) if tools else None
    compiled = _compile(_source(tokenizer))

    def text(part: Sequence[dict[str, Any]], prompt: bool, thinking: bool | None) -> str:
        return _run(compiled, part, safe_tools, prompt, tokenizer, thinking)

    whole = text(safe_messages, prompt, thinking)
    if not prompt:
        if "generation" in compiled.tags:
            whole = _mask_by_turn(whole, safe_messages)
        else:
            whole = _mark_by_prefix(whole, safe_messages, text, _turn_end(tokenizer))
    return list(_parts(whole, escape, tokenizer))


def _turn_end(tokenizer: Tokenizer) -> str:
    id = tokenizer.turn_end_id
    return (tokenizer.token(id) or "") if id is not None else ""


def _source(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "this tokenizer has no chat template: it is a base model's", fix="fine-tune it with minigpt sft"
        )
    return tokenizer.chat_template


# ------------------------------------------------------------------------------------------------ jinja


class _Environment(ImmutableSandboxedEnvironment):
    """Templates come with models, so they are foreign code: no attribute of Python is in reach, no text explodes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            _refuse(f"the operator {operator} is not allowed in a chat template")
        if operator == "+" and isinstance(left, str) and isinstance(right, str) and len(left) + len(right) > LONGEST:
            _refuse("the chat template builds too long a text")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, (str, list, tuple)) and len(value) * times > _LONGEST_PRODUCT:
                _refuse("the chat template repeats something too often")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(called, "__self__", None), str) and called.__name__ in _STRETCHING:
            _refuse(f"str.{called.__name__} is not allowed in a chat template")
        return super().call(context, called, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, set between two marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja's interface)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Compiled(NamedTuple):
    template: jinja2.Template
    tags: frozenset[str]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """transformers' `tojson`: plain JSON, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


@lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    for name in ("center", "format", "indent", "wordwrap"):
        environment.filters.pop(name)
    environment.globals.pop("lipsum")
    try:
        uses = frozenset(re.findall(r"\{%-?\s*(generation)\b", source))
        return _Compiled(environment.from_string(source), uses)
    except jinja2.TemplateSyntaxError as e:
        raise DataError(f"chat_template.jinja:{e.lineno} is not a valid template", found=e.message) from None


def _run(
    compiled: _Compiled,
    messages: Sequence[dict[str, Any]],
    tools: Any,
    prompt: bool,
    tokenizer: Tokenizer,
    thinking: bool | None,
) -> str:
    extra = {} if thinking is None else {"enable_thinking": thinking, "open_thinking": thinking}
    names = {key: tokenizer.config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    names = {k: v.get("content") if isinstance(v, dict) else v for k, v in names.items() if v is not None}
    pieces, size = [], 0
    try:
        for piece in compiled.template.generate(
            messages=messages, tools=tools, add_generation_prompt=prompt, **names, **extra
        ):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST:
                raise Unwritable(
                    f"a conversation of which the chat template makes more than {LONGEST:,} characters",
                    message=f"the chat template wrote more than {LONGEST:,} characters",
                    fix="shorten it",
                )
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise Unwritable(
            "a conversation that the chat template does not accept",
            f": {e}",
            message="the chat template does not accept this conversation",
            fix="write it as this model's template wants it",
        ) from None
    return "".join(pieces)


def _mask_by_turn(whole: str, messages: Sequence[dict[str, Any]]) -> str:
    """Set another mark where an assistant's turn of weight 0 begins."""
    masked = [m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"]
    if not any(masked):
        return whole
    before, *turns = whole.split(_BEGIN)
    if len(turns) != len(masked):
        raise _hidden_turns("write one {% generation %} block for each of the assistant's messages")
    marks = (_MASKED if hidden else _BEGIN for hidden in masked)
    return before + "".join(mark + turn for mark, turn in zip(marks, turns, strict=True))


def _hidden_turns(fix: str) -> Unwritable:
    return Unwritable(
        "a conversation whose turns the chat template writes in a way that does not show what to learn",
        message="this chat template writes turns in a way that does not show what to learn",
        fix=fix,
    )


def _mark_by_prefix(
    whole: str,
    messages: Sequence[dict[str, Any]],
    text: Callable[[Sequence[dict[str, Any]], bool, bool | None], str],
    turn_end: str,
) -> str:
    """Put the marks into a foreign template's output, where it has none of its own.

    An assistant's turn begins where the prompt for it ends (with or without a think block, whichever reaches
    furthest) and ends with the marker that ends turns.
    """
    marked, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompts = [text(messages[:i], True, thinking) for thinking in (None, False, True)]
        begin = max((len(p) for p in prompts if whole.startswith(p)), default=-1)
        end = whole.find(turn_end, max(begin, 0)) if turn_end else len(whole)
        if begin < done or end < 0:
            raise _hidden_turns("use a template with {% generation %} marks")
        end += len(turn_end)
        marked += [whole[done:begin], _MASKED if message.get("weight", 1) == 0 else _BEGIN, whole[begin:end], _END]
        done = end
    return "".join([*marked, whole[done:]])


# ------------------------------------------------------------------------------------------------ content, control


class _Escaper:
    """Literals of added tokens ↔ sentinels."""

    def __init__(self, literals: Sequence[str]):
        self.table = [*_MARKS, *sorted(literals, key=len, reverse=True)]
        self._index = {literal: i for i, literal in enumerate(self.table)}
        self._find = re.compile("|".join(map(re.escape, self.table)))
        self.markers = re.compile("|".join(map(re.escape, self.table[len(_MARKS) :])) or r"(?!)")
        self._sentinel = re.compile(f"{_ESCAPE}(.)", re.DOTALL)

    def value(self, value: Any) -> Any:
        """The same structure with every string escaped, keys and roles included."""
        if isinstance(value, str):
            return self._find.sub(lambda m: _ESCAPE + chr(_FIRST + self._index[m[0]]), value)
        if isinstance(value, dict):
            return {self.value(k): self.value(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(v) for v in value]
        return value

    def restore(self, text: str) -> str:
        return self._sentinel.sub(lambda m: self.table[ord(m[1]) - _FIRST], text)


@lru_cache(maxsize=16)
def _escaper(literals: tuple[str, ...]) -> _Escaper:
    return _Escaper(literals)


def _encode(tokenizer: Tokenizer, conversations: Sequence[Parts]) -> Iterator[Rendered]:
    contents = [content for parts in conversations for content in _contents(parts, tokenizer)]
    encoded = {
        inner: iter(tokenizer.encode_batch([text for text, within in contents if within is inner], inner=inner))
        for inner in (False, True)
    }
    order = iter(contents)
    for parts in conversations:
        ids: list[int] = []
        mask: list[bool] = []
        for piece, marker, learnt in parts:
            new = [tokenizer.added[piece]] if marker else next(encoded[next(order)[1]])
            ids += new
            mask += [learnt] * len(new)
        yield Rendered(ids, mask)


def _contents(parts: Parts, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Each text between markers, and whether it goes on in the midst of a line: behind another piece of text, or, for
    tokenizers that put a space before the first text only, behind anything."""
    within = False
    for piece, marker, _ in parts:
        if not marker:
            yield piece, within
        within = not marker or tokenizer.prefixes_once


def _parts(text: str, escape: _Escaper, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, bool]]:
    """Cut at the marks of generation and at the template's own markers; contents come back from their sentinels."""
    learnt = False
    for stretch in re.split(f"([{_BEGIN}{_END}{_MASKED}])", text):
        if stretch in (_BEGIN, _END, _MASKED):
            learnt = stretch == _BEGIN
            continue
        at, before = 0, ""
        for found in [*escape.markers.finditer(stretch), None]:
            between = stretch[at : found.start() if found else None]
            if before in tokenizer.eats_right:
                between = between.lstrip()
            if found and found[0] in tokenizer.eats_left:
                between = between.rstrip()
            if between:
                yield escape.restore(between), False, learnt
            if found:
                yield found[0], True, learnt
                at, before = found.end(), found[0]
