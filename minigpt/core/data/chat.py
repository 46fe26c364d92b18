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
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError

# Plane 16 of the private use area; a message that holds one of these is escaped like any other literal.
_BEGIN, _END, _ESCAPE = "\U0010fff0", "\U0010fff1", "\U0010fff2"
_FIRST = 0xE000  # sentinel of table entry i: _ESCAPE + chr(_FIRST + i)
LONGEST = 4_000_000  # characters that a template may produce
_LONGEST_PRODUCT = 100_000  # of a string or list repeated inside a template

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
    """Our ChatML template. thinking: every assistant turn has a think block, empty (and not learnt) without reasoning."""
    return f"{{%- set thinking = {'true' if thinking else 'false'} -%}}\n{_BODY}"


class Rendered(NamedTuple):
    """ids: the conversation. mask: per id, True where the model learns: the assistant's words and the end of its turn."""

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

    messages: role, content and perhaps reasoning_content, tool_calls. thinking: passed on as enable_thinking.
    generation_prompt: end where the assistant begins to speak.
    DataError when the tokenizer has no template, or the template fails or produces too much.
    """
    escape = _escaper(tuple(tokenizer.added))
    safe_messages, safe_tools = escape.value(list(messages)), escape.value(list(tools)) if tools else None
    compiled = _compile(_source(tokenizer))
    extra = {} if thinking is None else {"enable_thinking": thinking, "open_thinking": thinking}

    def text(part: Sequence[dict[str, Any]], prompt: bool) -> str:
        return _run(compiled, part, safe_tools, prompt, tokenizer, extra)

    whole = text(safe_messages, generation_prompt)
    if "generation" not in compiled.tags and not generation_prompt:
        whole = _mark_by_prefix(whole, safe_messages, text)
    return _encode(tokenizer, escape, whole)


def _source(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise DataError("this tokenizer has no chat template: it is a base model's", fix="fine-tune it with minigpt sft")
    return tokenizer.chat_template


# ------------------------------------------------------------------------------------------------ jinja


class _Environment(ImmutableSandboxedEnvironment):
    """Templates come with models, so they are foreign code: no attribute of Python is in reach, no product explodes."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("powers are not allowed in a chat template")
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int) and len(value) * times > _LONGEST_PRODUCT:
                raise jinja2.TemplateRuntimeError("the chat template repeats something too often")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, set between two marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja's interface)

    def parse(self, parser: Any) -> nodes.CallBlock:
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
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
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
    extra: dict[str, Any],
) -> str:
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
                raise DataError(f"the chat template wrote more than {LONGEST:,} characters")
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise DataError("the chat template does not accept this conversation", found=str(e)) from None
    return "".join(pieces)


def _mark_by_prefix(
    whole: str, messages: Sequence[dict[str, Any]], text: Callable[[Sequence[dict[str, Any]], bool], str]
) -> str:
    """Put the marks into a foreign template's output, which must grow only at its end from turn to turn.

    The assistant's turn is what the conversation up to it adds to the generation prompt before it.
    """
    marked, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text(messages[:i], True), text(messages[: i + 1], False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                "this chat template rewrites earlier turns, so what to learn cannot be told apart",
                fix="use a template with {% generation %} marks",
            )
        turn = after[len(before) :].rstrip()
        marked += [whole[done : len(before)], _BEGIN, turn, _END]
        done = len(before) + len(turn)
    return "".join([*marked, whole[done:]])


# ------------------------------------------------------------------------------------------------ content, control


class _Escaper:
    """Literals of added tokens ↔ sentinels."""

    def __init__(self, literals: Sequence[str]):
        self.table = [_BEGIN, _END, _ESCAPE, *sorted(literals, key=len, reverse=True)]
        self._index = {literal: i for i, literal in enumerate(self.table)}
        self._find = re.compile("|".join(map(re.escape, self.table)))
        self.markers = re.compile("|".join(map(re.escape, self.table[3:])) or r"(?!)")
        self._sentinel = re.compile(f"{_ESCAPE}(.)", re.DOTALL)

    def value(self, value: Any) -> Any:
        """The same structure with every string escaped, roles excepted: a template compares those."""
        if isinstance(value, str):
            return self._find.sub(lambda m: _ESCAPE + chr(_FIRST + self._index[m[0]]), value)
        if isinstance(value, dict):
            return {self.value(k): v if k == "role" else self.value(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(v) for v in value]
        return value

    def restore(self, text: str) -> str:
        return self._sentinel.sub(lambda m: self.table[ord(m[1]) - _FIRST], text)


@lru_cache(maxsize=16)
def _escaper(literals: tuple[str, ...]) -> _Escaper:
    return _Escaper(literals)


def _encode(tokenizer: Tokenizer, escape: _Escaper, text: str) -> Rendered:
    parts = list(_parts(text, escape))
    contents = [escape.restore(t) for t, marker, _ in parts if not marker]
    encoded = iter(tokenizer.encode_batch(contents))
    ids: list[int] = []
    mask: list[bool] = []
    for piece, marker, learnt in parts:
        new = [tokenizer.added[piece]] if marker else next(encoded)
        ids += new
        mask += [learnt] * len(new)
    return Rendered(ids, mask)


def _parts(text: str, escape: _Escaper) -> Iterator[tuple[str, bool, bool]]:
    """(text, is a marker, is learnt) in order: cut at the marks of generation and at the template's own markers."""
    learnt = False
    for stretch in re.split(f"([{_BEGIN}{_END}])", text):
        if stretch in (_BEGIN, _END):
            learnt = stretch == _BEGIN
            continue
        at = 0
        for found in escape.markers.finditer(stretch):
            if found.start() > at:
                yield stretch[at : found.start()], False, learnt
            yield found[0], True, learnt
            at = found.end()
        if at < len(stretch):
            yield stretch[at:], False, learnt
