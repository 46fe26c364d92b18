"""An Ollama Modelfile beside a GGUF file: the chat template in Ollama's language, what ends an answer, how to sample.

Ollama does not run the jinja template inside a GGUF file; without a TEMPLATE it guesses one by likeness, or hands the
bare text to the model. Its templates are Go's text/template (https://pkg.go.dev/text/template), and it reads more out
of them than text: that `.Thinking` and `.ToolCalls` occur tells it what the model can do, and the literal text around
them how to find a thought or a call in an answer. So the shape of TEMPLATE below is not free.

Tools and arguments differ from the jinja template in spaces alone: Go writes {"a":1} where Python writes {"a": 1}.
"""

from __future__ import annotations

from pathlib import Path

from minigpt.core.data import chat
from minigpt.core.data.tokenizer import TURN_END, TURN_START, Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.files import quoted, write_atomic
from minigpt.core.groups import SampleConfig
from minigpt.core.report import Report

_THOUGHT = """\
{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ else }}<think>

</think>

{{ end }}"""
_PROMPT = """\
{{ if $.Think }}<think>
{{ else }}<think>

</think>

{{ end }}"""
_CALLS = """\
{{ if and .Content (len .ToolCalls) }}
{{ end }}{{ if .ToolCalls }}{{ range $n, $_ := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if gt (len (slice $message.ToolCalls $n)) 1 }}
{{ end }}{{ end }}{{ end }}"""
# The jinja template of core/data/chat.py, turn for turn. An assistant's message at the end is one to be continued.
_CHATML = """\
{{- $system := "" }}{{ $previous := "" }}
{{- if .Messages }}{{ with index .Messages 0 }}
{{- if eq .Role "system" }}{{ $system = .Content }}{{ end }}
{{- end }}{{ end }}
{{- if .Tools }}<|im_start|>system
{{ if $system }}{{ $system }}

{{ end }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{- range .Tools }}
{{ . }}
{{- end }}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{{ else if $system }}<|im_start|>system
{{ $system }}<|im_end|>
{{ end }}
{{- range $i, $message := .Messages }}
{{- $rest := slice $.Messages $i }}{{ $next := "" }}
{{- if gt (len $rest) 1 }}{{ $next = (index $rest 1).Role }}{{ end }}
{{- if eq .Role "assistant" }}<|im_start|>assistant
THOUGHT{{ .Content }}CALLS{{ if $next }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}
{{- if ne $previous "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>{{ if ne $next "tool" }}<|im_end|>
{{ end }}
{{- else if or $i (ne .Role "system") }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}
{{- if and (not $next) (ne .Role "assistant") }}<|im_start|>assistant
PROMPT{{ end }}
{{- $previous = .Role }}
{{- end }}"""
_PLAIN = """\
{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}
{{- $rest := slice $.Messages $i }}
{{- if or (gt (len $rest) 1) (ne .Role "assistant") }}<|im_end|>
{{ end }}
{{- if and (eq (len $rest) 1) (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""
_CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
_RENDERED = (
    f"{TURN_START}user\na{TURN_END}\n{TURN_START}assistant\nb{TURN_END}\n{TURN_START}user\nc{TURN_END}\n"
    f"{TURN_START}assistant\n"
)


def write(
    path: Path, model: str, tokenizer: Tokenizer, report: Report | None = None, sample: SampleConfig | None = None
) -> None:
    """Write the Modelfile `path` for the GGUF file named `model` in the same directory.

    report: hears when the tokenizer's chat template has no translation; Ollama then guesses one. sample: how to choose
    the next token; None = as this program does.
    """
    write_atomic(path, text(model, tokenizer, report or Report(), path.name, sample))


def text(
    model: str, tokenizer: Tokenizer, report: Report, file: str = "Modelfile", sample: SampleConfig | None = None
) -> str:
    """What `write` writes into a file of this name."""
    lines = [f"# ollama create {quoted(Path(model).stem)} -f {quoted(file)}", f"FROM ./{model}", ""]
    template, system = translate(tokenizer)
    if template is None:
        report.warn(
            "the chat template is not one that can be said in Ollama's language",
            fix="add a TEMPLATE to the Modelfile: docs.ollama.com/modelfile",
        )
    else:
        lines += [f'TEMPLATE """{template}"""', ""]
    if system:
        lines += [f'SYSTEM """{system}"""', ""]
    stops = [tokenizer.token(id) for id in tokenizer.eos_ids]
    if TURN_START in tokenizer.added:
        stops.append(TURN_START)  # a model that begins the user's turn has ended its own
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    sample = sample or SampleConfig()  # Ollama has defaults of its own, and its penalty hurts small models
    lines += [
        f"PARAMETER temperature {sample.temperature:g}",
        f"PARAMETER top_k {sample.top_k}",
        f"PARAMETER top_p {sample.top_p:g}",
        *([f"PARAMETER min_p {sample.min_p:g}"] if sample.min_p else []),
        f"PARAMETER repeat_penalty {sample.repetition_penalty:g}",
    ]
    return "\n".join(lines) + "\n"


def translate(tokenizer: Tokenizer) -> tuple[str | None, str]:
    """(TEMPLATE, SYSTEM) that say what the tokenizer's chat template says. TEMPLATE is None when nothing does.

    Ours is translated whole, with tools and thoughts. A foreign one is compared by what it writes: plain ChatML is
    recognised, also with a system message of its own where the conversation has none.
    """
    if tokenizer.chat_template is None:
        return "{{ .Prompt }}", ""
    for thinking in (False, True):
        if tokenizer.chat_template == chat.template(thinking):
            body = _CHATML.replace("THOUGHT", _THOUGHT if thinking else "")
            return body.replace("CALLS", _CALLS).replace("PROMPT", _PROMPT if thinking else ""), ""
    system = f"{TURN_START}system\nx{TURN_END}\n"
    try:
        if _rendered(tokenizer, [{"role": "system", "content": "x"}, *_CONVERSATION]) != system + _RENDERED:
            return None, ""
        whole = _rendered(tokenizer, _CONVERSATION)
    except DataError:  # a template may refuse a system message
        return None, ""
    before, end = system.split("x")
    if whole == _RENDERED:
        return _PLAIN, ""
    if whole.startswith(before) and whole.endswith(end + _RENDERED):
        return _PLAIN, whole[len(before) : -len(end + _RENDERED)]
    return None, ""


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    return tokenizer.decode(chat.render(tokenizer, messages, generation_prompt=True).ids, skip_special=False)
